"""Jobs and replies on their way: what is asked, what is held, and what is told."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lazyllm.caches.lazy_cache import LazyCache
from lazyllm.errors import Cancelled
from lazyllm.serving.jobs import LAST, Delta, Depths, Event, Job, JobEnd, JobFailed, ReplyEnd, Usage
from lazyllm.serving.sampling import Sampler
from lazyllm.serving.texts import ReplyText, logprob_of

LOG = logging.getLogger("lazyllm.serving")


class Task:
    """Something the engine has taken on; the engine's thread alone tells its events.

    Attributes:
        tokens: of its prompt.
        submitted: when it was taken, by `time.perf_counter`.
        ended: whether nothing comes any more.
        reason: why it is to be given up; None = it is not.

    Args:
        tokens: of its prompt.
        deliver: takes its events.
    """

    def __init__(self, tokens: int, deliver: Callable[[Event], None]) -> None:
        self.tokens = tokens
        self.submitted = time.perf_counter()
        self.ended = False
        self.reason: BaseException | None = None
        self._deliver = deliver

    def tell(self, event: Event) -> None:
        """Hands over an event; a task whose listener fails is given up."""
        if self.ended:
            return
        self.ended = isinstance(event, LAST)
        try:
            self._deliver(event)
        except Exception as error:
            LOG.exception("a listener failed; its job is given up")
            self.reason = self.reason or Cancelled(f"its listener failed: {error}")

    def fail(self, error: BaseException) -> None:
        """Ends it with an error."""
        self.tell(JobFailed(error))

    def check(self) -> None:
        """Raises why it is to be given up, if it is."""
        if self.reason is not None:
            raise self.reason


@dataclass
class Reply:
    """One row of the batch.

    Attributes:
        task: what asked for it.
        number: which of the task's replies it is.
        cache: of one row.
        sampler, text: its tokens and what they say.
        most: most tokens.
        depths: of the prompt's tokens, after the latest step.
        ended: whether it is complete.
    """

    task: PromptTask
    number: int
    cache: LazyCache
    sampler: Sampler
    text: ReplyText
    most: int
    depths: Tensor
    ended: bool = False

    @property
    def last_token(self) -> int:
        """The token that the next step computes."""
        return self.text.token_ids[-1]

    @property
    def position(self) -> int:
        """Where that token stands."""
        return int(self.cache.rows[0].ledger.position[-1]) + 1

    def take(self, logits: Tensor, token: int, tokenizer: object, ends: Sequence[int]) -> None:
        """Goes on by a token that was chosen from logits [v]."""
        top = self.task.job.sampling.top_logprobs
        known = () if top is None else (logprob_of(logits, token, top, tokenizer),)
        ended = token in ends
        text = self.text.add(token)
        full = len(self.text.token_ids) >= self.most
        if ended or full or self.text.stopped:
            self.ended = True
            text += self.text.end()
        self.task.tell(Delta(self.number, text, (token,), known))
        if self.ended:
            self.task.tell(ReplyEnd(self.number, "stop" if ended or self.text.stopped else "length"))

    def note_depths(self) -> None:
        """Counts, and tells where that is asked for, which tokens of the prompt the latest step has taken deeper."""
        ledger = self.cache.rows[0].ledger
        depths = ledger.depth[: self.task.tokens]
        changed = torch.nonzero(depths > self.depths).squeeze(-1)
        self.depths = depths.clone()
        if changed.numel():
            self.task.revived += changed.numel()
            self.task.tell_depths(self.number, ledger.layers, changed, self.depths)


class PromptTask(Task):
    """A job on its way.

    Attributes:
        job: what is asked.
        replies: those that are being made.
        cached: how many tokens of the prompt a cache held.
        computed: layer-tokens of the prompt that its prefill computed, of those of a dense one.
        revived: how often a step took up tokens of the prompt again.
        started, first: when its prefill began, and when its first token came.
    """

    def __init__(self, job: Job, deliver: Callable[[Event], None]) -> None:
        super().__init__(len(job.prompt.token_ids), deliver)
        self.job = job
        self.replies: list[Reply] = []
        self.cached = self.revived = 0
        self.computed = 0.0
        self.started = self.first = self.submitted

    def tell_depths(self, reply: int, layers: int, tokens: Tensor, depths: Tensor) -> None:
        """Tells the depths of `tokens`, of those [t] of all of the prompt's, where that is asked for."""
        if self.job.trace:
            self.tell(Depths(reply, layers, tuple(tokens.tolist()), tuple(depths[tokens].tolist())))

    def usage(self) -> Usage:
        """What it has cost, once its replies are complete."""
        return Usage(
            prompt_tokens=self.tokens,
            cached_tokens=self.cached,
            reply_tokens=sum(len(reply.text.token_ids) for reply in self.replies),
            computed_fraction=self.computed,
            revived_tokens=self.revived,
            queued_seconds=self.started - self.submitted,
            ttft_seconds=self.first - self.submitted,
            seconds=time.perf_counter() - self.submitted,
        )

    def end(self, usage: Usage) -> None:
        """Ends it."""
        self.tell(JobEnd(usage))


class LoadTask(Task):
    """Texts that are to become a document.

    Attributes:
        texts: the texts.
        system: a system message before them.
        policy: name of the pipeline that loads them.
    """

    def __init__(
        self,
        texts: Sequence[str],
        system: str | None,
        policy: str | None,
        tokens: int,
        deliver: Callable[[Event], None],
    ) -> None:
        super().__init__(tokens, deliver)
        self.texts, self.system, self.policy = texts, system, policy
