"""Servers side by side: the same requests by the same number of clients, one server computing at a time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

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
        server: its process.
        model: what its requests name.
    """

    engine: str
    run: str
    server: ServerProcess
    model: str

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
    url: str, model: str, talks: Sequence[Talk], clients: int, record: Record, *, deadline_seconds: float
) -> None:
    """One round of a server's model, noted in a record."""
    named = [tuple(replace(ask, options={**ask.options, "model": model}) for ask in talk) for talk in talks]
    async with connected(url) as http:
        began = time.perf_counter()
        record.outcomes.append(await drive(http, named, clients, deadline_seconds=deadline_seconds))
        record.seconds.append(time.perf_counter() - began)


def table(
    rivals: Sequence[Rival], records: Mapping[str, Record], stock: str, said: str, notes: Sequence[str] = ()
) -> Section:
    """One line for each rival; `stock` is the one whose replies the others' are compared with, where it ran."""
    base = max(
        (rival.name for rival in rivals if rival.engine == "transformers"),
        key=lambda name: records[name].requests_per_second.median,
        default=None,
    )
    rows = []
    for rival in rivals:
        record = records[rival.name]
        speedup = _speedup(record, records[base]) if base else ""
        row = [rival.engine, rival.run, *_cells(record, speedup), _same(record, records.get(stock))]
        rows.append(bold(row) if rival.name == base else row)
    columns = ["server", "run", "requests per second", "of the baseline", "reply tokens per second"]
    columns += ["TTFT, seconds, 50 / 90 / 99 %", "ms per token, 50 / 90 / 99 %", "not answered", "same replies"]
    notes = [f"*Same replies*: as {stock}, to the last character.", *_tokens_of_prompts(records), *notes]
    return Section("Servers side by side", said, columns, rows, notes)


def _cells(record: Record, speedup: str) -> list[str]:
    outcomes = [outcome for outcome in record.all_outcomes if answered(outcome)]
    return [
        record.requests_per_second.show(2),
        speedup,
        record.tokens_per_second.show(1),
        shown(known([outcome.ttft_seconds for outcome in outcomes])),
        shown(known([outcome.seconds_per_token for outcome in outcomes]), 0, factor=1000),
        f"{len(record.failed)}",
    ]


def _speedup(record: Record, base: Record) -> str:
    slower = base.requests_per_second.median
    return times(record.requests_per_second.median / slower) if slower else ""


def _same(record: Record, stock: Record | None) -> str:
    if stock is None:
        return ""
    pairs = list(zip(record.all_outcomes, stock.all_outcomes, strict=True))
    return f"{sum(one.texts == other.texts for one, other in pairs)} of {len(pairs)}"


def _tokens_of_prompts(records: Mapping[str, Record]) -> list[str]:
    """A note where the servers made prompts of different lengths of the same messages."""
    sums = {name: sum(_prompt_tokens(record)) for name, record in records.items() if not record.failed}
    if len(set(sums.values())) < 2:
        return []
    return ["Tokens of all prompts: " + ", ".join(f"{name} {total:,}" for name, total in sums.items()) + "."]


def _prompt_tokens(record: Record) -> list[int]:
    """By request, as the server counts them."""
    return [outcome.usage["prompt_tokens"] for outcome in record.all_outcomes if "prompt_tokens" in outcome.usage]


def prompt_lengths(records: Mapping[str, Record]) -> list[int]:
    """Shortest and longest prompt in tokens."""
    counted = [tokens for record in records.values() for tokens in _prompt_tokens(record)]
    return [int(value) for value in percentiles(counted, (0, 100))]
