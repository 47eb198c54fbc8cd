"""What the first findings ask for in turn."""

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from lazyllm.policies.base import ScoreContext, Scorer, stable_top
from lazyllm.policies.nested import AnyScorer
from lazyllm.policies.scorers.composed import ComposedScorer


class TwoHop(ComposedScorer):
    """The best tokens of a first hop are the query of a second one: `s = s1 + weight * s2`, each divided by its sum.

    For questions whose answer stands in a passage that only another passage leads to.

    Attributes:
        scorer: a scorer with a query.
        tokens: how many of the best tokens ask in the second hop.
        weight: of the second hop.
    """

    scorer: AnyScorer
    tokens: Annotated[int, Field(ge=1)] = 128
    weight: Annotated[float, Field(ge=0)] = 0.25

    @property
    def parts(self) -> tuple[Scorer, ...]:
        """`scorer`."""
        return (self.scorer,)

    @property
    def compares(self) -> int:
        """Those of the first hop, and the tokens it found."""
        return self.scorer.compares + self.tokens

    def score(self, context: ScoreContext) -> Tensor:
        """Scores [v]."""
        first = share_of_sum(self.scorer.score(context).cpu())
        found = context.tokens[stable_top(first, self.tokens)].sort().values
        second = share_of_sum(self.scorer.score(replace(context, query=found)).cpu())
        second[torch.isin(context.tokens, found)] = second.max()
        return first + self.weight * share_of_sum(second)


def share_of_sum(scores: Tensor) -> Tensor:
    """Scores [v] divided by their sum."""
    return scores / scores.sum().clamp(min=torch.finfo(scores.dtype).tiny)
