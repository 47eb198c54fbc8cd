"""Tokens that are never pruned."""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field, field_validator
from torch import Tensor

from lazyllm.policies.base import Policy
from lazyllm.policies.query import TokenRange

Span = TokenRange | str


class Protect(Policy):
    """Never prunes the sinks, the recent window, generated tokens or named spans; the last token is always safe.

    Attributes:
        sinks: how many tokens at the start of the context stay (Xiao et al. 2023, arXiv 2309.17453).
        recent: how many tokens at the end of the context stay.
        recent_unasked: how many where the prompt asks nothing; None = `recent`.
        generated: whether the tokens of the running reply stay.
        system: whether the system messages of a chat stay.
        spans: token ranges `(start, stop)` of the prompt, or substrings of it (the first occurrence).
    """

    sinks: Annotated[int, Field(ge=0)] = 0
    recent: Annotated[int, Field(ge=0)] = 0
    recent_unasked: Annotated[int, Field(ge=0)] | None = None
    generated: bool = True
    system: bool = False
    spans: tuple[Span, ...] = ()

    @field_validator("spans")
    @classmethod
    def _check_spans(cls, spans: tuple[Span, ...]) -> tuple[Span, ...]:
        for span in spans:
            if isinstance(span, str):
                if not span:
                    raise ValueError("a protected substring must not be empty")
            elif not 0 <= span[0] < span[1]:
                raise ValueError(f"a protected token range is (start, stop) with 0 <= start < stop, not {span}")
        return spans

    def mask(
        self, tokens: Tensor, context_tokens: int, reply_start: int, ranges: Sequence[TokenRange], *, asked: bool
    ) -> Tensor:
        """Which of `tokens` [v] are protected, as booleans [v].

        `reply_start` is the index of the running reply's first token, `ranges` are the row's resolved spans,
        `asked` says whether its prompt asks something.
        """
        recent = self.recent if asked or self.recent_unasked is None else self.recent_unasked
        recent_start = context_tokens - max(1, recent)
        if self.generated:
            recent_start = min(recent_start, reply_start)
        kept = (tokens < self.sinks) | (tokens >= recent_start)
        for start, stop in ranges:
            kept |= (tokens >= start) & (tokens < stop)
        return kept


def no_tokens() -> Tensor:
    """An empty [t] tensor of token indices."""
    return torch.empty(0, dtype=torch.long)
