"""Frontier states outside of the model's device."""

import mmap
import os
import tempfile
from typing import IO, Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lazyllm.caches.aux_cache import AuxCache
from lazyllm.caches.frontier import FrontierStore
from lazyllm.errors import CacheError, ConfigError

Where = Literal["cpu", "disk"]


class OffloadedFrontier(FrontierStore):
    """States in CPU memory, or in a file; read, they are on the model's device again.

    Args:
        where: "cpu" or "disk".
        folder: where the file is put; None = the system's folder for temporary files.
    """

    def __init__(self, where: Where, folder: str | None) -> None:
        super().__init__()
        self.where, self.folder = where, folder

    def room(self, slots: int, like: Tensor) -> Tensor:
        """Memory [slots, w] there; pinned in CPU memory when the model is on CUDA.

        Raises:
            CacheError: when the disk has no room, or the folder is gone.
        """
        if self.where == "disk":
            return mapped_file(slots, like, self.folder)
        return torch.empty(slots, like.shape[-1], dtype=like.dtype, pin_memory=like.is_cuda)

    def adopted(self, packed: Tensor, like: Tensor) -> Tensor | None:
        """None: states are kept in memory of its own."""
        return None

    def trim(self) -> None:
        """Gives back memory beyond what is in use; a file stays, as a smaller one would need room beside it."""
        if self.where == "cpu":
            super().trim()

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        """States [a, c] on the device of `like`."""
        if like.is_cuda:
            packed = packed.pin_memory()
        return packed.to(like.device, non_blocking=like.is_cuda)

    @property
    def offloaded_bytes(self) -> int:
        """All of them."""
        return self.used_bytes


def mapped_file(slots: int, like: Tensor, folder: str | None) -> Tensor:
    """Rows [slots, w] of the dtype of `like` [0, w], in a file that has no name and is gone with the tensor.

    Raises:
        CacheError: when the disk has no room, or the folder cannot be written to.
    """
    size = slots * like.shape[-1] * like.element_size()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            _take_room(file, size)
            pages = mmap.mmap(file.fileno(), size)  # keeps the file when its name and its handle are gone
    except OSError as error:
        raise CacheError(f"no room for {size} bytes of states in {_shown(folder)}: {error.strerror}") from error
    return torch.frombuffer(pages, dtype=like.dtype).view(slots, like.shape[-1])


def _take_room(file: IO[bytes], size: int) -> None:
    """Makes the file so large on the disk itself: writing to a page that finds no room would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    block = bytes(2**20)
    for start in range(0, size, len(block)):
        file.write(block[: size - start])
    file.flush()


def _shown(folder: str | None) -> str:
    return repr(folder) if folder is not None else "the system's folder for temporary files"


class OffloadedAux(AuxCache):
    """AuxCache whose frontier states are in CPU memory or in a file, and go back to the model when they are revived.

    Nothing is rounded: the results are those of AuxCache. K/V, and states a scorer looks back on, stay on the device.
    What is held there is counted in `aux_bytes`, and alone in `offloaded_bytes`. A file has no name, so that nobody can
    find it, and is gone with its store, also when the process is killed; the system keeps as much of it in memory as it
    can spare. Pinned memory for models on CUDA has not been run.

    Attributes:
        where: "cpu" or "disk".
        folder: with "disk", where the file is put; None = the system's folder for temporary files.
    """

    where: Where = "cpu"
    folder: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _check_folder(self) -> Self:
        if self.folder is not None and self.where != "disk":
            raise ValueError(f"a folder is for where='disk', not for where={self.where!r}")
        return self

    def check_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Tries the folder.

        Raises:
            ConfigError: when no file can be put there.
        """
        super().check_model(model, tokenizer)
        if self.where == "disk":
            try:
                tempfile.TemporaryFile(dir=self.folder).close()
            except OSError as error:
                fault = f"OffloadedAux cannot put a file into {_shown(self.folder)}: {error.strerror}"
                raise ConfigError(fault) from None

    def new_frontier(self) -> FrontierStore:
        """An empty store for one row."""
        return OffloadedFrontier(self.where, self.folder)
