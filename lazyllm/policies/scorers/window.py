"""Attention of an observation window."""

from typing import ClassVar

from einops import reduce
from torch import Tensor

from lazyllm.policies.base import ScoreContext
from lazyllm.policies.scorers.windowed import WindowedScorer


class WindowAttention(WindowedScorer):
    """Attention that the last `window` new tokens pay to each token, pooled over neighbours.

    `s_i = max_{|j-i| <= pool//2} agg_h mean_q A[h, q, j]`.
    Source: the observation window of Li et al. 2024, SnapKV, arXiv 2404.14469.

    Attributes:
        window, heads, pool: as in `WindowedScorer`.
    """

    needs_attention: ClassVar[bool] = True

    def attended(self, context: ScoreContext) -> Tensor:
        """Mean attention [h, v] of the window's queries."""
        return reduce(context.attention_to_visible(queries=self.window), "h q v -> h v", "mean")
