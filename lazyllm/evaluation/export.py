"""The weights of a GGUF file in other forms, for engines that are to run the very same model.

The package `gguf` is imported on use (extra `gguf`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from lazyllm.errors import InputError, unknown
from lazyllm.evaluation.data import quiet_loading
from lazyllm.extras import needed
from lazyllm.models.loading import load_model

FileType = Literal["F32", "F16"]
FILE_TYPES: dict[str, int] = {"F32": 0, "F16": 1}
"""`general.file_type` of a GGUF file, by the type of its matrices."""


def write_dequantised(source: Path, path: Path, file_type: FileType) -> Path:
    """Writes a GGUF file again with plain weights and all of its metadata.

    Matrices get the type that is asked for; vectors stay float32, as in files converted from a checkpoint.

    Raises:
        InputError: for an unknown type, when there is no such file, or gguf is not installed.
    """
    needed("gguf", what="a GGUF file", extra="gguf")
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, Keys
    from gguf.quants import dequantize

    if file_type not in FILE_TYPES:
        raise InputError(unknown("file type", file_type, FILE_TYPES))
    if not source.is_file():
        raise InputError(f"there is no GGUF file {str(source)!r}")
    reader = GGUFReader(source)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    writer = GGUFWriter(unfinished, arch=str(fields.pop(Keys.General.ARCHITECTURE).contents()))
    fields.pop(Keys.General.FILE_TYPE, None)
    writer.add_file_type(FILE_TYPES[file_type])
    for name, field in fields.items():
        kind, *inner = field.types
        writer.add_key_value(name, field.contents(), kind, inner[-1] if kind == GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values.astype(np.float16) if file_type == "F16" and values.ndim > 1 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(unfinished, path)
    return path


def write_checkpoint(source: Path, folder: Path) -> Path:
    """Writes a GGUF file's model as a folder of float32 safetensors that older versions of transformers read too."""
    with quiet_loading():
        model, _ = load_model(source, dtype=torch.float32)
        if (quantizer := getattr(model, "hf_quantizer", None)) is not None:  # it would refuse to be saved
            quantizer.remove_quantization_config(model)
        unfinished = folder.with_name(folder.name + ".unfinished")
        model.save_pretrained(unfinished)
    os.replace(unfinished, folder)
    return folder
