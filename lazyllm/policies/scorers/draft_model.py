"""Another model, or the first layers of the same one, chooses."""

from typing import Annotated, Literal

import torch
from einops import reduce
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lazyllm.errors import ConfigError, InputError
from lazyllm.policies.base import LayerIndex, ScoreContext, Scorer, check_layer_index


class DraftModel(Scorer):
    """Attention of a draft model: of the last token, and of the tokens it would go on with.

    `s_i = mean_q agg_{l, h} A[l, h, q, i]`, q the last token and the `look_ahead - 1` tokens of the draft's greedy
    continuation. Reads token ids alone, so it can prune before layer 0. The draft reads the whole context, dense,
    whenever it is asked; its work is counted in `stats.reading_flops`. With `layers` only its first layers run, and
    with `model=None` they are the model's own: the chosen tokens are then computed from layer 0 again.
    Source: SpecPrefill (draft model, look-ahead, maximum over layers and heads); Shi et al. 2024, GemFilter,
    arXiv 2409.17422 (the model's own early layers, mean over heads of one layer).

    Attributes:
        model: path or hub id of a model with the same tokenizer; None = the model that is run.
        layers: how many of its first layers run, a number or a fraction of the depth; None = all.
        look_ahead: how many tokens ask, the last one and those of the continuation; more than 1 needs all layers.
        across: layers and heads are joined by "max" or "mean"; "last" takes the mean over heads of the last layer run.
    """

    model: str | None = None
    layers: Annotated[LayerIndex, AfterValidator(check_layer_index)] | None = None
    look_ahead: Annotated[int, Field(ge=1)] = 1
    across: Literal["max", "mean", "last"] = "max"

    @model_validator(mode="after")
    def _check_layers(self) -> "DraftModel":
        if self.layers == 0:
            raise ValueError("a draft runs at least one layer, not 0")
        if self.layers is not None and self.look_ahead > 1:
            raise ValueError(
                f"looking ahead {self.look_ahead} tokens needs the whole draft model, not {self.layers} of its layers"
            )
        return self

    @property
    def reads_models(self) -> tuple[str | None, ...]:
        """`model`."""
        return (self.model,)

    def check_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Refuses to run more layers than the model has."""
        has = model.config.get_text_config(decoder=True).num_hidden_layers
        if self.model is None and isinstance(self.layers, int) and self.layers > has:
            raise ConfigError(f"{self}: the model has {has} layers, of which {self.layers} cannot run")

    def score(self, context: ScoreContext) -> Tensor:
        """Scores [v] in [0, 1].

        Raises:
            InputError: when the model was given embeddings instead of token ids.
        """
        if context.token_ids is None:
            raise InputError("DraftModel reads token ids, but the model was given inputs_embeds; give input_ids")
        draft, ids = context.reads[self.model], context.token_ids
        if self.look_ahead > 1:
            layers = draft.look_ahead(ids, tokens=self.look_ahead)
        else:
            layers = draft.attention(ids, queries=1, layers=self.layers)
        return reduce(joined(layers, self.across), "q t -> t", "mean")[context.tokens]


def joined(layers: list[Tensor], across: Literal["max", "mean", "last"]) -> Tensor:
    """Attention [q, t] joined over layers and heads, given by layer as [h, q, t]."""
    if across == "last":
        return reduce(layers[-1], "h q t -> q t", "mean").cpu()
    return reduce(torch.stack([layer.cpu() for layer in layers]), "l h q t -> q t", across)
