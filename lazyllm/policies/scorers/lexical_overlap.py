"""Words the query and the context share."""

import torch
from torch import Tensor

from lazyllm.errors import InputError
from lazyllm.policies.base import ScoreContext, Scorer
from lazyllm.policies.pooling import OddWidth, mean_over_neighbours
from lazyllm.policies.query import Query


class LexicalOverlap(Scorer):
    """How many of the query's tokens stand nearby, rare ones counting more.

    `s_i = mean_{|j-i| <= pool//2} idf(j) [token j occurs in the query]`, with `idf(j) = log(N / n_j)`, N visible
    tokens and n_j among them equal to j. Reads token ids alone, so it can prune before the first layer.
    Source: inverse document frequency, Sparck Jones 1972.

    Attributes:
        query: which tokens ask.
        pool: odd width in visible tokens of the mean over neighbours; 1 = none.
    """

    query: Query = "auto"
    pool: OddWidth = 65

    @property
    def reads_query(self) -> Query:
        """`query`."""
        return self.query

    def score(self, context: ScoreContext) -> Tensor:
        """Scores [v] >= 0; those of the query tokens are 0.

        Raises:
            InputError: when the model was given embeddings instead of token ids.
        """
        if context.token_ids is None:
            raise InputError("LexicalOverlap compares token ids, but the model was given inputs_embeds; give input_ids")
        asks = torch.isin(context.tokens, context.query)
        ids = context.token_ids[context.tokens[~asks]]
        scores = torch.zeros(context.tokens.numel())
        if ids.numel():
            _, which, count = ids.unique(return_inverse=True, return_counts=True)
            rarity = torch.log(ids.numel() / count.float())[which]
            shared = torch.isin(ids, context.token_ids[context.query])
            scores[~asks] = mean_over_neighbours(rarity * shared, self.pool)
        return scores
