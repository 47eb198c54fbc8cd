"""Many jobs on one model at once: rows join and leave a batch between two steps, long prefills let replies go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lazyllm.contexts.documents import Document
from lazyllm.pipeline import LazyPipeline
from lazyllm.policies.query import Query
from lazyllm.prompts import EncodedPrompt, Prompt
from lazyllm.serving.jobs import Event, Job


@dataclass(frozen=True)
class EngineLimits:
    """How much an engine takes on.

    Attributes:
        running: most replies that are made at once.
        waiting: most jobs that wait; a further one is refused.
        piece: most tokens a layer of a prefill computes before running replies get a step.
        prefix_bytes: of what is kept of earlier prompts, used longest ago out first; 0 = nothing is kept.
        document_bytes: of loaded documents, used longest ago out first.
    """

    running: int = 16
    waiting: int = 64
    piece: int = 512
    prefix_bytes: int = 2**30
    document_bytes: int = 2**30


@dataclass(frozen=True)
class EngineStats:
    """What an engine is doing, and has done so far.

    Attributes:
        running: replies that are being made.
        waiting: jobs that wait for their prefill.
        jobs: jobs that have ended, by outcome: "done", "cancelled", "failed".
        prompt_tokens, cached_tokens, reply_tokens, revived_tokens: sums over the jobs that are done.
        prefix_entries, prefix_bytes: what is kept of earlier prompts.
        documents, document_bytes: documents that are loaded.
        kv_bytes, aux_bytes: what running replies hold.
        steps: decode steps so far.
    """

    running: int
    waiting: int
    jobs: Mapping[str, int]
    prompt_tokens: int
    cached_tokens: int
    reply_tokens: int
    revived_tokens: int
    prefix_entries: int
    prefix_bytes: int
    documents: int
    document_bytes: int
    kv_bytes: int
    aux_bytes: int
    steps: int


class Ticket:
    """A job that the engine has taken."""

    def cancel(self) -> None:
        """Gives the job up: its memory is free after the running step or piece; it ends with `JobFailed`."""
        raise NotImplementedError


class Engine:
    """Runs jobs on one model in a thread of its own; what comes of them is handed to their `deliver`.

    Args:
        pipelines: by name, pipelines that share one model and tokenizer; the first is the default.
        limits: how much it takes on.
    """

    def __init__(self, pipelines: Mapping[str, LazyPipeline], limits: EngineLimits | None = None) -> None:
        raise NotImplementedError

    def pipeline(self, policy: str | None = None) -> LazyPipeline:
        """The pipeline of a name.

        Raises:
            InputError: when there is none of that name.
        """
        raise NotImplementedError

    def encode(self, prompt: Prompt, *, policy: str | None = None, query: Query | None = None) -> EncodedPrompt:
        """A prompt as a job needs it; may be called by any thread.

        Raises:
            InputError: when it cannot be used.
        """
        raise NotImplementedError

    def submit(self, job: Job, deliver: Callable[[Event], None]) -> Ticket:
        """Takes a job; may be called by any thread. `deliver` is called by the engine's, and must not wait.

        Raises:
            QueueFull: when as many jobs wait as may.
            InputError: when the prompt and `max_tokens` need more positions than the model has, or the document is not
                loaded (any more).
            Closed: when the engine is closed, or closing.
        """
        raise NotImplementedError

    def load(
        self,
        texts: Sequence[str],
        deliver: Callable[[Event], None],
        *,
        system: str | None = None,
        policy: str | None = None,
    ) -> Ticket:
        """Loads texts as one document for later jobs; as `submit`."""
        raise NotImplementedError

    def document(self, name: str) -> Document:
        """A loaded document, whose `prompt(question)` a job with its id needs.

        Raises:
            InputError: when it is not loaded (any more).
        """
        raise NotImplementedError

    @property
    def stats(self) -> EngineStats:
        """Counts; may be asked for by any thread."""
        raise NotImplementedError

    def close(self, *, timeout: float | None = None) -> None:
        """Takes nothing new and refuses what waits; running replies go on to their end, for at most `timeout` seconds.

        The rest then ends with `JobFailed`. Returns when the thread has ended.
        """
        raise NotImplementedError
