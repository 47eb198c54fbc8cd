"""Hands groups to workers and takes in what they find; a worker that dies is replaced and its group given out again."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from lazyllm.ablation.cells import ModelRef
from lazyllm.ablation.models import Shelf
from lazyllm.ablation.units import Group, Record, Unit
from lazyllm.ablation.worker import Job, Unloadable, Worker
from lazyllm.errors import EngineError

ATTEMPTS = 3
"""How many workers may die of a unit, or fail to load a model."""
MOST_DEATHS = 12
"""How many may die one after the other before the run is given up."""
MOST_REFUSALS = 12
"""How many may fail to load a model that another one has loaded, before it is given up."""


class Executor(Protocol):
    """Something that does groups, in any order, and gives each record as it comes."""

    def run(self, groups: Sequence[Group]) -> Generator[Record, None, None]:
        """The records of all groups, those of units that failed among them."""


class Serial:
    """Does one group after the other in this process."""

    def __init__(self, run: str, shelf: Shelf) -> None:
        self._worker = Worker(Job(run, "main"), shelf)

    def run(self, groups: Sequence[Group]) -> Generator[Record, None, None]:
        """The records of all groups."""
        for group in groups:
            try:
                yield from self._worker.work(group)
            except Unloadable as error:
                job = self._worker.job
                yield from (group.failed(unit, str(error), job.run, job.name) for unit in group.units)


@dataclass(frozen=True)
class Finished:
    """A worker is through with its group."""


@dataclass(frozen=True)
class CannotLoad:
    """A worker could not load its group's model."""

    reason: str


@dataclass(frozen=True)
class Died:
    """A worker is no more."""

    reason: str


Message = Record | Finished | CannotLoad | Died


class Hand(Protocol):
    """A worker as the driver sees it."""

    name: str

    def give(self, group: Group) -> None:
        """Hands over a group; one that is dead may take it too, and then says that it died."""

    def dismiss(self) -> None:
        """Ends it."""


class Crew(Protocol):
    """Where workers come from, and how they are heard."""

    run: str

    def hire(self, name: str) -> Hand:
        """A new worker."""

    def hear(self, hands: Sequence[Hand]) -> Iterable[tuple[Hand, Message]]:
        """Waits until one of them says something; at least one message, and all that are there."""


@dataclass
class _Work:
    """A group on its way, and how often it was given out since it last gave a result."""

    group: Group
    attempts: int = 0


class Dispatcher:
    """An executor that keeps so many workers of a crew busy.

    A unit on which workers died `ATTEMPTS` times is recorded as failed, and the rest of its group goes on. A model that
    so many workers could not load, and none could, fails with all its groups; one that was loaded once, after
    `MOST_REFUSALS` and when nobody at work may have it.

    Raises:
        EngineError: when workers die one after the other and nothing comes of any.
    """

    def __init__(self, crew: Crew, workers: int) -> None:
        self._crew, self._most = crew, workers
        self._waiting: deque[_Work] = deque()
        self._busy: dict[str, tuple[Hand, _Work]] = {}
        self._idle: list[Hand] = []
        self._hired = self._deaths = 0
        self._refused: defaultdict[ModelRef, dict[str, str]] = defaultdict(dict)
        self._loadable: set[ModelRef] = set()

    def run(self, groups: Sequence[Group]) -> Generator[Record, None, None]:
        """The records of all groups."""
        self._waiting = deque(map(_Work, groups))
        try:
            while self._waiting or self._busy:
                self._give_out()
                self._rest()
                for hand, message in self._crew.hear([hand for hand, _ in self._busy.values()]):
                    yield from self._take(hand, message)
        finally:
            for hand in [*self._idle, *(hand for hand, _ in self._busy.values())]:
                hand.dismiss()

    @property
    def _is_full(self) -> bool:
        return len(self._busy) + len(self._idle) >= self._most

    def _give_out(self) -> None:
        """Every waiting group that somebody is free for; new workers are hired as long as there may be more."""
        for work in tuple(self._waiting) if self._idle or not self._is_full else ():
            hand = self._free(work.group.ref)
            if hand is not None:
                self._waiting.remove(work)
                work.attempts += 1
                self._busy[hand.name] = hand, work
                hand.give(work.group)
            elif not self._idle:
                return

    def _rest(self) -> None:
        """Ends those whom nothing waits for: what they hold may be what a new one needs to begin."""
        while self._idle and not self._waiting:
            self._idle.pop().dismiss()

    def _free(self, ref: ModelRef) -> Hand | None:
        """Somebody who may be able to load the model; where nobody may, one who is idle makes room for another."""
        refused = self._refused[ref]
        if willing := [hand for hand in self._idle if hand.name not in refused]:
            self._idle.remove(willing[0])
            return willing[0]
        if self._idle and self._is_full and not self._busy.keys() - refused.keys():
            self._idle.pop().dismiss()
        if self._is_full:
            return None
        self._hired += 1
        return self._crew.hire(f"worker-{self._hired}")

    def _take(self, hand: Hand, message: Message) -> Iterator[Record]:
        _, work = self._busy[hand.name]
        if isinstance(message, Record):
            work.group, work.attempts, self._deaths = work.group.after(message), 1, 0
            self._loadable.add(work.group.ref)
            yield message
            return
        del self._busy[hand.name]
        if isinstance(message, Died):
            hand.dismiss()
            yield from self._mourn(hand, work, message.reason)
            return
        self._idle.append(hand)
        if isinstance(message, CannotLoad):
            yield from self._refuse(hand, work, message.reason)

    def _mourn(self, hand: Hand, work: _Work, reason: str) -> Iterator[Record]:
        """Puts the group of a dead worker first in the queue, without the unit that killed too many."""
        self._deaths += 1
        if self._deaths >= MOST_DEATHS:
            raise EngineError(f"{self._deaths} workers died one after the other without a result: {reason}")
        if work.group.units and work.attempts >= ATTEMPTS:
            record = self._failed(work.group, work.group.units[0], f"{reason}, {work.attempts} times", hand.name)
            work.group, work.attempts = work.group.after(record), 0
            yield record
        if work.group.units:
            self._waiting.appendleft(work)

    def _refuse(self, hand: Hand, work: _Work, reason: str) -> Iterator[Record]:
        """Puts the group first in the queue; gives up on its model when too many could not load it."""
        ref = work.group.ref
        self._refused[ref][hand.name] = reason
        work.attempts -= 1
        self._waiting.appendleft(work)
        if len(self._refused[ref]) < (MOST_REFUSALS if ref in self._loadable else ATTEMPTS):
            return
        if ref in self._loadable and self._busy.keys() - self._refused[ref].keys():
            return
        lost = [other.group for other in self._waiting if other.group.ref == ref]
        self._waiting = deque(other for other in self._waiting if other.group.ref != ref)
        yield from (self._failed(group, unit, reason, hand.name) for group in lost for unit in group.units)

    def _failed(self, group: Group, unit: Unit, reason: str, worker: str) -> Record:
        return group.failed(unit, reason, self._crew.run, worker)


def messages(worker: Worker, group: Group) -> Iterator[Message]:
    """What a worker says of a group."""
    try:
        yield from worker.work(group)
        yield Finished()
    except Unloadable as error:
        yield CannotLoad(str(error))
