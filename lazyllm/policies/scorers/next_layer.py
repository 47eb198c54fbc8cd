"""Attention of the layer that tokens are chosen for."""

from typing import Annotated, ClassVar, Literal

from einops import reduce
from pydantic import Field
from torch import Tensor

from lazyllm.policies.base import ScoreContext, Scorer
from lazyllm.policies.pooling import OddWidth, max_over_neighbours


class NextLayerAttention(Scorer):
    """Attention of the last `window` new tokens by the next layer's own queries and keys, which no earlier layer has.

    `s_i = max_{|j-i| <= pool//2} agg_h mean_q A_{l+1}[h, q, j]`. The next layer projects all visible tokens once for
    the score and the chosen ones again when it runs: about a tenth of a layer, which is not counted as computed.
    Source: SPTS, arXiv 2601.13155: scores of the layer before are stale.

    Attributes:
        window: number of queries at the end of the prompt; a decode step has one.
        heads: how heads are joined, "mean" or "max".
        pool: odd width in visible tokens of the maximum over neighbours; 1 = none.
    """

    needs_next: ClassVar[bool] = True

    window: Annotated[int, Field(ge=1)] = 32
    heads: Literal["mean", "max"] = "mean"
    pool: OddWidth = 1

    @property
    def compares(self) -> int:
        """`window`."""
        return self.window

    def score(self, context: ScoreContext) -> Tensor:
        """Scores [v]."""
        assert context.read_next is not None, "tokens are chosen for a layer that exists"
        probabilities = context.over_visible(context.read_next(), self.window)
        scores = reduce(reduce(probabilities, "h q v -> h v", "mean"), "h v -> v", self.heads)
        return max_over_neighbours(scores, self.pool)
