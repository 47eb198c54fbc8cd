"""What a scorer may ask of a language model that reads the prompt for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class ReadsPrompts(Protocol):
    """A language model that reads a prompt, dense, beside the run that is scored."""

    def encode(self, text: str) -> Tensor:
        """Token ids [t] of a text, without special tokens."""

    def attention(self, token_ids: Tensor, *, queries: int, layers: int | float | None = None) -> list[Tensor]:
        """By layer, attention [h, q, t] of the last `queries` tokens over [t], of the first `layers` layers or all."""

    def look_ahead(self, token_ids: Tensor, *, tokens: int) -> list[Tensor]:
        """By layer, attention [h, q, t] over [t] of the last token and its greedy continuation, `tokens` in all."""

    def surprise(self, token_ids: Tensor) -> Tensor:
        """Self-information [t] of each token after those before it, in nats; 0 for the first."""


Reads = Mapping[str | None, ReadsPrompts]
"""Models by path or hub id; None is the model whose run is scored."""
