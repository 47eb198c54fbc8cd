"""Late interaction with the query, read from the model's own early states."""

from math import sqrt
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.linalg import vector_norm

from lazyllm.policies.base import ScoreContext, Scorer
from lazyllm.policies.pooling import OddWidths, max_over_neighbours
from lazyllm.policies.query import Query

TINY = 1e-12
"""Least length of a state that is divided by its length."""


class LateInteraction(Scorer):
    """How well a token's neighbourhood matches the query tokens, by the states of an early layer.

    Every hidden dimension is standardised over the context; each query token spreads a softmax of its standardised
    cosines over the context, so that rare matches count; `s_i = sum_w sum_q max_{|j-i| <= w//2} softmax_j z(cos(q, j))`
    over the pooling widths w: a match lifts its neighbours, near ones more.
    Needs one layer at most, no attention, and works on bare embeddings too. Costs `w * v * c`.
    Source: the MaxSim of Khattab and Zaharia 2020, ColBERT, arXiv 2004.12832, turned inside out: the context's tokens
    are ranked, and the model that reads them makes the features.

    Attributes:
        query: which tokens ask; a decode step asks with the last ones, reply included.
        pool: odd widths in visible tokens of the maximum over neighbours, one or several.
        temperature: divides the standardised cosines; lower trusts the best matches more.
    """

    needs_memory: ClassVar[bool] = True

    query: Query = "auto"
    pool: OddWidths = (33, 65, 129)
    temperature: Annotated[float, Field(gt=0)] = 1.0

    @property
    def reads_query(self) -> Query:
        """`query`."""
        return self.query

    def score(self, context: ScoreContext) -> Tensor:
        """Scores [v]; those of the query tokens are 0, the others sum to at least the number of query tokens."""
        asks = torch.isin(context.tokens, context.query)
        text = context.tokens[~asks]
        if not text.numel():
            return torch.zeros(context.tokens.numel())
        matches = soft_matches(context.states_of(text), context.states_of(context.query), self.temperature)
        widths = (self.pool,) if isinstance(self.pool, int) else self.pool
        pooled = sum((max_over_neighbours(matches, width).sum(0) for width in widths), matches.new_zeros(())).cpu()
        return torch.zeros(context.tokens.numel(), dtype=pooled.dtype).masked_scatter(~asks, pooled)


def soft_matches(text: Tensor, query: Tensor, temperature: float = 1.0) -> Tensor:
    """How the interest of each query token [w, c] spreads over the text [v, c]: [w, v], rows sum to 1."""
    text, query = (states.to(torch.promote_types(states.dtype, torch.float32)) for states in (text, query))
    mean = text.mean(0)
    centred = text - mean
    deviation = vector_norm(centred, dim=0) / sqrt(text.shape[0])
    deviation = deviation.clamp(min=torch.finfo(text.dtype).eps * (1 + mean.abs().max()))
    asked = torch.nn.functional.normalize((query - mean) / deviation, dim=-1) / deviation
    lengths = (centred.square() @ deviation**-2).sqrt().clamp(min=TINY)  # of the standardised text, never written down
    cosines = asked @ centred.T / lengths
    spread = cosines.std(-1, correction=0, keepdim=True).clamp(min=torch.finfo(text.dtype).eps)
    return torch.softmax((cosines - cosines.mean(-1, keepdim=True)) / spread / temperature, dim=-1)
