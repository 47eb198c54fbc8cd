"""Heavy hitters."""

from typing import Annotated, ClassVar, Literal

from einops import reduce
from pydantic import Field
from torch import Tensor

from lazyllm.models.attention import AttentionInputs
from lazyllm.policies.base import ScoreContext, Scorer


class AccumulatedAttention(Scorer):
    """Attention that a token has received so far, summed over the queries of all steps: the heavy hitters.

    `s_i = sum_q agg_h A[h, q, i]` over all queries q, of the prompt and of the reply, that attended at this layer while
    i was stored there. Costs as many pairs as the layer's attention itself, in blocks of queries; `window` bounds it.
    A crop takes tokens out, but not what they had added to the others.
    Source: Zhang et al. 2023, H2O, arXiv 2306.14048.

    Attributes:
        window: only so many of the last queries of each step count; None = all.
        heads: how heads are joined, "mean" or "max".
    """

    needs_attention: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True

    window: Annotated[int, Field(ge=1)] | None = None
    heads: Literal["mean", "max"] = "mean"

    def observe(self, attention: AttentionInputs) -> Tensor:
        """Attention received [k] in one step."""
        return reduce(attention.received(self.window), "h k -> k", self.heads)

    def score(self, context: ScoreContext) -> Tensor:
        """Scores [v] >= 0."""
        return context.tallied()
