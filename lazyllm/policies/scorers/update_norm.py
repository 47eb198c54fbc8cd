"""Tokens that attention still changes."""

from typing import ClassVar

import torch
from torch import Tensor
from torch.linalg import vector_norm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lazyllm.errors import ConfigError
from lazyllm.models.families import contract_of
from lazyllm.policies.base import ScoreContext, Scorer


class UpdateNorm(Scorer):
    """How much a layer's attention has changed a token: those that it hardly changes may halt.

    `s_i = |u_i|_2`, u_i what the layer's attention module gives for token i, which is added to its state; or
    `|u_i|_2 / |h_i|_2`, h_i the state behind the layer. A token keeps the score it got when it was computed.
    Source: DASH, Delta Attention Selective Halting, arXiv 2604.18103.

    Attributes:
        relative: whether the update is measured against the state.
    """

    needs_attention: ClassVar[bool] = True
    needs_memory: ClassVar[bool] = True
    needs_update: ClassVar[bool] = True

    relative: bool = False

    @property
    def compares(self) -> int:
        """None."""
        return 0

    def check_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Refuses a model whose layers have no one module for attention."""
        contract = contract_of(model)
        if unknown := [layer for layer in range(len(contract.layers)) if contract.attention_of(layer) is None]:
            raise ConfigError(
                f"UpdateNorm reads what attention adds, but layer {unknown[0]} of {type(model).__name__} has no single "
                "attention module that knows its layer_idx; use a scorer that reads attention itself"
            )

    def remembered_values(self, hidden: int) -> int:
        """One."""
        return 1

    def features(self, states: Tensor, update: Tensor | None) -> Tensor:
        """Sizes [q, 1] of the updates."""
        assert update is not None, "updates are noted for a scorer that sets needs_update"
        size = _length(update)
        return size / _length(states).clamp(min=torch.finfo(size.dtype).tiny) if self.relative else size

    def score(self, context: ScoreContext) -> Tensor:
        """Scores [v] >= 0."""
        return context.states_of(context.tokens)[:, 0]


def _length(vectors: Tensor) -> Tensor:
    """Lengths [q, 1] of vectors [q, c]."""
    return vector_norm(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1, keepdim=True)
