"""Servers side by side: the same requests by the same number of clients, one server computing at a time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from lazyllm.errors import EngineError
from lazyllm.evaluation.bench import Spread
from lazyllm.evaluation.sections import Section, bold, times

from .client import Outcome, connected, drive
from .figures import known, percentiles, shown
from .plan import Talk
from .servers import ServerProcess


@dataclass(frozen=True)
class Rival:
    """A server with one way to answer.

    Attributes:
        engine: the program.
        run: what it does there, e.g. a preset.
        server: its process; or why there is none.
        model: what its requests name.
    """

    engine: str
    run: str
    server: ServerProcess | EngineError
    model: str = ""

    @property
    def name(self) -> str:
        """Engine and run."""
        return f"{self.engine} {self.run}"


@dataclass
class Record:
    """What a rival did, round by round.

    Attributes:
        outcomes: by round, in the order of the plan.
        seconds: by round, from the first request to the last answer.
    """

    outcomes: list[list[Outcome]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def all_outcomes(self) -> list[Outcome]:
        """Of all rounds."""
        return [outcome for round_outcomes in self.outcomes for outcome in round_outcomes]

    @property
    def failed(self) -> list[Outcome]:
        """Requests that were not answered to their end."""
        return [outcome for outcome in self.all_outcomes if not answered(outcome)]

    def per_second(self, amounts: Sequence[float]) -> Spread:
        """Amounts by round over the seconds they took."""
        return Spread.of([amount / seconds for amount, seconds in zip(amounts, self.seconds, strict=True)])

    @property
    def requests_per_second(self) -> Spread:
        """Answered requests."""
        return self.per_second([sum(map(answered, one)) for one in self.outcomes])

    @property
    def tokens_per_second(self) -> Spread:
        """Tokens of replies."""
        return self.per_second([sum(outcome.reply_tokens for outcome in one) for one in self.outcomes])


def answered(outcome: Outcome) -> bool:
    """Whether a stream came to its end; not every server says `[DONE]`."""
    return outcome.trouble is None and outcome.status == 200 and outcome.error is None and 0 in outcome.reasons


async def run_round(
    rival: Rival, talks: Sequence[Talk], clients: int, record: Record, *, deadline_seconds: float
) -> None:
    """One round of a rival, noted in its record."""
    assert isinstance(rival.server, ServerProcess), "there is a server to be asked"
    named = [tuple(replace(ask, options={**ask.options, "model": rival.model}) for ask in talk) for talk in talks]
    async with connected(rival.server.url) as http:
        began = time.perf_counter()
        record.outcomes.append(await drive(http, named, clients, deadline_seconds=deadline_seconds))
        record.seconds.append(time.perf_counter() - began)


def table(
    rivals: Sequence[Rival], records: Mapping[str, Record], stock: str | None, said: str, notes: Sequence[str] = ()
) -> Section:
    """One line for each rival; `stock` is the one whose replies the others' are compared with."""
    base = max(
        (rival.name for rival in rivals if rival.engine == "transformers" and rival.name in records),
        key=lambda name: records[name].requests_per_second.median,
        default=None,
    )
    rows = []
    for rival in rivals:
        if rival.name not in records:
            rows.append([rival.engine, rival.run, "failed", *[""] * 6])
            continue
        record = records[rival.name]
        row = [rival.engine, rival.run, *_cells(record), _speedup(record, records.get(base or ""))]
        row.append(_same(record, records.get(stock or "")))
        rows.append(bold(row) if rival.name == base else row)
    columns = ["server", "run", "requests per second", "reply tokens per second", "TTFT, seconds, 50 / 90 / 99 %"]
    columns += ["ms per token, 50 / 90 / 99 %", "failed", "requests per second, of the best transformers"]
    columns += ["same replies as stock"]
    reasons = [f"{rival.name} failed: {rival.server}." for rival in rivals if isinstance(rival.server, EngineError)]
    return Section("Servers side by side", said, columns, rows, [*notes, *reasons])


def _cells(record: Record) -> list[str]:
    outcomes = [outcome for outcome in record.all_outcomes if answered(outcome)]
    return [
        record.requests_per_second.show(2),
        record.tokens_per_second.show(1),
        shown(known([outcome.ttft_seconds for outcome in outcomes])),
        shown(known([outcome.seconds_per_token for outcome in outcomes]), 0, factor=1000),
        f"{len(record.failed)}",
    ]


def _speedup(record: Record, base: Record | None) -> str:
    if base is None:
        return ""
    return times(median(_rates(record)) / median(_rates(base)))


def _rates(record: Record) -> list[float]:
    return [sum(map(answered, one)) / seconds for one, seconds in zip(record.outcomes, record.seconds, strict=True)]


def _same(record: Record, stock: Record | None) -> str:
    if stock is None:
        return ""
    pairs = list(zip(record.all_outcomes, stock.all_outcomes, strict=True))
    return f"{sum(one.texts == other.texts for one, other in pairs)} of {len(pairs)}"


def prompt_lengths(records: Mapping[str, Record]) -> list[int]:
    """Shortest and longest prompt in tokens, as the servers count them."""
    counted = [
        int(outcome.usage["prompt_tokens"])
        for record in records.values()
        for outcome in record.all_outcomes
        if "prompt_tokens" in outcome.usage
    ]
    return [int(value) for value in percentiles(counted, (0, 100))]
