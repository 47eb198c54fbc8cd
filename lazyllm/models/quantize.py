"""Weights of linear layers in 4 or 8 bits, by torchao."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from itertools import chain
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lazyllm.errors import InputError, unknown
from lazyllm.extras import installed_by

Weights = Literal["int4", "int8"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)

GROUP = 32
"""Weights of a row that share a scale in int4, as in GGUF's Q4 types."""
ROWS = 16
"""The kernel for int4 on CPU takes outputs in multiples of this."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What torchao quantises."""
PLAIN = (*DTYPES, torch.float64, torch.int64, torch.bool)
"""What no quantiser packs numbers into."""


def weights_named(name: str) -> Weights:
    """The kind of weights of that name.

    Raises:
        InputError: when there is none, or torchao is not installed.
    """
    if name not in WEIGHTS:
        raise InputError(unknown("kind of weights", name, WEIGHTS))
    if find_spec("torchao") is None:
        raise InputError(f"{name} weights need torchao, which is not installed: {installed_by('quantized')}")
    return name


def quantize(model: PreTrainedModel, weights: Weights) -> None:
    """Rounds the weights [outputs, inputs] of a model's linear layers, in place; states keep the model's dtype.

    `int4` shares a scale among 32 inputs of an output, `int8` among all of them. An LM head tied to the embedding gets
    weights of its own. Embeddings, norms and the stacked experts of a mixture stay as they are, and with `int4` layers
    whose inputs do not divide by 32, or on CPU their outputs by 16.

    The kernel for `int4` on CPU is made for bfloat16; with float32 and float16 it is slow.

    Raises:
        InputError: when the model's dtype is another, it is quantised already or has no layer that can be, there is no
            such kind of weights, or torchao or a kernel it needs is not installed.
    """
    weights = weights_named(weights)
    if model.dtype not in DTYPES:
        names = ", ".join(_short(dtype) for dtype in DTYPES)
        raise InputError(f"{weights} weights are for models in {names}, and this one is in {_short(model.dtype)}")
    if packed := next(_packed(model), None):
        raise InputError(f"{weights} weights are made from plain ones, and this model is quantised already: {packed}")
    chosen = {name for name, module in model.named_modules() if _fits(module, weights)}
    if not chosen:
        raise InputError(
            f"no layer of this {model.config.model_type} can have {weights} weights; "
            f"int4 needs linear layers whose inputs divide by {GROUP}, and on CPU outputs that divide by {ROWS}"
        )
    from torchao.quantization import quantize_

    try:
        quantize_(model, _config(weights, model.device), lambda _, name: name in chosen)
    except ImportError as missing:
        raise InputError(f"torchao cannot make {weights} weights on {model.device}: {missing}") from None


def _config(weights: Weights, device: torch.device) -> Any:
    """What torchao is to do; settings of the whole process stay as they are."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    if weights == "int8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    kind = PrototypeInt4WeightOnlyConfig if device.type == "cpu" else Int4WeightOnlyConfig
    return kind(group_size=GROUP, set_inductor_config=False)


def _fits(module: nn.Module, weights: Weights) -> bool:
    if not isinstance(module, nn.Linear):
        return False
    outputs, inputs = module.weight.shape
    return weights == "int8" or (inputs % GROUP == 0 and (module.weight.device.type != "cpu" or outputs % ROWS == 0))


def _packed(model: PreTrainedModel) -> Iterator[str]:
    """Matrices that hold packed or rounded numbers, each in words."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.ndim > 1 and (type(tensor) not in (Tensor, nn.Parameter) or tensor.dtype not in PLAIN):
            yield f"{name} is a {type(tensor).__name__} of {_short(tensor.dtype)}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
