"""Keys and values in few bits."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lazyllm.caches.aux_cache import AuxCache
from lazyllm.caches.rounding import Bits, pack, unpack
from lazyllm.caches.store import KeyValueStore


class QuantizedStore(KeyValueStore):
    """K/V as codes of few bits, with one scale per token and head; what is read has the dtype of what came in."""

    is_exact: ClassVar[bool] = False

    def __init__(self, bits: Bits) -> None:
        super().__init__()
        self.bits = bits
        self._like: tuple[Tensor, Tensor] | None = None  # [1, g, 0, d] keys and values, for their width and dtype

    def append(self, tokens: Tensor, keys: Tensor, values: Tensor) -> None:
        """Stores keys and values [1, g, t, d] of `tokens` [t], rounded."""
        if self._like is None:
            self._like = _empty(keys), _empty(values)
        self._append(tokens, pack(keys, self.bits), pack(values, self.bits))

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values [1, g, s, d] of all slots."""
        return self._unpack(super().read())

    def gather(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [1, g, v, d] of `tokens` [v], in that order."""
        return self._unpack(super().gather(tokens))

    def _unpack(self, packed: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        assert self._like is not None, "nothing was appended yet"
        (keys, values), (key, value) = packed, self._like
        return unpack(keys, key, self.bits), unpack(values, value, self.bits)

    def state(self) -> dict[str, Tensor]:
        """Its tensors by name, for a file, as they are stored; none when it is empty."""
        state = super().state()
        if state and self._like is not None:
            state["like_keys"], state["like_values"] = self._like
        return state

    def load_state(self, state: Mapping[str, Tensor], device: torch.device | None, behind: int = 0) -> None:
        """Takes up what another store's `state` gave; its tokens come behind `behind` others."""
        super().load_state(state, device, behind)
        if state:
            self._like = state["like_keys"].to(device=device), state["like_values"].to(device=device)


def _empty(numbers: Tensor) -> Tensor:
    """[1, g, 0, d] without the memory of `numbers` [1, g, t, d]."""
    return numbers.new_empty(*numbers.shape[:2], 0, numbers.shape[-1])


class QuantizedKV(AuxCache):
    """AuxCache whose K/V take 8 or 4 bits per number, with one scale per token and head.

    Attention, and scorers that read it, see what is stored, from the first token on: what a token attends to is the
    same in one prefill, in chunks and in decode, and replay holds with keys and values so rounded (law 5). So also
    the prefill with keep ratio 1 is not the unmodified model's (law 6), but off by this rounding. Each number is off by
    at most s / 2, where s is the largest number of the token's key (or value) in that head, divided by 127 (8 bits) or
    7 (4 bits). A key of `d` numbers takes d + 4 bytes with 8 bits, d / 2 + 4 with 4. One layer's K/V at a time are
    unpacked while it attends. Frontier states are not rounded.

    Keys have channels much larger than others, for which a scale per channel would be finer (Liu et al. 2024, KIVI,
    arXiv 2402.02750); here tokens come, go and are revived one by one, so each has scales of its own. Prefer 8 bits.

    Source: absmax quantisation per vector, Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339, section 2.

    Attributes:
        bits: 8 or 4.
    """

    bits: Bits = 8

    def new_store(self) -> KeyValueStore:
        """An empty K/V store for one row at one layer."""
        return QuantizedStore(self.bits)
