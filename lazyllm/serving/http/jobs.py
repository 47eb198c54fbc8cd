"""The jobs of one request, and their way from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Self

from lazyllm.serving.engine import Engine, Ticket
from lazyllm.serving.jobs import LAST, Event, Job


class RequestJobs:
    """Jobs whose events come in one queue; those that have not ended when the context is left are given up.

    A thread that outlives the context may still hand in a job: it is given up as well.

    Args:
        engine: runs them.
        lag_events: most events that may wait to be read; None = any number.

    Attributes:
        lagging: set once more events wait.
    """

    def __init__(self, engine: Engine, *, lag_events: int | None = None) -> None:
        self.lagging = asyncio.Event()
        self._engine, self._lag_events = engine, lag_events
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._open: dict[int, Ticket] = {}
        self._count = 0
        self._left = False

    def submit(self, job: Job) -> None:
        """Hands a job to the engine.

        Raises:
            QueueFull, InputError, Closed: as `Engine.submit`.
        """
        self._take(lambda deliver: self._engine.submit(job, deliver))

    def load(self, texts: Sequence[str], *, system: str | None, policy: str) -> None:
        """Has the engine load a document; as `submit`."""
        self._take(lambda deliver: self._engine.load(texts, deliver, system=system, policy=policy))

    def _take(self, hand_in: Callable[[Callable[[Event], None]], Ticket]) -> None:
        ticket = self._open[self._count] = hand_in(partial(self._deliver, self._count))
        self._count += 1
        if self._left:
            ticket.cancel()

    def _deliver(self, number: int, event: Event) -> None:
        """Takes an event from the engine's thread, which goes on at once."""
        with suppress(RuntimeError):  # the loop is closed: nobody is there to be told
            self._loop.call_soon_threadsafe(self._arrive, number, event)

    def _arrive(self, number: int, event: Event) -> None:
        self._events.put_nowait((number, event))
        if self._lag_events is not None and self._events.qsize() > self._lag_events:
            self.lagging.set()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        """Number of a job, and what comes of it, until all have ended."""
        while self._open:
            number, event = await self._events.get()
            if isinstance(event, LAST):
                del self._open[number]
            yield number, event

    def __enter__(self) -> Self:
        """The context in which the jobs are wanted."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Gives up what has not ended."""
        self._left = True
        for ticket in list(self._open.values()):
            ticket.cancel()
