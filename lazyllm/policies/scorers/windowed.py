"""What scorers by the attention of an observation window share."""

from typing import Annotated, Literal

from einops import reduce
from pydantic import Field
from torch import Tensor

from lazyllm.policies.base import ScoreContext, Scorer
from lazyllm.policies.pooling import OddWidth, max_over_neighbours


class WindowedScorer(Scorer):
    """Base of scorers by what the last `window` new tokens attend to; subclasses say in `attended` what that is.

    `s_i = max_{|j-i| <= pool//2} agg_h a[h, j]`.

    Attributes:
        window: number of queries at the end of the prompt; a decode step has one.
        heads: how heads are joined, "mean" or "max".
        pool: odd width in visible tokens of the maximum over neighbours; 1 = none.
    """

    window: Annotated[int, Field(ge=1)] = 32
    heads: Literal["mean", "max"] = "mean"
    pool: OddWidth = 1

    @property
    def compares(self) -> int:
        """`window`."""
        return self.window

    def attended(self, context: ScoreContext) -> Tensor:
        """By head, how much each visible token is attended to [h, v]."""
        raise NotImplementedError

    def score(self, context: ScoreContext) -> Tensor:
        """Scores [v]."""
        return max_over_neighbours(reduce(self.attended(context), "h v -> v", self.heads), self.pool)
