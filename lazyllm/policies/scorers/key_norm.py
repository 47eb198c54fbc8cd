"""Keys alone."""

from typing import ClassVar

import torch
from einops import reduce
from torch import Tensor
from torch.linalg import vector_norm

from lazyllm.policies.base import ScoreContext, Scorer


class KeyNorm(Scorer):
    """Tokens with short keys stay: they tend to be the ones that are attended.

    `s_i = max_j n_j - n_i` with `n_i = mean_g |k[g, i]|_2`; no query is read.
    Source: Devoto et al. 2024, arXiv 2406.11430.
    """

    needs_attention: ClassVar[bool] = True

    @property
    def compares(self) -> int:
        """None."""
        return 0

    def score(self, context: ScoreContext) -> Tensor:
        """Scores [v] >= 0."""
        attention = context.layer_attention
        keys = attention.keys[:, attention.columns(context.tokens)]
        norms = vector_norm(keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1)
        norms = reduce(norms, "g v -> v", "mean")
        return norms.max() - norms
