"""The face of an engine whose jobs are done by replicas."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import aclosing, suppress
from dataclasses import fields
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from lazyllm.contexts.documents import Document
from lazyllm.errors import Cancelled, Closed, InputError, QueueFull, ReplicaLost
from lazyllm.pipeline import LazyPipeline
from lazyllm.serving.engine import EngineLimits, EngineStats
from lazyllm.serving.jobs import LAST, Event, Job, JobFailed
from lazyllm.serving.policies import NamedPipelines
from lazyllm.serving.replicas.replica import Order
from lazyllm.serving.replies import LOG

REPLICAS_TRIED = 3
"""How many replicas a job may lose before it is taken to be the reason."""
RETRY_SECONDS = 0.2
"""How long a job waits before it is sent to another replica."""
WATCH_SECONDS = 2.0
"""How old `stats` and `is_open` may be."""
NUMBERS = tuple(one.name for one in fields(EngineStats) if one.name != "jobs")
NO_DOCUMENTS = "replicas keep no documents; put the text at the start of the prompt, which its replica finds again"


class _Lost(Exception):
    """A replica is gone."""


class RemoteTicket:
    """A job that was sent to a replica."""

    def __init__(self, following: Future[None]) -> None:
        self._following = following

    def cancel(self) -> None:
        """Gives the job up; the replica hears of it."""
        self._following.cancel()


class RemoteEngine(NamedPipelines):
    """Has the face of `Engine`; its events come from a thread of its own.

    A job whose replica is lost before it said anything is done by another one. Later it ends with `ReplicaLost`:
    another replica might not go on with the same words.

    Args:
        handle: of the deployment of `Replica`.
        recipes: by name, the pipelines with a tokenizer and no model; the first is the default.
        limits: of each replica.
        room: most jobs that they have at once, all together; a further one is refused.
        words: how many tokens the model knows.
    """

    def __init__(
        self,
        handle: DeploymentHandle[Any],
        recipes: Mapping[str, LazyPipeline],
        limits: EngineLimits,
        *,
        room: int,
        words: int,
    ) -> None:
        super().__init__(recipes)
        self.limits, self.words, self._room = limits, words, room
        self._handle = handle
        self._taking = threading.Lock()
        self._open: set[Future[None]] = set()
        self._closed, self._has_replicas, self._stats = False, True, total([])
        self._given_up: set[str] = set()
        self._news = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="lazyllm-replicas", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._watch(), self._loop)

    @property
    def is_open(self) -> bool:
        """Whether it takes jobs, and there is a replica to do them."""
        return not self._closed and self._has_replicas

    @property
    def stats(self) -> EngineStats:
        """Sums over the replicas there are."""
        return self._stats

    def document(self, name: str) -> Document:
        """Refused.

        Raises:
            InputError: always.
        """
        raise InputError(NO_DOCUMENTS)

    def load(self, texts: Sequence[str], deliver: Callable[[Event], None], **options: Any) -> RemoteTicket:
        """Refused; as `document`."""
        raise InputError(NO_DOCUMENTS)

    def submit(self, job: Job, deliver: Callable[[Event], None]) -> RemoteTicket:
        """Sends a job to a replica; may be called by any thread. What the replica refuses comes as `JobFailed`.

        Raises:
            QueueFull: when the replicas have as many jobs as they may.
            Closed: when the engine is closed, or closing.
        """
        with self._taking:
            if self._closed:
                raise Closed("the engine takes no more jobs")
            if len(self._open) >= self._room:
                raise QueueFull(f"the replicas have {self._room} jobs, as many as they may; try again later", 1.0)
            following = asyncio.run_coroutine_threadsafe(self._follow(job, deliver), self._loop)
            self._open.add(following)
        following.add_done_callback(self._open.discard)
        return RemoteTicket(following)

    def close(self, *, timeout: float | None = None) -> None:
        """Takes nothing new; jobs go on to their end, for at most `timeout` seconds.

        The rest then ends with `JobFailed`. The replicas are not ended.
        """
        with self._taking:
            self._closed = True
        if self._loop.is_closed():
            return
        wait(set(self._open), timeout)
        asyncio.run_coroutine_threadsafe(_end_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # -- done by its own thread --------------------------------------------------------------------

    async def _follow(self, job: Job, deliver: Callable[[Event], None]) -> None:
        """Has a job done, and tells what comes of it."""
        try:
            await self._run(job, deliver)
        except asyncio.CancelledError:
            closed = Closed("the engine was closed before the job was done")
            deliver(JobFailed(closed if self._closed else Cancelled()))
        except Exception as error:
            deliver(JobFailed(error))

    async def _run(self, job: Job, deliver: Callable[[Event], None]) -> None:
        begun = False
        for _ in range(REPLICAS_TRIED):
            try:
                async with aclosing(self._said(Order(job))) as said:
                    async for event in said:
                        begun = True
                        deliver(event)
                return
            except _Lost as lost:
                if begun:
                    raise ReplicaLost("the replica that did the job is gone; try again") from lost
            await asyncio.sleep(RETRY_SECONDS)
        raise ReplicaLost(f"{REPLICAS_TRIED} replicas were lost, one after the other, while they began with the job")

    async def _said(self, order: Order) -> AsyncGenerator[Event, None]:
        """What a replica says of a job, to its end; when nobody listens any more, the replica hears of it.

        Raises:
            _Lost: when the replica is gone.
        """
        stream = self._handle.options(stream=True).run.remote(order)
        ended = False
        try:
            async for event in stream:
                ended = isinstance(event, LAST)
                yield event
        except RayTaskError:
            raise  # what a replica raised, as another one would
        except (RayError, RayServeException) as error:
            raise _Lost from error
        except asyncio.CancelledError as error:  # of this job here, or of the replica's when it is ended
            if _is_given_up():
                raise
            raise _Lost from error
        finally:
            if not ended:
                self._given_up.add(order.id)
                self._news.set()
                with suppress(Exception):  # as well as may be: the replica may be gone
                    stream.cancel()
        if not ended:
            raise _Lost

    async def _watch(self) -> None:
        """Tells the replicas what was given up, and asks what they do, from time to time."""
        while True:
            try:
                await self._talk()
            except TimeoutError:
                pass  # they are busy: what they said last stands
            except Exception:
                LOG.exception("the replicas could not be asked what they do")
            with suppress(TimeoutError):
                async with asyncio.timeout(WATCH_SECONDS):
                    await self._news.wait()

    async def _talk(self) -> None:
        self._news.clear()
        given_up = frozenset(self._given_up)
        try:
            asked = self._handle.broadcast("hear", given_up)
            told = await asked.results_async(timeout_s=WATCH_SECONDS, return_exceptions=True)
        except (RayError, RayServeException):
            told = []
        known = [stats for stats in told if isinstance(stats, EngineStats)]
        self._has_replicas, self._stats = bool(known), total(known)
        if len(known) == len(told):  # else they are told again
            self._given_up -= given_up


def total(stats: Iterable[EngineStats]) -> EngineStats:
    """What several engines do together."""
    numbers: Counter[str] = Counter()
    jobs: Counter[str] = Counter()
    for one in stats:
        numbers.update({name: getattr(one, name) for name in NUMBERS})
        jobs.update(one.jobs)
    return EngineStats(jobs=dict(jobs), **{name: numbers[name] for name in NUMBERS})


def _is_given_up() -> bool:
    """Whether the task that asks was cancelled."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _end_others() -> None:
    """Cancels all tasks of the loop but this one, and waits for them."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
