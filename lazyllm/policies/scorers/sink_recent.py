"""The recency baseline."""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from lazyllm.policies.base import ScoreContext, Scorer


class SinkRecent(Scorer):
    """Keeps the first `sinks` tokens and the most recent ones.

    Source: Xiao et al. 2023, StreamingLLM, arXiv 2309.17453.
    """

    sinks: Annotated[int, Field(ge=0)] = 4

    def score(self, context: ScoreContext) -> Tensor:
        """Scores [v]: the later the higher, sinks above all."""
        scores = context.tokens.to(torch.float64)
        return torch.where(context.tokens < self.sinks, scores + context.context_tokens, scores)
