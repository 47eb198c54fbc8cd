"""Finding tokens in the order they are stored, and buffers that grow."""

import torch
from torch import Tensor


def locate(stored: Tensor, wanted: Tensor) -> Tensor:
    """Slot of each `wanted` token [v] in `stored` [s]; every wanted token must be stored.

    Cheap when `stored` is ascending, as it is until a token is revived.
    """
    if stored.numel() == wanted.numel() and torch.equal(stored, wanted):
        return torch.arange(wanted.numel())
    if is_ascending(stored):
        return torch.searchsorted(stored, wanted)
    order = torch.argsort(stored)
    return order[torch.searchsorted(stored, wanted, sorter=order)]


def is_ascending(tokens: Tensor) -> bool:
    """Whether token indices [s] rise strictly."""
    return bool((tokens[1:] > tokens[:-1]).all())


def is_writable(tensor: Tensor) -> bool:
    """Whether it may be changed in place: what was made in inference mode may not be, outside of it."""
    return torch.is_inference_mode_enabled() or not tensor.is_inference()


def has_room_to_spare(entries: int, used: int) -> bool:
    """Whether memory for so many entries, of which some are in use, is worth a copy that holds those alone."""
    return (entries - used) * 16 > used


class GrowingBuffer:
    """A tensor that grows along one axis by half of its size, but not by more than a step, so that appending is cheap.

    Memory that is not its own is never written to; the next write takes memory of its own. That is so for the first
    entries, which are taken as they are so that a prefill is not held up, and for what it shares with a copy.

    Attributes:
        length: entries in use.
    """

    HEADROOM = 64
    STEP = 1024

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self.length = self._reserved = 0
        self._data: Tensor | None = None
        self._is_own = False

    def reserve(self, length: int) -> None:
        """Says that so many entries in all are about to be added: the next growth makes room for them."""
        self._reserved = length

    def append(self, entries: Tensor) -> None:
        """Adds entries behind the last one."""
        added = entries.shape[self.axis]
        if self._data is None and added >= self._reserved:
            self._data, self.length = entries, added
            return
        if self._data is None or not self._may_write or self.length + added > self._data.shape[self.axis]:
            self._grow(entries, max(self.length + added, self._reserved))
        assert self._data is not None
        self._data.narrow(self.axis, self.length, added).copy_(entries)
        self.length += added

    def _grow(self, like: Tensor, needed: int) -> None:
        shape = list(like.shape)
        shape[self.axis] = max(needed + self.HEADROOM, self.length + min(self.length // 2, self.STEP))
        grown = like.new_empty(shape)
        if self._data is not None:
            grown.narrow(self.axis, 0, self.length).copy_(self.read())
        self._data, self._is_own = grown, True

    def read(self) -> Tensor:
        """All entries in use, without a copy."""
        assert self._data is not None, "nothing was appended yet"
        return self._data.narrow(self.axis, 0, self.length)

    def writable(self) -> Tensor:
        """All entries in use, to be changed in place."""
        if not self._may_write:
            self._data, self._is_own = self.read().clone(), True
        return self.read()

    @property
    def _may_write(self) -> bool:
        return self._is_own and self._data is not None and is_writable(self._data)

    def truncate(self, length: int) -> None:
        """Forgets the entries from `length` on."""
        self.length = min(self.length, length)

    def keep(self, slots: Tensor) -> None:
        """Keeps only the entries at `slots`, in that order."""
        if self._data is None:
            return
        kept = self.read().index_select(self.axis, slots.to(self._data.device))
        self._data, self.length, self._is_own = kept, kept.shape[self.axis], True

    def copy(self) -> "GrowingBuffer":
        """An independent copy; both share their memory until one of them writes."""
        twin = GrowingBuffer(self.axis)
        twin._data, twin.length = self._data, self.length
        self._is_own = False
        return twin

    def trim(self) -> None:
        """Gives back the room to grow, where it is more than a sixteenth of what is in use."""
        if self._is_own and self._data is not None and has_room_to_spare(self._data.shape[self.axis], self.length):
            self._data = self.read().clone()

    @property
    def used_bytes(self) -> int:
        """Bytes of the entries in use."""
        if self._data is None or not self.length:
            return 0
        return self._data.nbytes // self._data.shape[self.axis] * self.length
