"""Caches as files: safetensors, with a document in the metadata that says what the tensors belong to.

Every part of a cache gives its own tensors and takes them up again (`state`, `load_state`), so that one that keeps
numbers in a form of its own is saved in that form. No code is stored, and none is run.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lazyllm.caches import CACHES
from lazyllm.caches.lazy_cache import LazyCache
from lazyllm.caches.policy import CachePolicy
from lazyllm.caches.row import PromptMarks, Row, distinct, places_of
from lazyllm.errors import CacheError
from lazyllm.models.fingerprint import fingerprint
from lazyllm.policies.base import explain

VERSION = 3
DOCUMENT, DIGEST = "lazyllm_cache", "lazyllm_digest"
"""Keys of the file's metadata."""


class SavedRow(BaseModel):
    """What is said about a row beside its tensors.

    Attributes:
        marks: which of the document's marks are the row's.
        reply_start: index of the first token that came after the last prefill step.
        counted: how many tokens of the reply were certain at the latest step.
        retreated: layer-tokens whose K/V were given up.
        columns: columns the row has seen, padding included.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    marks: int
    reply_start: int
    counted: int
    retreated: int
    columns: int


class SavedCache(BaseModel):
    """What is said about a cache beside its tensors.

    Attributes:
        version: of this format.
        fingerprint: of the decoder that filled the cache; None when no step has run.
        policy: the cache policy, as a configuration has it.
        layers: number of layers of the decoder; 0 when the cache has no rows.
        marks: what is known about prompts, each set once.
        prompts: by prompt, which of the marks are its own.
        rows: the rows, each once.
        places: by row of the batch, which of the rows it is.
        note: what else was to be kept with it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    fingerprint: str | None
    policy: dict[str, Any]
    layers: int
    marks: list[PromptMarks]
    prompts: list[int]
    rows: list[SavedRow]
    places: list[int]
    note: str = ""


def save_cache(cache: LazyCache, path: str | Path, *, note: str = "") -> Path:
    """Writes a cache and a note to `path`, in one piece: to a file beside it first, which then takes its place.

    Raises:
        CacheError: when the file cannot be written, or the cache's model is gone.
    """
    path = Path(path)
    tensors = {
        f"{index}.{name}": tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)  # no two share memory
        for index, row in enumerate(distinct(cache.rows))
        for name, tensor in row.state().items()
    }
    document = _describe(cache, note).model_dump_json()
    unfinished = path.parent / f".{path.name}.{uuid4().hex}"
    try:
        save_file(tensors, unfinished, {DOCUMENT: document, DIGEST: _digest(document, tensors)})
        os.replace(unfinished, path)
    except (OSError, SafetensorError) as error:
        raise CacheError(f"the cache cannot be saved as {str(path)!r}: {error}") from error
    finally:
        with suppress(OSError):  # it is gone where all went well
            unfinished.unlink()
    return path


def _describe(cache: LazyCache, note: str) -> SavedCache:
    known: list[PromptMarks] = []
    prompts = [_place(marks, known) for marks in cache.marks]
    rows = [
        SavedRow(
            marks=_place(row.marks, known),
            reply_start=row.reply_start,
            counted=row.counted,
            retreated=row.retreated,
            columns=row.columns,
        )
        for row in distinct(cache.rows)
    ]
    return SavedCache(
        version=VERSION,
        fingerprint=cache.fingerprint(),
        policy=CACHES.describe(cache.policy),
        layers=cache.rows[0].ledger.layers if cache.rows else 0,
        marks=[{**vars(marks), "starts": dict(marks.starts)} for marks in known],  # what was found, not the text
        prompts=prompts,
        rows=rows,
        places=places_of(cache.rows),
        note=note,
    )


def _place(marks: PromptMarks, known: list[PromptMarks]) -> int:
    """Where `marks` are among those known, to which they are added if need be."""
    if marks not in known:
        known.append(marks)
    return known.index(marks)


def load_cache(
    path: str | Path,
    policy: CachePolicy,
    decoder: nn.Module,
    devices: Sequence[torch.device],
    adapters: str | None = None,
    *,
    mapped: bool = False,
) -> tuple[LazyCache, str]:
    """The cache that `save_cache` wrote to `path`, and its note.

    Args:
        path: the file.
        policy: the cache policy it must have been filled by.
        decoder: the decoder it must have been filled by.
        devices: by layer, where its K/V are put.
        adapters: those the decoder must have run with.
        mapped: leave what stays on the CPU in the file, from which the system reads it as it is needed. The file may
            be replaced or removed meanwhile, but must not be written to.

    Raises:
        CacheError: when there is no such file, it is damaged or changed, or of another version, model or policy.
    """
    path = Path(path)
    said, tensors = _read(path, mapped)
    if said.policy != CACHES.describe(policy):
        raise CacheError(
            f"{str(path)!r} was filled by the cache policy {said.policy}, this pipeline has {CACHES.describe(policy)}"
        )
    cache = LazyCache(policy, marks=[said.marks[place] for place in said.prompts])
    if said.fingerprint is not None:
        if said.fingerprint != (own := fingerprint(decoder, adapters)):
            raise CacheError(
                f"{str(path)!r} was filled by a model with the fingerprint {said.fingerprint}, this model has {own}"
            )
        cache.bind(decoder, adapters)
    by_row: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        by_row[index][name] = tensor
    rows: list[Row] = []
    for number, saved in enumerate(said.rows):
        row = Row(said.layers, policy, said.marks[saved.marks])
        row.load_state(by_row[str(number)], devices)
        row.reply_start, row.counted = saved.reply_start, saved.counted
        row.retreated, row.columns = saved.retreated, saved.columns
        rows.append(row)
    cache.rows = [rows[place] for place in said.places]
    return cache, said.note


def _read(path: Path, mapped: bool) -> tuple[SavedCache, dict[str, Tensor]]:
    """Document and tensors of a file, checked against its digest."""
    if not path.is_file():
        raise CacheError(f"there is no saved cache {str(path)!r}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if DOCUMENT not in metadata:
                raise CacheError(f"{str(path)!r} is a safetensors file, but not one that a cache was saved to")
            document = str(metadata[DOCUMENT])
            _check_version(path, document)
            # Unless asked for, read for good: what a file on the disk becomes later must not change the cache.
            tensors = {name: _tensor(file, name, mapped) for name in file.offset_keys()}
    except (OSError, SafetensorError) as error:
        raise CacheError(f"{str(path)!r} cannot be read as a whole safetensors file: {error}") from error
    if metadata.get(DIGEST) != (digest := _digest(document, tensors)):
        raise CacheError(
            f"{str(path)!r} was changed after it was saved: it has the digest {digest}, and says {metadata.get(DIGEST)}"
        )
    try:
        return SavedCache.model_validate_json(document), tensors
    except ValidationError as error:
        raise CacheError(f"{str(path)!r} cannot be understood: {explain(error, SavedCache)}") from None


def _tensor(file: Any, name: str, mapped: bool) -> Tensor:
    tensor: Tensor = file.get_tensor(name)
    return tensor if mapped else tensor.clone()


def _check_version(path: Path, document: str) -> None:
    """Refuses other formats before anything else of them is believed."""
    try:
        version = json.loads(document)["version"]
    except (ValueError, TypeError, KeyError):
        raise CacheError(f"{str(path)!r} says nothing about its version; it was changed after it was saved") from None
    if version != VERSION:
        raise CacheError(f"{str(path)!r} has version {version!r} of the format, this lazyllm reads version {VERSION}")


def _digest(document: str, tensors: Mapping[str, Tensor]) -> str:
    """64 hexadecimal digits over the document and the name, shape, dtype and bytes of every tensor."""
    digest = blake2b(document.encode(), digest_size=32)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
