"""Attention weighed by what it fetches."""

from typing import Annotated, ClassVar, Literal

from einops import reduce, repeat
from pydantic import Field
from torch import Tensor

from lazyllm.policies.base import ScoreContext, Scorer
from lazyllm.policies.pooling import OddWidth, max_over_neighbours


class ValueWeightedAttention(Scorer):
    """Attention of the last `window` new tokens, times the size of the value that it fetches.

    `s_i = max_{|j-i| <= pool//2} agg_h |v[h, j]|_1 mean_q A[h, q, j]`: sinks, whose values are small, lose their lead.
    Source: Guo et al. 2024, VATP, arXiv 2406.12335.

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
        """Scores [v] >= 0."""
        attention = context.layer_attention
        probabilities = reduce(context.over_visible(attention, self.window), "h q v -> h v", "mean")
        sizes = attention.values[:, attention.columns(context.tokens)].to(probabilities.dtype).abs().sum(-1)
        sizes = repeat(sizes, "g v -> (g n) v", n=probabilities.shape[0] // sizes.shape[0])
        return max_over_neighbours(reduce(probabilities * sizes, "h v -> v", self.heads), self.pool)
