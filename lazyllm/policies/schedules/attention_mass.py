"""As many tokens as the scores ask for."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from lazyllm.errors import PolicyError
from lazyllm.policies.base import Keep, LayerIndex, Phase, Schedule, check_layer_index, layer_number, tokens_of


@dataclass(frozen=True)
class MassKeep(Keep):
    """The smallest set of tokens that holds a share of the score, between a floor and `ratio`."""

    share: float
    floor: float
    power: float
    adapts: ClassVar[bool] = True

    def free_tokens(self, scores: Tensor, protected: int, context_tokens: int) -> int:
        """How many of the best tokens it takes; the protected ones count for floor and ceiling, not for the share."""
        if not scores.numel():  # every token is protected, or was dropped for good in an earlier step
            return 0
        if bool((scores < 0).any()):
            raise PolicyError(
                f"a share of the score needs scores that are not negative, got {float(scores.min()):.4g}; "
                "use a fixed keep ratio with this scorer"
            )
        ranked = scores.double().sort(descending=True).values
        mass = (ranked / ranked[0].clamp(min=torch.finfo(ranked.dtype).tiny)).pow(self.power).cumsum(0)
        needed = int(torch.searchsorted(mass, self.share * float(mass[-1]) * (1 - 1e-12))) + 1
        least = tokens_of(self.floor, context_tokens) - protected if self.floor else 0
        most = self.limit(context_tokens) - protected
        return max(0, min(max(needed, least), most, scores.numel()))

    def __str__(self) -> str:
        score = "the score" if self.power == 1 else f"the score to the power {self.power:.4g}"
        return f"{self.share:.4g} of {score}, {self.floor:.4g} to {self.ratio:.4g} of the context"


class AttentionMass(Schedule):
    """One cut that keeps the smallest set of tokens which holds `share` of the score, so that the prompt decides.

    Where the score is spread over many tokens, many are kept. Needs scores that are not negative. Protected tokens
    come on top of the set. With equal scores later tokens go first.

    Attributes:
        share: share of the score to keep, in (0, 1].
        floor: at least this fraction of the context enters, in [0, ceiling].
        ceiling: at most this fraction, in (0, 1].
        start: the layer the cut stands before, a number or a fraction of the depth.
        power: scores are raised to it before the share is taken, in (0, 8]. Above 1, fewer tokens are kept where some
            score much higher than the rest, and as many as before where all score alike.
    """

    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    floor: Annotated[float, Field(ge=0, le=1)] = 0.0
    ceiling: Annotated[float, Field(gt=0, le=1)] = 1.0
    start: Annotated[LayerIndex, AfterValidator(check_layer_index)] = 1
    power: Annotated[float, Field(gt=0, le=8)] = 1.0

    @model_validator(mode="after")
    def _check_bounds(self) -> "AttentionMass":
        if self.floor > self.ceiling:
            raise ValueError(f"the floor {self.floor} is above the ceiling {self.ceiling}")
        return self

    def cuts(self, layers: int, phase: Phase) -> dict[int, Keep]:
        """The one cut."""
        keep = MassKeep(ratio=self.ceiling, share=self.share, floor=self.floor, power=self.power)
        return {layer_number(self.start, layers, owner=self): keep}
