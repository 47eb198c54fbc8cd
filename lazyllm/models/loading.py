"""Loading a model and its tokenizer from a hub id, a folder or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lazyllm.errors import InputError, unknown
from lazyllm.extras import needed
from lazyllm.models.quantize import quantize, weights_named

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}

HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code")
"""What a configuration is found by."""
ADAPTER = "adapter_config.json"
"""What makes a folder one of adapters."""


def dtype_named(name: str) -> torch.dtype:
    """The dtype of that name.

    Raises:
        InputError: when weights cannot have it.
    """
    if name not in DTYPES:
        raise InputError(unknown("dtype", name, DTYPES))
    return DTYPES[name]


def load_model(
    path_or_id: str | Path,
    *,
    gguf_file: str | None = None,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    weights: str | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM, or a model that reads images with one inside, in evaluation mode, and its tokenizer.

    Args:
        path_or_id: a hub id, a folder, or a `.gguf` file.
        gguf_file: name of a GGUF file inside the folder or repository (needs the `gguf` extra).
        dtype: dtype of the weights; "auto" takes the checkpoint's.
        device_map: as in transformers.
        weights: "int4" or "int8" quantises the linear layers once they are loaded; see `quantize`.
        options: anything else the model class's `from_pretrained` takes. Weights are read from safetensors, and from
            pickles only where `use_safetensors=False` says so.

    Raises:
        InputError: when there is no such file or folder, the model cannot have these weights, or a package is missing
            that reads them.
    """
    kind = None if weights is None else weights_named(weights)
    source, extra = _found(path_or_id, gguf_file)
    if not extra:
        options.setdefault("use_safetensors", True)
    maker = AutoModelForCausalLM if extra else _maker(source, options)
    model = maker.from_pretrained(source, dtype=dtype, device_map=device_map, **extra, **options)
    tokenizer = load_tokenizer(path_or_id, gguf_file=gguf_file, **options)
    model.eval()
    if kind is not None:
        quantize(model, kind)
    return model, tokenizer


def load_tokenizer(path_or_id: str | Path, *, gguf_file: str | None = None, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, without the model; arguments as for `load_model`.

    Raises:
        InputError: when there is no such file.
    """
    source, extra = _found(path_or_id, gguf_file)
    trusted = {"trust_remote_code": options["trust_remote_code"]} if "trust_remote_code" in options else {}
    return AutoTokenizer.from_pretrained(source, **extra, **trusted)


def _found(path_or_id: str | Path, gguf_file: str | None) -> tuple[str, dict[str, str]]:
    """Folder or repository of a model, and what names its GGUF file, if it is one.

    Raises:
        InputError: when there is no such file or folder.
    """
    path = Path(path_or_id)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"there is no GGUF file {str(path)!r}")
        path_or_id, gguf_file = path.parent, path.name
    elif not path.exists() and str(path_or_id).startswith((".", "/", "~")):
        raise InputError(f"there is no folder {str(path_or_id)!r}")
    elif gguf_file is not None and path.is_dir() and not (path / gguf_file).is_file():
        raise InputError(f"there is no file {gguf_file!r} in {str(path)!r}")
    if gguf_file is not None:
        needed("gguf", what="a GGUF file", extra="gguf")
    elif (path / ADAPTER).is_file():
        needed("peft", what="a folder of adapters", extra="adapters")
    return str(path_or_id), {"gguf_file": gguf_file} if gguf_file else {}


def _maker(source: str, options: dict[str, Any]) -> Any:
    """The class that loads the model of a configuration."""
    try:
        config = AutoConfig.from_pretrained(source, **{name: options[name] for name in HUB_OPTIONS if name in options})
    except (OSError, ValueError):  # a folder of adapters has none; of others the loading says what is wrong
        return AutoModelForCausalLM
    reads_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    speaks = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if reads_images and not speaks else AutoModelForCausalLM
