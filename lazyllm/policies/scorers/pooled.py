"""Neighbours of important tokens."""

from typing import Literal

from torch import Tensor

from lazyllm.policies.base import ScoreContext, Scorer
from lazyllm.policies.nested import AnyScorer
from lazyllm.policies.pooling import OddWidth, max_over_neighbours, mean_over_neighbours
from lazyllm.policies.scorers.composed import ComposedScorer


class Pooled(ComposedScorer):
    """Another scorer's scores, pooled over a centred window of visible tokens.

    Attributes:
        scorer: whose scores.
        width: odd width of the window in tokens.
        by: "max" or "mean".
    """

    scorer: AnyScorer
    width: OddWidth = 33
    by: Literal["max", "mean"] = "max"

    @property
    def parts(self) -> tuple[Scorer, ...]:
        """`scorer`."""
        return (self.scorer,)

    def score(self, context: ScoreContext) -> Tensor:
        """Scores [v]."""
        pool = max_over_neighbours if self.by == "max" else mean_over_neighbours
        return pool(self.scorer.score(context), self.width)
