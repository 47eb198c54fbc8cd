"""Spreading a score over neighbours."""

from typing import Annotated

import torch.nn.functional as F
from einops import rearrange
from pydantic import AfterValidator, Field
from torch import Tensor


def max_over_neighbours(scores: Tensor, width: int) -> Tensor:
    """Maximum of scores [v] or [w, v] over a centred window of `width` tokens."""
    rows = scores if scores.ndim == 2 else rearrange(scores, "v -> 1 v")
    pooled = F.max_pool1d(rows, width, stride=1, padding=width // 2)
    return pooled if scores.ndim == 2 else rearrange(pooled, "1 v -> v")


def mean_over_neighbours(scores: Tensor, width: int) -> Tensor:
    """Mean of scores [v] over a centred window of `width` tokens; at the ends, of those there are."""
    padded = rearrange(scores, "v -> 1 1 v")
    return rearrange(F.avg_pool1d(padded, width, 1, width // 2, count_include_pad=False), "1 1 v -> v")


def check_odd(pool: int) -> int:
    """Refuses even widths (a pydantic validator's body)."""
    if pool % 2 == 0:
        raise ValueError("a centred pool has an odd width")
    return pool


OddWidth = Annotated[int, Field(ge=1), AfterValidator(check_odd)]
OddWidths = OddWidth | Annotated[tuple[OddWidth, ...], Field(min_length=1)]
