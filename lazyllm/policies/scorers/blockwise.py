"""Blocks that stay or go as a whole."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from lazyllm.errors import InputError
from lazyllm.policies.base import ScoreContext, Scorer
from lazyllm.policies.nested import AnyScorer
from lazyllm.policies.query import Unit
from lazyllm.policies.scorers.composed import ComposedScorer


class Blockwise(ComposedScorer):
    """Every token gets its block's score, so that lines, sentences or blocks of `size` tokens stay or go together.

    Only the last block that still fits may be cut, since a schedule's count is kept to the token.

    Attributes:
        scorer: whose scores.
        size: tokens per block, counted from the start of the context; or "line", "sentence" or "paragraph". Of a
            further turn that is given as token ids, the new tokens are one unit.
        by: "max" or "mean" of the block's visible tokens.
    """

    scorer: AnyScorer
    size: Annotated[int, Field(ge=1)] | Unit = 64
    by: Literal["max", "mean"] = "max"

    @property
    def parts(self) -> tuple[Scorer, ...]:
        """`scorer`."""
        return (self.scorer,)

    def score(self, context: ScoreContext) -> Tensor:
        """Scores [v].

        Raises:
            InputError: when blocks are units of a text that is not known.
        """
        scores = self.scorer.score(context).cpu()
        block = self._blocks(context)
        how: Literal["amax", "mean"] = "amax" if self.by == "max" else "mean"
        blocks = torch.zeros(int(block.max()) + 1, dtype=scores.dtype)
        return blocks.scatter_reduce(0, block, scores, reduce=how, include_self=False)[block]

    def _blocks(self, context: ScoreContext) -> Tensor:
        """Number [v] of the block that each visible token is in."""
        if isinstance(self.size, int):
            return context.tokens // self.size
        if self.size not in context.starts:
            raise InputError(
                f"blocks by {self.size} need a text prompt and a fast tokenizer; give the size as a number of tokens, "
                "or make the cache with new_cache(marks=[pipe.encode(prompt).marks])"
            )
        return torch.searchsorted(torch.tensor(context.starts[self.size]), context.tokens, right=True)
