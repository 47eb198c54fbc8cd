"""The paper's scorer."""

from typing import ClassVar

from torch import Tensor

from lazyllm.policies.base import ScoreContext, Scorer


class LastTokenAttention(Scorer):
    """Attention that the last token pays to each token, mean over heads.

    `s_i = (1/H) sum_h A[h, i, N]` with N the last token of the context.
    Source: Fu et al. 2024, LazyLLM, arXiv 2407.14057, Eq. 1.
    """

    needs_attention: ClassVar[bool] = True

    def score(self, context: ScoreContext) -> Tensor:
        """Scores [v]; they sum to at most 1."""
        return context.attention_to_visible(queries=1).mean(dim=(0, 1))
