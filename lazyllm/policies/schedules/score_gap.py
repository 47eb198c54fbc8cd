"""Where the scores fall most."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from lazyllm.policies.base import Keep, LayerIndex, Phase, Schedule, check_layer_index, layer_number, tokens_of

TIED = 1e-9
"""Gaps that differ by this share are equal: rounding must not decide."""


@dataclass(frozen=True)
class GapKeep(Keep):
    """The tokens above the largest gap between neighbouring scores, between a floor and `ratio`."""

    floor: float
    adapts: ClassVar[bool] = True

    def free_tokens(self, scores: Tensor, protected: int, context_tokens: int) -> int:
        """How many of the best tokens stand above the gap; the protected ones count for floor and ceiling."""
        most = min(self.limit(context_tokens) - protected, scores.numel())
        least = max(1, tokens_of(self.floor, context_tokens) - protected if self.floor else 0)
        if least >= most:
            return max(0, most)
        ranked = scores.double().sort(descending=True).values
        ranked = ranked / ranked.abs().max().clamp(min=torch.finfo(ranked.dtype).tiny)
        falls = torch.cat([ranked[:-1] - ranked[1:], ranked.new_zeros(1)])[least - 1 : most]  # none behind the last
        largest = torch.nonzero(falls >= falls.max() * (1 - TIED))
        return least + int(largest.max())

    def __str__(self) -> str:
        return f"above the largest gap in the score, {self.floor:.4g} to {self.ratio:.4g} of the context"


class ScoreGap(Schedule):
    """One cut where the scores, from the best down, fall most from one token to the next, so that the prompt decides.

    `n = argmax_n (s_n - s_{n+1})` over the sorted scores of the tokens that are not protected; whatever the scale and
    the zero of the scores. Of equal gaps the one that keeps more. With equal scores later tokens go first.

    Attributes:
        floor: at least this fraction of the context enters, in [0, ceiling]. Without one, a single token that scores
            far above the rest is all that is kept.
        ceiling: at most this fraction, in (0, 1].
        start: the layer the cut stands before, a number or a fraction of the depth.
    """

    floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    ceiling: Annotated[float, Field(gt=0, le=1)] = 1.0
    start: Annotated[LayerIndex, AfterValidator(check_layer_index)] = 1

    @model_validator(mode="after")
    def _check_bounds(self) -> "ScoreGap":
        if self.floor > self.ceiling:
            raise ValueError(f"the floor {self.floor} is above the ceiling {self.ceiling}")
        return self

    def cuts(self, layers: int, phase: Phase) -> dict[int, Keep]:
        """The one cut."""
        return {layer_number(self.start, layers, owner=self): GapKeep(ratio=self.ceiling, floor=self.floor)}
