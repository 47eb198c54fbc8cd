"""The random baseline."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from lazyllm.policies.base import ScoreContext, Scorer

_MIX = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35)
_WORD = 0xFFFFFFFF


class Random(Scorer):
    """A fixed random order of the tokens: the paper's random token drop.

    The score depends on `seed` and the token alone, so a token that is dropped at one layer or step
    is the first to be dropped at the next.
    Source: baseline of Fu et al. 2024, arXiv 2407.14057, Table 1.
    """

    seed: Annotated[int, Field(ge=0, le=_WORD)] = 0

    def score(self, context: ScoreContext) -> Tensor:
        """Scores [v] in [0, 1)."""
        mixed = ((context.tokens + 1) * _MIX[0] + self.seed * _MIX[1]) & _WORD
        for shift, factor in ((16, _MIX[1]), (13, _MIX[2])):
            mixed = ((mixed ^ (mixed >> shift)) * factor) & _WORD
        return (mixed ^ (mixed >> 16)).to(torch.float64) / (_WORD + 1)
