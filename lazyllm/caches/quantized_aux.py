"""Frontier states in few bits."""

from torch import Tensor

from lazyllm.caches.aux_cache import AuxCache
from lazyllm.caches.frontier import FrontierStore
from lazyllm.caches.rounding import Bits, pack, unpack


class QuantizedFrontier(FrontierStore):
    """States as codes of few bits, with one scale per token."""

    def __init__(self, bits: Bits) -> None:
        super().__init__()
        self.bits = bits

    def pack(self, states: Tensor) -> Tensor:
        """States [a, c] as bytes [a, w]."""
        return pack(states, self.bits)

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        """States [a, c] from bytes."""
        return unpack(packed, like, self.bits)


class QuantizedAux(AuxCache):
    """AuxCache whose frontier states take 8 or 4 bits per number, with one scale per token.

    A token that is revived goes on from a state in which each number is off by at most s / 2, where s is the token's
    largest number divided by 127 (8 bits) or 7 (4 bits). Replay holds with states so rounded (law 5); K/V that a token
    had before it stopped stay exact. A state of `c` numbers takes c + 4 bytes with 8 bits, c / 2 + 4 with 4.

    Source: absmax quantisation per vector, Dettmers et al. 2022, LLM.int8(), arXiv 2208.07339, section 2.

    Attributes:
        bits: 8 or 4.
    """

    bits: Bits = 8

    def new_frontier(self) -> FrontierStore:
        """An empty store for one row."""
        return QuantizedFrontier(self.bits)
