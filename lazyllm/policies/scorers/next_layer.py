"""Attention of the layer that tokens are chosen for."""

from typing import ClassVar

from einops import reduce
from torch import Tensor

from lazyllm.policies.base import ScoreContext
from lazyllm.policies.scorers.windowed import WindowedScorer


class NextLayerAttention(WindowedScorer):
    """Attention of the last `window` new tokens by the next layer's own queries and keys, which no earlier layer has.

    `s_i = max_{|j-i| <= pool//2} agg_h mean_q A_{l+1}[h, q, j]`. The next layer projects all visible tokens once for
    the score and the chosen ones again when it runs: about a tenth of a layer, which is not counted as computed.
    Source: SPTS, arXiv 2601.13155: scores of the layer before are stale.

    Attributes:
        window, heads, pool: as in `WindowedScorer`.
    """

    needs_next: ClassVar[bool] = True

    def attended(self, context: ScoreContext) -> Tensor:
        """Mean attention [h, v] of the window's queries at the next layer."""
        assert context.read_next is not None, "tokens are chosen for a layer that exists"
        return reduce(context.over_visible(context.read_next(), self.window), "h q v -> h v", "mean")
