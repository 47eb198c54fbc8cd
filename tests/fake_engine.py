"""An engine that computes nothing: what comes of a job is a script, which runs in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from lazyllm import DropCache, LastTokenAttention, LazyPipeline, Stages
from lazyllm.errors import Cancelled, Closed, DocumentGone, QueueFull, TooLong
from lazyllm.serving.engine import EngineLimits, EngineStats
from lazyllm.serving.jobs import Delta, Depths, DocumentLoaded, Event, Job, JobEnd, JobFailed, Logprob, ReplyEnd, Usage
from lazyllm.serving.policies import NamedPipelines
from tests.talks import pipeline, tokenizer
from tests.tiny import VOCABULARY, tiny_model

WORDS = ("one ", "two ", "three")
PATIENCE = 60
"""Seconds after which a test takes it that nothing comes any more."""


@cache
def pipelines() -> dict[str, LazyPipeline]:
    """Three policies of one tiny model, which reads prompts and documents but never replies."""
    return {
        "aux": pipeline(),
        "dense": LazyPipeline.from_preset("dense", tiny_model(), tokenizer()),
        "drop": pipeline(scorer=LastTokenAttention(), schedule=Stages({2: 0.4}), cache=DropCache()),
    }


class Run:
    """A job on its way, with what a script may do.

    Attributes:
        job: what is asked; None for a document.
        given_up: set once nobody wants it any more.
        ended: set once nothing comes any more.
    """

    def __init__(self, job: Job | None, deliver: Callable[[Event], None]) -> None:
        self.job, self.deliver = job, deliver
        self.given_up, self.ended = threading.Event(), threading.Event()
        self.reason: BaseException = Cancelled()

    def cancel(self) -> None:
        self.given_up.set()

    def tell(self, event: Event) -> None:
        """Hands over an event, unless the job was given up."""
        if self.given_up.is_set():
            raise self.reason
        self.deliver(event)

    def wait(self, until: threading.Event | None = None) -> None:
        """Waits for something, or else for being given up."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and not (until and until.is_set()):
            if self.given_up.wait(0.005):
                raise self.reason

    def say(self, words: Sequence[str] = WORDS, *, reason: str = "stop") -> None:
        """All replies of a job, word by word."""
        assert self.job is not None
        top = self.job.sampling.top_logprobs
        for reply in range(self.job.replies):
            for token, word in enumerate(words):
                logprobs = () if top is None else (logprob(token, word, top),)
                self.tell(Delta(reply, word, (token,), logprobs))
            self.tell(ReplyEnd(reply, reason))

    def end(self) -> None:
        """What it has cost."""
        assert self.job is not None
        tokens = len(self.job.prompt.token_ids)
        self.tell(JobEnd(Usage(tokens, tokens // 2, 3 * self.job.replies, 0.25, 7, 0.01, 0.1, 0.3)))


def logprob(token: int, word: str, top: int) -> Logprob:
    others = tuple(Logprob(90 + rank, f"other{rank}", -1.0 - rank) for rank in range(top))
    return Logprob(token, word, float("-inf") if word == "two " else -0.5, others)


def talk(run: Run) -> None:
    """What most jobs do."""
    assert run.job is not None
    if run.job.trace:
        every = tuple(range(len(run.job.prompt.token_ids)))
        run.tell(Depths(0, 4, every, tuple(1 + token % 4 for token in every)))
    run.say()
    run.end()


Script = Callable[[Run], None]


class FakeEngine(NamedPipelines):
    """Has the face of `Engine`.

    Attributes:
        script: what a job does.
        runs: all jobs so far.
        full: whether no job is taken now.
    """

    def __init__(self, script: Script = talk, **limits: int) -> None:
        super().__init__(pipelines())
        self.script, self.limits = script, EngineLimits(**limits)
        self.runs: list[Run] = []
        self.documents: dict[str, Any] = {}
        self.jobs: Counter[str] = Counter()
        self.full, self.is_open = False, True

    @property
    def words(self) -> int:
        return VOCABULARY

    def submit(self, job: Job, deliver: Callable[[Event], None]) -> Run:
        longest = self.pipeline(job.policy).max_positions
        if len(job.prompt.token_ids) + (job.sampling.max_tokens or 1) > longest:
            raise TooLong(f"{len(job.prompt.token_ids)} tokens and more do not fit into {longest} positions")
        return self._start(Run(job, deliver), self.script)

    def load(
        self, texts: Sequence[str], deliver: Callable[[Event], None], *, system: str | None = None, policy: str
    ) -> Run:
        def script(run: Run) -> None:
            document = self.pipeline(policy).load(texts, system=system)
            name = f"doc-{len(self.documents)}"
            self.documents[name] = document
            run.tell(DocumentLoaded(name, len(document), document.loaded.depth, 4, 0.5, document.cache.kv_bytes))

        return self._start(Run(None, deliver), script)

    def document(self, name: str) -> Any:
        if name not in self.documents:
            raise DocumentGone(f"there is no document {name!r}")
        return self.documents[name]

    def _start(self, run: Run, script: Script) -> Run:
        if not self.is_open:
            raise Closed("the engine takes no more jobs")
        if self.full:
            raise QueueFull("64 jobs wait already", 2.5)
        self.runs.append(run)
        threading.Thread(target=self._play, args=(run, script), daemon=True).start()
        return run

    def _play(self, run: Run, script: Script) -> None:
        try:
            script(run)
            self.jobs["done"] += 1
        except Exception as error:
            self.jobs["cancelled" if isinstance(error, Cancelled) else "failed"] += 1
            run.deliver(JobFailed(error))
        finally:
            run.ended.set()

    @property
    def stats(self) -> EngineStats:
        running = sum(not run.ended.is_set() for run in self.runs)
        return EngineStats(running, 2, dict(self.jobs), 11, 5, 9, 7, 1, 100, len(self.documents), 200, 300, 400, 6)

    def close(self, *, timeout: float | None = None) -> None:
        self.is_open = False
        deadline = time.monotonic() + (PATIENCE if timeout is None else timeout)
        for run in self.runs:
            if not run.ended.wait(max(0.0, deadline - time.monotonic())):
                run.reason = Closed("the engine was closed before the job was done")
                run.cancel()
                run.ended.wait(PATIENCE)

    def run(self, number: int = 0) -> Run:
        """A job, once it has come."""
        deadline = time.monotonic() + PATIENCE
        while len(self.runs) <= number:
            assert time.monotonic() < deadline, "no job came"
            time.sleep(0.002)
        return self.runs[number]


@contextmanager
def scripted(script: Script, **limits: int) -> Iterator[FakeEngine]:
    """An engine whose jobs have all ended afterwards."""
    engine = FakeEngine(script, **limits)
    try:
        yield engine
    finally:
        engine.close(timeout=0)
