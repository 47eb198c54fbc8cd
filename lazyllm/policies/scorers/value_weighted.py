"""Attention weighed by what it fetches."""

from typing import ClassVar

from einops import reduce, repeat
from torch import Tensor

from lazyllm.policies.base import ScoreContext
from lazyllm.policies.scorers.windowed import WindowedScorer


class ValueWeightedAttention(WindowedScorer):
    """Attention of the last `window` new tokens, times the size of the value that it fetches.

    `s_i = max_{|j-i| <= pool//2} agg_h |v[h, j]|_1 mean_q A[h, q, j]`: sinks, whose values are small, lose their lead.
    Source: Guo et al. 2024, VATP, arXiv 2406.12335.

    Attributes:
        window, heads, pool: as in `WindowedScorer`.
    """

    needs_attention: ClassVar[bool] = True

    def attended(self, context: ScoreContext) -> Tensor:
        """Mean attention [h, v] of the window's queries, times the sizes of values."""
        attention = context.layer_attention
        probabilities = reduce(context.over_visible(attention, self.window), "h q v -> h v", "mean")
        sizes = attention.values[:, attention.columns(context.tokens)].to(probabilities.dtype).abs().sum(-1)
        return probabilities * repeat(sizes, "g v -> (g n) v", n=probabilities.shape[0] // sizes.shape[0])
