"""What a model must offer, checked on the model itself and not on a list of names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import __version__ as VERSION
from transformers.cache_utils import get_layer_types_and_kwargs

from lazyllm.errors import AttachError, UnsupportedModelError
from lazyllm.models.adapters import adapters_of
from lazyllm.models.attention import ATTENTION_NAME, KERNELS, AttentionPlan, Captured, RowPlan
from lazyllm.models.masks import EVERYTHING
from lazyllm.models.names import CACHE
from lazyllm.models.ranks import ALONE, Ranks, ranks_of

LAYER_ARGUMENTS = ("attention_mask", "position_ids", CACHE, "position_embeddings")
DECODER_ARGUMENTS = {"input_ids", "inputs_embeds", "cache_position", *LAYER_ARGUMENTS}
ATTENDING_TYPES = ("full_attention", "sliding_attention")
_ONE_ROPE = "every layer"


@dataclass(frozen=True)
class DecoderContract:
    """The parts of a decoder that lazyllm uses.

    Attributes:
        decoder: the module whose `layers` are swapped.
        layers: the original layers.
        kernel: attention implementation the model was loaded with.
        windows: by layer, the sliding window in positions, None = full attention.
        rope_types: by layer, which of the decoder's RoPEs it takes.
        devices: by layer, where it runs.
        max_positions: longest context the model was made for, None = unknown.
        calls: what runs: `forward` of every layer and of its parts. Other code or other parts are another contract.
        ranks: the processes that share the heads.
        adapters: the adapters the layers run with, None = none.
        extras: arguments of the decoder that it may use between its layers.
    """

    decoder: nn.Module
    layers: nn.ModuleList
    kernel: str
    windows: tuple[int | None, ...]
    rope_types: tuple[str, ...]
    devices: tuple[torch.device, ...]
    max_positions: int | None
    calls: tuple[Callable[..., Any], ...]
    ranks: Ranks
    adapters: str | None
    extras: tuple[str, ...]

    @cached_property
    def configs(self) -> list[Any]:
        """The configurations in which the decoder's modules look up their attention implementation."""
        found = {id(config): config for module in self.decoder.modules() if (config := _config(module)) is not None}
        return list(found.values())

    def attention_of(self, layer: int) -> nn.Module | None:
        """The module of a layer that attends: the one that knows its layer's number, as the cache asks of it."""
        found = [module for module in self.layers[layer].modules() if hasattr(module, "layer_idx")]
        attending = [module for module in found if module is not self.layers[layer]]
        return attending[0] if len(attending) == 1 else None

    def to_layer(self, value: Any, layer: int) -> Any:
        """Tensor, or tuple of tensors, on the device of `layer`."""
        if isinstance(value, tuple):
            return tuple(self.to_layer(part, layer) for part in value)
        return value.to(self.devices[layer])

    def rope(self, hidden: Tensor, positions: Tensor) -> dict[str, Any]:
        """RoPE for positions [1, t], or [3, 1, t] along three axes, by RoPE type: what the decoder gives its layers."""
        rotary = cast(nn.Module, self.decoder.rotary_emb)
        if self.rope_types[0] == _ONE_ROPE:
            return {_ONE_ROPE: rotary(hidden, position_ids=positions)}
        return {name: rotary(hidden, positions, name) for name in set(self.rope_types)}


def contract_of(model: PreTrainedModel, *, known: DecoderContract | None = None) -> DecoderContract:
    """Reads the contract off a model; `known`, read before, is given back when it still holds.

    Raises:
        UnsupportedModelError: when a part is missing, naming the model and the part.
        AttachError: when the model runs under a LazyStack already.
    """
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; lazyllm prunes decoder-only models")
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise UnsupportedModelError(f"{name} does not keep its decoder layers in a ModuleList called 'layers'")
    if any(hasattr(layer, "selector") for layer in layers):
        raise AttachError(f"this {name} is attached already; leave the other attached() or generate() first")
    calls = tuple(part.forward for layer in layers for part in (layer, *layer.children()))
    if known is None or known.calls != calls:
        _check_layer_calls(name, layers)
    if not hasattr(decoder, "rotary_emb"):
        raise UnsupportedModelError(
            f"{name} has no decoder-level 'rotary_emb': its positions are decided where pruning cannot follow"
        )
    types, extra = get_layer_types_and_kwargs(config)
    if strange := sorted(set(types) - set(ATTENDING_TYPES)):
        raise UnsupportedModelError(
            f"{name} has layers of type {', '.join(strange)}; only {' and '.join(ATTENDING_TYPES)} layers keep "
            "one key and value per token"
        )
    kernel = config._attn_implementation
    if kernel not in KERNELS:
        raise UnsupportedModelError(f"{name} runs on attention {kernel!r}; load it with one of {', '.join(KERNELS)}")
    takes_type = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters
    contract = DecoderContract(
        decoder=decoder,
        layers=layers,
        kernel=kernel,
        windows=tuple(options.get("sliding_window") for options in extra),
        rope_types=tuple(types) if takes_type else (_ONE_ROPE,) * len(layers),
        devices=tuple(_device(layer) for layer in layers),
        max_positions=getattr(config, "max_position_embeddings", None),
        calls=calls,
        ranks=ranks_of(model, config),
        adapters=adapters_of(model),
        extras=tuple(sorted(inspect.signature(decoder.forward).parameters.keys() - DECODER_ARGUMENTS)),
    )
    if known is not None and known == contract:
        return known
    _check_weights(name, model, contract.ranks)
    return contract


def _check_weights(name: str, model: PreTrainedModel, ranks: Ranks) -> None:
    for parameter in model.parameters():
        if parameter.is_meta and not hasattr(model, "_hf_hook"):
            raise UnsupportedModelError(f"this {name} is on the meta device: it has no weights to run")
        if hasattr(parameter, "device_mesh") and ranks is ALONE:
            raise UnsupportedModelError(
                f"this {name} is spread over processes by something other than transformers' tensor parallelism; "
                "load it with distributed_config=DistributedConfig(tp_size=...)"
            )


def _config(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    return config if hasattr(config, "_attn_implementation_internal") else None


def _check_layer_calls(name: str, layers: nn.ModuleList) -> None:
    for layer in layers:
        parameters = inspect.signature(layer.forward).parameters
        if missing := [argument for argument in LAYER_ARGUMENTS if argument not in parameters]:
            fault = f"its {type(layer).__name__} does not take {', '.join(missing)} (transformers {VERSION})"
            raise UnsupportedModelError(f"{name}: {fault}")
        required = [
            parameter.name
            for parameter in parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ]
        if extra := set(required[1:]) - set(LAYER_ARGUMENTS):
            raise UnsupportedModelError(
                f"{name}: its {type(layer).__name__} needs {', '.join(sorted(extra))}, which lazyllm cannot make"
            )


def _device(module: nn.Module) -> torch.device:
    """Where a module runs; accelerate's hooks know when the weights are elsewhere."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        execution_device = getattr(part, "execution_device", None)
        if execution_device is not None:
            return torch.device(execution_device)
    return next(module.parameters()).device


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go."""
    return _device(model.get_input_embeddings())


class _ProbeView:
    """Stands in for the cache while a layer is tried out."""

    def __init__(self) -> None:
        self.updates = 0

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[list[Tensor], list[Tensor]]:
        self.updates += 1
        return [keys], [values]


@torch.no_grad()
def try_layers(contract: DecoderContract, name: str) -> None:
    """Runs one token through one layer of each build, to see that the layer keeps its side of the contract.

    Must run while the model's attention implementation is lazyllm's.

    Raises:
        UnsupportedModelError: when a layer does not update the cache once, does not call the attention
            function with what it was given, or returns no tensor of the same shape.
    """
    seen = set()
    for index, layer in enumerate(contract.layers):
        build = tuple(type(module) for module in layer.modules())
        if build in seen:
            continue
        seen.add(build)
        fault = _try_layer(contract, index)
        if fault:
            raise UnsupportedModelError(f"{name}: layer {index} ({type(layer).__name__}) {fault}")


def _try_layer(contract: DecoderContract, index: int) -> str | None:
    layer, device = contract.layers[index], contract.devices[index]
    config = cast(Any, contract.decoder).config
    dtype = next(parameter.dtype for parameter in layer.parameters() if parameter.is_floating_point())
    hidden = torch.zeros(1, 1, config.hidden_size, device=device, dtype=dtype)
    token, positions = torch.zeros(1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long, device=device)
    whole = slice(0, 1)
    row = RowPlan(0, whole, token, lambda: token, new_queries=1, positions=token, read_spans=lambda: [EVERYTHING])
    plan = AttentionPlan([row], contract.kernel, contract.windows[index], Captured(), ranks=contract.ranks)
    view = _ProbeView()
    rope = contract.rope(hidden, positions)[contract.rope_types[index]]
    try:
        out = layer(
            hidden,
            attention_mask=plan,
            position_ids=positions,
            position_embeddings=contract.to_layer(rope, index),
            **{CACHE: view},
        )
    except Exception as error:
        return f"cannot run on a packed step: {type(error).__name__}: {error}"
    if view.updates != 1:
        return f"updates the cache {view.updates} times per call instead of once"
    if len(plan.calls) != 1:
        return f"calls the registered attention function {len(plan.calls)} times per call instead of once"
    if not isinstance(out, Tensor) or out.shape != hidden.shape:
        return f"returns {type(out).__name__} instead of one tensor of the shape it was given"
    return None


__all__ = ["ATTENTION_NAME", "DecoderContract", "contract_of", "input_device", "try_layers"]
