"""Attention of an observation window."""

from typing import Annotated, ClassVar, Literal

from einops import reduce
from pydantic import Field
from torch import Tensor

from lazyllm.policies.base import ScoreContext, Scorer
from lazyllm.policies.pooling import OddWidth, max_over_neighbours


class WindowAttention(Scorer):
    """Attention that the last `window` new tokens pay to each token, pooled over neighbours.

    `s_i = max_{|j-i| <= pool//2} agg_h mean_q A[h, q, j]`.
    Source: the observation window of Li et al. 2024, SnapKV, arXiv 2404.14469.

    Attributes:
        window: number of queries at the end of the prompt; a decode step has one.
        heads: how heads are joined, "mean" or "max".
        pool: odd width in visible tokens of the maximum over neighbours; 1 = none.
    """

    needs_attention: ClassVar[bool] = True

    window: Annotated[int, Field(ge=1)] = 32
    heads: Literal["mean", "max"] = "mean"
    pool: OddWidth = 1

    @property
    def compares(self) -> int:
        """`window`."""
        return self.window

    def score(self, context: ScoreContext) -> Tensor:
        """Scores [v]."""
        probabilities = context.attention_to_visible(queries=self.window)
        scores = reduce(reduce(probabilities, "h q v -> h v", "mean"), "h v -> v", self.heads)
        return max_over_neighbours(scores, self.pool)
