"""Tiny random models for the kit, and the rule that they stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lazyllm.errors import ConfigError
from lazyllm.testing.rules import require

LEAST_LAYERS = 4
VOCABULARY = 96
KINDS: dict[str, dict[str, Any]] = {"llama": {}, "mistral": {"sliding_window": 9}}
"""By family, what differs: one attends to everything, the other through a window that is shorter than the prompts."""
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_models(layers: int) -> list[PreTrainedModel]:
    """One random float64 model of each kind, with that many layers.

    Raises:
        ConfigError: for fewer layers than the kit's schedules cut before.
    """
    if layers < LEAST_LAYERS:
        raise ConfigError(f"the kit's models have {LEAST_LAYERS} layers or more, not {layers}")
    return [tiny_model(kind, layers) for kind in KINDS]


@cache
def tiny_model(kind: str, layers: int) -> PreTrainedModel:
    """A random float64 model; made once, and the same in every process. Leaves torch's own generator alone."""
    config = AutoConfig.for_model(kind, **_SIZES, **KINDS[kind], num_hidden_layers=layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="sdpa")
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.25)
    return model.requires_grad_(False).eval()


@contextmanager
def untouched(model: PreTrainedModel, policy: object) -> Iterator[None]:
    """The rule "untouched"; not asked where something raises, since that is reported by itself."""
    before = _parts(model)
    yield
    for (name, was), (_, now) in zip(before, _parts(model), strict=True):
        same = torch.equal(was, now) if isinstance(was, torch.Tensor) else was == now
        require(same, "untouched", policy, f"{name} of {type(model).__name__} has changed")


def _parts(model: PreTrainedModel) -> list[tuple[str, Any]]:
    """What must not change: modules, hooks, modes, the attention implementation, and weights."""
    decoder: Any = model.get_decoder()
    hooks = ("_forward_pre_hooks", "_forward_hooks")
    modules = [
        (id(module), module.training, [sorted(getattr(module, kind)) for kind in hooks]) for module in model.modules()
    ]
    return [
        ("the layers", [id(layer) for layer in decoder.layers]),
        ("the attention implementation", model.config._attn_implementation),
        ("a module, its mode or its hooks", modules),
        *((f"the weight {name}", weight.clone()) for name, weight in model.named_parameters()),
    ]
