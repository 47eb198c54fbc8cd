"""Everything at once: is every request answered or refused as it should, and is nothing left behind?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil

from lazyllm.evaluation.sections import Section

from .client import Outcome, again, connected, drive
from .figures import known, mebibytes, shown
from .plan import KINDS, Talk
from .servers import idle, metrics_of, resident_bytes
from .verdicts import Comparison, Verdict, compare, judge

SETTLING_SECONDS = 2.0
"""Longer than a server waits before it gives free memory back."""
SAMPLING_SECONDS = 0.1
ALLOWED_GROWTH = 0.1
"""How much more memory than after warming up may be held in the end, beside what is kept of prompts."""
MOST_SHOWN = 5


@dataclass(frozen=True)
class Memory:
    """Bytes of a server's memory.

    Attributes:
        resident: in RAM.
        kept: of them, what is kept of earlier prompts.
    """

    resident: int
    kept: int

    @property
    def own(self) -> int:
        """What is held beside kept prompts."""
        return self.resident - self.kept


@dataclass(frozen=True)
class Stress:
    """What came of a load.

    Attributes:
        planned: how many requests there were to be.
        outcomes: of those that were asked.
        seconds: how long all of it took.
        before, after: the server's memory after warming up and after the load.
        peak_bytes: the most memory in between.
        idle: whether nothing ran or waited any more.
        failed_jobs: jobs that failed, as the server counts them.
    """

    planned: int
    outcomes: Sequence[Outcome]
    seconds: float
    before: Memory
    after: Memory
    peak_bytes: int
    idle: bool
    failed_jobs: int

    @property
    def judged(self) -> list[tuple[Outcome, Verdict, str]]:
        """Every request, how it came out, and what is wrong with that."""
        return [(outcome, *judge(outcome)) for outcome in self.outcomes]

    @property
    def comparable(self) -> list[Outcome]:
        """Requests that were answered, and whose client would not leave another time either."""
        answered = [outcome for outcome, verdict, _ in self.judged if verdict is Verdict.ANSWERED]
        return [outcome for outcome in answered if outcome.ask.leave is None]

    def faults(self) -> Iterator[str]:
        """All that went wrong."""
        for outcome, verdict, why in self.judged:
            if verdict is Verdict.WRONG:
                named = f" ({outcome.ask.fault.name})" if outcome.ask.fault else ""
                yield f"{outcome.ask.kind}{named}: {why}"
        if missing := self.planned - len(self.outcomes):
            yield f"{missing} requests were not asked, since what came before them in a conversation went wrong"
        if not self.idle:
            yield "something still ran or waited after the last request"
        if self.failed_jobs:
            yield f"{self.failed_jobs} jobs failed"
        if self.after.own > (1 + ALLOWED_GROWTH) * self.before.own:
            yield f"{mebibytes(self.after.own - self.before.own)} more memory are held than after warming up"


async def put_under_load(
    url: str, pid: int, warm_up: Sequence[Talk], talks: Sequence[Talk], clients: int, *, deadline_seconds: float
) -> Stress:
    """Drives a lazyllm server, first to warm up and then with all of the talks."""
    async with connected(url) as http:
        await drive(http, warm_up, clients, deadline_seconds=deadline_seconds)
        await asyncio.to_thread(idle, url)
        before = await _settled(url, pid)
        began = time.perf_counter()
        sampled: list[int] = [before.resident]
        watching = asyncio.create_task(_watch(pid, sampled))
        outcomes = await drive(http, talks, clients, deadline_seconds=deadline_seconds)
        seconds = time.perf_counter() - began
        watching.cancel()
    still = await asyncio.to_thread(idle, url)
    after = await _settled(url, pid)
    return Stress(
        planned=sum(map(len, talks)),
        outcomes=outcomes,
        seconds=seconds,
        before=before,
        after=after,
        peak_bytes=max(sampled),
        idle=still,
        failed_jobs=int(metrics_of(url).get("lazyllm_jobs_total{failed}", 0)),
    )


async def _watch(pid: int, sampled: list[int]) -> None:
    with suppress(psutil.NoSuchProcess):  # whoever asks it next tells of that
        while True:
            sampled.append(resident_bytes(pid))
            await asyncio.sleep(SAMPLING_SECONDS)


async def _settled(url: str, pid: int) -> Memory:
    await asyncio.sleep(SETTLING_SECONDS)
    return Memory(resident_bytes(pid), int(metrics_of(url)["lazyllm_prefix_bytes"]))


async def one_at_a_time(url: str, stress: Stress, *, deadline_seconds: float) -> list[Comparison]:
    """Compares what was answered under load with the same requests asked alone, of a server that keeps nothing."""
    first = stress.comparable
    async with connected(url) as http:
        second = await again(http, first, deadline_seconds=deadline_seconds)
    return [compare(kind, first, second) for kind in KINDS]


def tables(stress: Stress, comparisons: Sequence[Comparison], said: str) -> list[Section]:
    """What came of each kind of request, and what the server was left with."""
    return [_by_kind(stress, {one.kind: one for one in comparisons}, said), _left_behind(stress, said)]


def _by_kind(stress: Stress, comparisons: dict[str, Comparison], said: str) -> Section:
    rows = []
    for kind in KINDS:
        own = [(outcome, verdict) for outcome, verdict, _ in stress.judged if outcome.ask.kind == kind]
        verdicts = [verdict for _, verdict in own]
        answered = [outcome for outcome, verdict in own if verdict is Verdict.ANSWERED]
        rows.append(
            [
                kind,
                f"{len(own)}",
                *(f"{verdicts.count(verdict)}" for verdict in Verdict),
                shown(known([outcome.ttft_seconds for outcome in answered])),
                shown([outcome.seconds for outcome in answered]),
                _equal(comparisons.get(kind)),
            ]
        )
    faults = list(stress.faults())
    differences = [text for comparison in comparisons.values() for text in comparison.differences]
    columns = ["request", "asked", *Verdict, "TTFT of streams, seconds, 50 / 90 / 99 %", "seconds, 50 / 90 / 99 %"]
    notes = [
        "*Same alone*: of the answered requests, how many get the same replies when they are asked one at a time of a "
        "server that keeps nothing of earlier prompts.",
        f"Wrong: {'; '.join(faults[:MOST_SHOWN])}{_more(faults)}." if faults else "Nothing was wrong.",
    ]
    if differences:
        notes.append(f"Different alone: {'; '.join(differences[:MOST_SHOWN])}{_more(differences)}.")
    title = f"{len(stress.outcomes)} requests of every kind in {stress.seconds:.0f} s"
    return Section(title, said, [*columns, "same alone"], rows, notes)


def _left_behind(stress: Stress, said: str) -> Section:
    before, after = stress.before, stress.after
    rows = [
        ["after warming up", mebibytes(before.resident), mebibytes(before.kept), mebibytes(before.own)],
        ["most under load", mebibytes(stress.peak_bytes), "", ""],
        ["after the load", mebibytes(after.resident), mebibytes(after.kept), mebibytes(after.own)],
    ]
    ran = "Nothing ran or waited" if stress.idle else "Something still ran or waited"
    notes = [f"{ran} after the last request; {stress.failed_jobs} jobs failed."]
    return Section("Memory of the server", said, ["when", "resident", "kept of prompts", "the rest"], rows, notes)


def _equal(comparison: Comparison | None) -> str:
    return f"{comparison.equal} of {comparison.total}" if comparison is not None and comparison.total else ""


def _more(texts: Sequence[str]) -> str:
    return f"; and {len(texts) - MOST_SHOWN} more" if len(texts) > MOST_SHOWN else ""
