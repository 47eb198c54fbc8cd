"""Loading a model and its tokenizer from a hub id, a folder or a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lazyllm.errors import InputError, unknown
from lazyllm.models.quantize import quantize, weights_named

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}


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
    """A causal LM in evaluation mode, and its tokenizer.

    Args:
        path_or_id: a hub id, a folder, or a `.gguf` file.
        gguf_file: name of a GGUF file inside the folder or repository (needs the `gguf` extra).
        dtype: dtype of the weights; "auto" takes the checkpoint's.
        device_map: as in transformers.
        weights: "int4" or "int8" quantises the linear layers once they are loaded; see `quantize`.
        options: anything else `AutoModelForCausalLM.from_pretrained` takes.

    Raises:
        InputError: when there is no such file or folder, or the model cannot have these weights.
    """
    kind = None if weights is None else weights_named(weights)
    path = Path(path_or_id)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"there is no GGUF file {str(path)!r}")
        path_or_id, gguf_file = path.parent, path.name
    elif gguf_file is not None and path.is_dir() and not (path / gguf_file).is_file():
        raise InputError(f"there is no file {gguf_file!r} in {str(path)!r}")
    source = str(path_or_id)
    extra = {"gguf_file": gguf_file} if gguf_file else {}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map=device_map, **extra, **options)
    tokenizer = AutoTokenizer.from_pretrained(source, **extra)
    model.eval()
    if kind is not None:
        quantize(model, kind)
    return model, tokenizer
