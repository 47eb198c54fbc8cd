"""Replies as far as they have come, and what they have cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from lazyllm.serving.http.errors import Json
from lazyllm.serving.jobs import Delta, Logprob, ReplyEnd, Usage

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has no word for."""
CUT_OFF = "\ufffd"


@dataclass
class Reply:
    """A reply.

    Attributes:
        text: so far, with what it was to begin with.
        logprobs: of its tokens.
        reason: why it ended; None before.
    """

    text: str = ""
    logprobs: list[Logprob] = field(default_factory=list)
    reason: str | None = None

    def add(self, event: Delta | ReplyEnd) -> None:
        """Takes what comes next."""
        if isinstance(event, ReplyEnd):
            self.reason = event.reason
        else:
            self.text += event.text
            self.logprobs += event.logprobs


class Shape(Protocol):
    """How an API tells of replies; choices are numbered through all prompts of a request."""

    def whole(self, replies: Sequence[Reply], usage: Json) -> Json:
        """All replies in one object."""

    def opening(self, choice: int, echo: str) -> Json | None:
        """What a stream says before a reply; None = nothing."""

    def delta(self, choice: int, delta: Delta) -> Json:
        """A reply goes on."""

    def end(self, choice: int, reason: str) -> Json:
        """A reply is complete."""

    def beside(self, **fields: object) -> Json:
        """Something that is no reply."""


def clipped(logprob: float) -> float:
    """A log-probability that JSON can tell."""
    return max(logprob, LEAST_LOGPROB)


def bytes_of(text: str) -> list[int] | None:
    """Bytes of a token; None where it holds a part of a character only."""
    return None if CUT_OFF in text else list(text.encode())


def usage_of(usages: Sequence[Usage]) -> Json:
    """What the jobs of a request have cost together: sums of tokens, and the times of the slowest."""
    prompt = sum(usage.prompt_tokens for usage in usages)
    reply = sum(usage.reply_tokens for usage in usages)
    computed = sum(usage.computed_fraction * usage.prompt_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": reply,
        "total_tokens": prompt + reply,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages)},
        "lazyllm": {
            "computed_fraction": computed / prompt if prompt else 0.0,
            "revived_tokens": sum(usage.revived_tokens for usage in usages),
            "queued_seconds": max((usage.queued_seconds for usage in usages), default=0.0),
            "ttft_seconds": max((usage.ttft_seconds for usage in usages), default=0.0),
            "seconds": max((usage.seconds for usage in usages), default=0.0),
        },
    }
