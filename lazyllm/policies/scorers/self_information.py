"""What a language model does not expect."""

from torch import Tensor

from lazyllm.errors import InputError
from lazyllm.policies.base import ScoreContext, Scorer


class SelfInformation(Scorer):
    """Tokens that a language model does not expect stay: prompt compression.

    `s_i = -log p(i | tokens before i)`, in nats. Reads the whole context with a model, dense, whenever it is asked,
    which costs more than it saves unless that model is much smaller; its work is counted in `stats.reading_flops`.
    Source: Li et al. 2023, Selective Context, arXiv 2310.06201: "prompt compression" in arXiv 2407.14057, Table 1.

    Attributes:
        model: path or hub id of a model with the same tokenizer; None = the model that is run.
    """

    model: str | None = None

    @property
    def reads_models(self) -> tuple[str | None, ...]:
        """`model`."""
        return (self.model,)

    def score(self, context: ScoreContext) -> Tensor:
        """Scores [v] >= 0.

        Raises:
            InputError: when the model was given embeddings instead of token ids.
        """
        if context.token_ids is None:
            raise InputError("SelfInformation reads token ids, but the model was given inputs_embeds; give input_ids")
        return context.reads[self.model].surprise(context.token_ids)[context.tokens]
