"""Floating-point operations of a step, counted from the layers' own weights; no code per family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lazyllm.models.families import DecoderContract


@dataclass(frozen=True)
class FlopModel:
    """Cost of one token in one layer, of one query-key pair, and of one row of logits.

    Attributes:
        per_token: by layer, multiply-adds x 2 of the weights a token passes through.
        per_pair: by layer, operations per attended (query, key) pair.
        per_logits: operations of the LM head for one position.
    """

    per_token: tuple[int, ...]
    per_pair: tuple[int, ...]
    per_logits: int

    def attention(self, layer: int, pairs: int) -> int:
        """Operations of attention over `pairs` (query, key) pairs."""
        return self.per_pair[layer] * pairs

    def total(self, tokens: Sequence[int], pairs: Sequence[int]) -> int:
        """Operations of the layers, given by layer the computed tokens and the attended pairs; logits not included."""
        return sum(
            per_token * count + self.attention(layer, pair_count)
            for layer, (per_token, count, pair_count) in enumerate(zip(self.per_token, tokens, pairs, strict=True))
        )


def flop_model(model: PreTrainedModel, contract: DecoderContract) -> FlopModel:
    """Reads the costs off a model's weights; of a mixture of experts, only the experts a token visits count."""
    config: Any = model.config.get_text_config(decoder=True)
    head = model.get_output_embeddings()
    return FlopModel(
        per_token=tuple(2 * active_weights(layer, config) for layer in contract.layers),
        per_pair=tuple(4 * _query_width(layer) for layer in config.per_layer_config[: len(contract.layers)]),
        per_logits=2 * sum(weight.numel() for weight in head.parameters()) if head is not None else 0,
    )


def _query_width(config: Any) -> int:
    """Numbers in the queries of one token, over all heads, in a layer with this configuration."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_attention_heads * head_dim)


def active_weights(layer: nn.Module, config: Any) -> int:
    """Entries of all weight matrices a token is multiplied with; stacked experts count as far as they are visited.

    A linear layer counts by its inputs and outputs, in whatever form its weights are packed.
    """
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    visited = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None)
    share = visited / experts if visited and experts else 1
    linear = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    counted = {id(weight) for module in linear for weight in module.parameters(recurse=False)}
    total = sum(module.in_features * module.out_features for module in linear)
    for weight in layer.parameters():
        if id(weight) in counted:
            continue
        if weight.ndim == 2:
            total += weight.numel()
        elif weight.ndim == 3:
            total += int(weight.numel() * share)
    return total


def causal_pairs(tokens: int, window: int | None) -> int:
    """Pairs (query, key) of causal attention over `tokens` tokens."""
    if window is None or tokens <= window:
        return tokens * (tokens + 1) // 2
    return window * (window + 1) // 2 + (tokens - window) * window
