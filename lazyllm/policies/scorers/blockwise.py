"""Blocks that stay or go as a whole."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from lazyllm.policies.base import ScoreContext, Scorer
from lazyllm.policies.nested import AnyScorer
from lazyllm.policies.scorers.composed import ComposedScorer


class Blockwise(ComposedScorer):
    """Every token gets its block's score, so that blocks of `size` tokens stay or go together.

    Only the last block that still fits may be cut, since a schedule's count is kept to the token.

    Attributes:
        scorer: whose scores.
        size: tokens per block, counted from the start of the context.
        by: "max" or "mean" of the block's visible tokens.
    """

    scorer: AnyScorer
    size: Annotated[int, Field(ge=1)] = 64
    by: Literal["max", "mean"] = "max"

    @property
    def parts(self) -> tuple[Scorer, ...]:
        """`scorer`."""
        return (self.scorer,)

    def score(self, context: ScoreContext) -> Tensor:
        """Scores [v]."""
        scores = self.scorer.score(context).cpu()
        block = context.tokens // self.size
        how: Literal["amax", "mean"] = "amax" if self.by == "max" else "mean"
        blocks = torch.zeros(int(block.max()) + 1, dtype=scores.dtype)
        return blocks.scatter_reduce(0, block, scores, reduce=how, include_self=False)[block]
