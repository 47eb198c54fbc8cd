"""Keys and values of one row at one layer, for the tokens that were computed there and no others."""

from collections.abc import Mapping
from copy import copy
from typing import ClassVar, Self

import torch
from torch import Tensor

from lazyllm.caches.indexing import GrowingBuffer, locate


class KeyValueStore:
    """Compact K/V: slot s holds the s-th token computed at this layer.

    After a prefill the slots are in order of position; a revived token is appended, so storage order
    says nothing and positions decide (law 8). A copy shares the memory until one of both writes.

    Attributes:
        is_exact: whether what is read is what was stored, number for number.
    """

    is_exact: ClassVar[bool] = True

    def __init__(self) -> None:
        self._keys, self._values = GrowingBuffer(2), GrowingBuffer(2)
        self._tokens = [torch.empty(0, dtype=torch.long)]

    def __len__(self) -> int:
        return self._keys.length

    @property
    def tokens(self) -> Tensor:
        """[s] which token each slot holds; joined when it is asked for, which not every step does."""
        if len(self._tokens) > 1:
            self._tokens = [torch.cat(self._tokens)]
        return self._tokens[0]

    def reserve(self, slots: int) -> None:
        """Says that so many slots in all are about to be filled."""
        self._keys.reserve(slots)
        self._values.reserve(slots)

    def append(self, tokens: Tensor, keys: Tensor, values: Tensor) -> None:
        """Stores keys and values [1, g, t, d] of `tokens` [t]."""
        self._append(tokens, keys, values)

    def _append(self, tokens: Tensor, keys: Tensor, values: Tensor) -> None:
        """Stores them in the form in which they are given."""
        self._tokens.append(tokens)
        self._keys.append(keys)
        self._values.append(values)

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values [1, g, s, d] of all slots, without a copy."""
        return self._keys.read(), self._values.read()

    def gather(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [1, g, v, d] of `tokens` [v], in that order."""
        keys, values = self._keys.read(), self._values.read()
        slots = locate(self.tokens, tokens).to(keys.device)
        return keys.index_select(2, slots), values.index_select(2, slots)

    def truncate(self, length: int) -> None:
        """Forgets the slots from `length` on."""
        if length < len(self):
            self._tokens = [self.tokens[:length]]
            self._keys.truncate(length)
            self._values.truncate(length)

    def crop(self, tokens: int) -> None:
        """Forgets every token whose index is `tokens` or more."""
        slots = torch.nonzero(self.tokens < tokens).squeeze(-1)
        if slots.numel() < len(self):
            self.keep(slots)

    def keep(self, slots: Tensor) -> None:
        """Keeps only what is at `slots`, in that order."""
        self._tokens = [self.tokens[slots]]
        self._keys.keep(slots)
        self._values.keep(slots)

    def trim(self) -> None:
        """Gives back memory beyond what is in use."""
        self._keys.trim()
        self._values.trim()

    def copy(self) -> Self:
        """An independent copy."""
        twin = copy(self)
        twin._keys, twin._values, twin._tokens = self._keys.copy(), self._values.copy(), list(self._tokens)
        return twin

    def state(self) -> dict[str, Tensor]:
        """Its tensors by name, for a file, as they are stored; none when it is empty."""
        if not len(self):
            return {}
        return {"tokens": self.tokens, "keys": self._keys.read(), "values": self._values.read()}

    def load_state(self, state: Mapping[str, Tensor], device: torch.device | None, behind: int = 0) -> None:
        """Takes up what another store's `state` gave; its tokens come behind `behind` others."""
        if state:
            self._append(state["tokens"] + behind, state["keys"].to(device=device), state["values"].to(device=device))

    @property
    def used_bytes(self) -> int:
        """Bytes of the keys and values in use."""
        return self._keys.used_bytes + self._values.used_bytes
