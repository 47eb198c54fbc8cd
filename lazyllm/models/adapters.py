"""Adapters of peft: the model inside a wrapper, and which adapters its layers run with."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from itertools import chain
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from lazyllm.errors import UnsupportedModelError
from lazyllm.models.fingerprint import sample

WRAPPED = ("base_layer.", "original_module.")
"""Where an adapter keeps what it adapts."""


def unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """The transformers model inside a `PeftModel`, whose layers hold the adapters; any other model itself.

    Raises:
        UnsupportedModelError: when an adapter works outside the layers.
    """
    if not hasattr(model, "get_base_model"):
        return model
    configs = cast(Any, model).peft_config
    if prompts := [name for name, config in configs.items() if config.is_prompt_learning]:
        raise UnsupportedModelError(
            f"the adapter {prompts[0]!r} ({_kind(configs[prompts[0]])}) adds virtual tokens outside the layers, which "
            "lazyllm does not see; adapters inside the layers, such as LoRA, work"
        )
    return cast(PreTrainedModel, cast(Any, model).get_base_model())


def adapters_of(model: PreTrainedModel) -> str | None:
    """The adapters a model runs with, as names and a digest; None when there are none, or none is on.

    The digest goes by each layer's adapters, their strength and whether they are merged, and by some numbers of the
    last layer that has any.

    Raises:
        UnsupportedModelError: when an adapter does not work on packed steps.
    """
    configs = getattr(model, "peft_config", None)
    if not configs:
        return None
    layers = [(layer, names) for layer in _adapted(model) if (names := _names(layer))]
    names = list(dict.fromkeys(chain.from_iterable(names for _, names in layers)))
    if not names:
        return None
    _check(configs, names)
    digest = blake2b("\n".join(_describe(*layer) for layer in layers).encode(), digest_size=8)
    for name, parameter in layers[-1][0].named_parameters():
        if not name.startswith(WRAPPED):
            digest.update(sample(parameter))
    return f"{', '.join(names)} ({digest.hexdigest()})"


def _adapted(module: nn.Module) -> Iterator[Any]:
    """The modules that hold adapters; what is inside them is not looked at."""
    if isinstance(getattr(type(module), "active_adapters", None), property):
        yield module
        return
    for child in module.children():
        yield from _adapted(child)


def _names(layer: Any) -> list[str]:
    """Adapters of a layer that are on."""
    merged = list(getattr(layer, "merged_adapters", ()))
    return merged if layer.disable_adapters else [*merged, *layer.active_adapters]


def _describe(layer: Any, names: list[str]) -> str:
    strength = getattr(layer, "scaling", {})
    return f"{[(name, strength.get(name)) for name in names]} {getattr(layer, 'merged_adapters', ())}"


def _check(configs: dict[str, Any], names: list[str]) -> None:
    for name in names:
        config = configs.get(name)
        if getattr(config, "alora_invocation_tokens", None):
            raise UnsupportedModelError(
                f"the adapter {name!r} is on from an invocation sequence only, which packed rows do not show; "
                "adapters that are on for every token work"
            )
        if _kind(config) == "XLORA":
            raise UnsupportedModelError(f"the adapter {name!r} (XLORA) runs the model twice to mix its adapters")


def _kind(config: Any) -> str:
    kind = getattr(config, "peft_type", None)
    return str(getattr(kind, "value", kind))
