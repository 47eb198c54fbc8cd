"""The evenly spaced baseline."""

import torch
from torch import Tensor

from lazyllm.policies.base import ScoreContext, Scorer

_BITS = 32


class Uniform(Scorer):
    """Keeps evenly spaced tokens, whatever they say.

    The score is the token's index with its bits reversed, as a fraction: the kept half is every second token, the kept
    quarter every fourth, and what a deeper layer keeps is a part of what an earlier one kept.
    Source: van der Corput 1935, the sequence in base 2.
    """

    def score(self, context: ScoreContext) -> Tensor:
        """Scores [v] in (0, 1]."""
        reversed_bits = torch.zeros_like(context.tokens)
        for bit in range(_BITS):
            reversed_bits |= ((context.tokens >> bit) & 1) << (_BITS - 1 - bit)
        return 1 - reversed_bits.to(torch.float64) / 2**_BITS
