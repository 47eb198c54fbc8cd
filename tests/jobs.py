"""Listeners and engines for tests of the serving engine."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lazyllm import LazyPipeline
from lazyllm.prompts import EncodedPrompt
from lazyllm.serving.engine import Engine, EngineLimits
from lazyllm.serving.jobs import Delta, DocumentLoaded, Event, Job, JobEnd, JobFailed, Sampling

PATIENCE = 60
"""Seconds after which a test takes it that nothing comes any more."""


class Listener:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.threads: set[int] = set()
        self._told = threading.Condition()

    def __call__(self, event: Event) -> None:
        with self._told:
            self.threads.add(threading.get_ident())
            self.events.append(event)
            self._told.notify_all()

    def wait(self, kind: type | tuple[type, ...] = (JobEnd, JobFailed, DocumentLoaded), count: int = 1) -> Any:
        """The `count`th event of a kind, once it has come."""
        with self._told:
            assert self._told.wait_for(lambda: len(self.of(kind)) >= count, PATIENCE), f"no {kind}: {self.events}"
            return self.of(kind)[count - 1]

    def of(self, kind: type | tuple[type, ...]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def tokens(self, reply: int = 0) -> list[int]:
        return [token for delta in self.of(Delta) if delta.reply == reply for token in delta.token_ids]

    def text(self, reply: int = 0) -> str:
        return "".join(delta.text for delta in self.of(Delta) if delta.reply == reply)

    @property
    def done(self) -> bool:
        return bool(self.of((JobEnd, JobFailed, DocumentLoaded)))


def soon(condition: Callable[[], bool], *, seconds: float = PATIENCE) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come to that"
        time.sleep(0.01)


@contextmanager
def engine_of(pipe: LazyPipeline, *more: LazyPipeline, **limits: Any) -> Iterator[Engine]:
    """An engine whose default policy is "first"; the others are "second" and "third"."""
    names = ("first", "second", "third")
    engine = Engine(dict(zip(names, (pipe, *more), strict=False)), EngineLimits(**{"prefix_bytes": 0, **limits}))
    try:
        yield engine
    finally:
        engine.close(timeout=0)


def job(prompt: EncodedPrompt, most: int | None = 6, *, replies: int = 1, **fields: Any) -> Job:
    """A greedy job, unless its sampling is given."""
    own = {name: fields.pop(name) for name in ("policy", "document", "trace") if name in fields}
    return Job(prompt, Sampling(**{"temperature": 0, "max_tokens": most, **fields}), replies, **own)


def run(engine: Engine, asked: Job) -> Listener:
    """A job, done."""
    listener = Listener()
    engine.submit(asked, listener)
    listener.wait()
    return listener
