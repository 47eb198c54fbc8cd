"""The upper bound by which scorers are judged."""

from typing import Annotated, Literal

import torch
from einops import reduce
from pydantic import Field
from torch import Tensor

from lazyllm.errors import InputError
from lazyllm.policies.base import ScoreContext, Scorer
from lazyllm.policies.scorers.draft_model import joined


class Oracle(Scorer):
    """Attention that the tokens of a known answer pay to the prompt: what a scorer could know at best.

    `s_i = mean_q agg_{l, h} A[l, h, q, i]`, q the answer's tokens, read by the dense model behind the prompt. To judge
    other scorers by; whoever knows the answer need not ask.
    Source: answer attention as the oracle of CLAA, arXiv 2602.16054.

    Attributes:
        answer: the answer as text, or as token ids.
        across: layers and heads are joined by "max" or "mean".
    """

    answer: Annotated[str, Field(min_length=1)] | Annotated[tuple[int, ...], Field(min_length=1)]
    across: Literal["max", "mean"] = "mean"

    @property
    def reads_models(self) -> tuple[str | None, ...]:
        """The model that is run."""
        return (None,)

    def score(self, context: ScoreContext) -> Tensor:
        """Scores [v] in [0, 1].

        Raises:
            InputError: when the model was given embeddings instead of token ids.
        """
        if context.token_ids is None:
            raise InputError("Oracle reads token ids, but the model was given inputs_embeds; give input_ids")
        reader, ids = context.reads[None], context.token_ids
        answer = reader.encode(self.answer) if isinstance(self.answer, str) else ids.new_tensor(self.answer)
        layers = reader.attention(torch.cat([ids, answer]), queries=answer.numel())
        return reduce(joined(layers, self.across), "q t -> t", "mean")[context.tokens]
