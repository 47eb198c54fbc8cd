"""Several scorers at once."""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from lazyllm.policies.base import ScoreContext, Scorer
from lazyllm.policies.nested import AnyScorer
from lazyllm.policies.scorers.composed import ComposedScorer


def _pairs(scorers: Any) -> Any:
    return tuple(scorers.items()) if isinstance(scorers, Mapping) else scorers


class Combined(ComposedScorer):
    """Weighted sum of the scores of several scorers, each standardised over the visible tokens.

    `s = sum_k w_k (s_k - min s_k) / std(s_k)`: the order is that of z-scores, and no score is negative.

    Attributes:
        scorers: scorer and weight, as a mapping or as pairs.
    """

    scorers: Annotated[
        tuple[tuple[AnyScorer, Annotated[float, Field(gt=0)]], ...], BeforeValidator(_pairs), Field(min_length=1)
    ]

    @property
    def parts(self) -> tuple[Scorer, ...]:
        """Those of `scorers`."""
        return tuple(scorer for scorer, _ in self.scorers)

    def score(self, context: ScoreContext) -> Tensor:
        """Scores [v] >= 0."""
        return torch.stack(
            [weight * standardised(scorer.score(context).cpu().double()) for scorer, weight in self.scorers]
        ).sum(0)


def standardised(scores: Tensor) -> Tensor:
    """Scores [v] above their minimum, in standard deviations; zeros when all are equal."""
    above = scores - scores.min()
    deviation = scores.std(correction=0)
    return above / deviation if deviation > 0 else torch.zeros_like(scores)
