"""A short name for a model's weights, so that what was made with one model is not used with another."""

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLES = 16
"""How many numbers of each parameter are looked at."""
NO_SETTINGS = ("_name_or_path", "transformers_version")
"""What a model's configuration says that changes no result."""


def fingerprint(model: nn.Module, adapters: str | None = None) -> str:
    """32 hexadecimal digits that go by the shapes, dtypes and some numbers of a model's parameters, in their order.

    The same weights have the same fingerprint on every device, and while a pipeline is attached, which changes their
    names. Quantised weights go by their shape alone. Of weights that several processes share, each has a fingerprint of
    its own part. `adapters` says which of the model's adapters are on.
    """
    digest = blake2b(digest_size=16)
    for parameter in map(_own_part, model.parameters()):
        digest.update(f"{tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample(parameter))
    if adapters is not None:
        digest.update(adapters.encode())
    return digest.hexdigest()


def _own_part(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def sample(parameter: Tensor) -> bytes:
    """Some numbers, evenly spaced; none where a parameter is no plain tensor."""
    if type(parameter.data) is not Tensor or parameter.is_meta or not parameter.numel():
        return b""
    places = torch.linspace(0, parameter.numel() - 1, SAMPLES, dtype=torch.float64, device=parameter.device).long()
    return parameter.detach().reshape(-1)[places].double().cpu().numpy().tobytes()


def settings_of(model: PreTrainedModel) -> Iterator[Any]:
    """What a model computes with besides its weights: positions, windows, its attention kernel, its end tokens."""
    config = model.config.to_dict()
    yield {name: value for name, value in config.items() if name not in NO_SETTINGS}
    yield model.config._attn_implementation
    yield getattr(model.generation_config, "eos_token_id", None)


def reading_of(tokenizer: PreTrainedTokenizerBase) -> Iterator[Any]:
    """What a tokenizer makes of a text."""
    yield tokenizer.chat_template
    backend = getattr(tokenizer, "backend_tokenizer", None)
    yield tokenizer.get_vocab() if backend is None else backend.to_str()
