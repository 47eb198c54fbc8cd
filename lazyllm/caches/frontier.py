"""The Aux Cache's store: where each unfinished token stopped."""

from collections.abc import Mapping
from copy import copy
from typing import Self

import torch
from torch import Tensor

from lazyllm.caches.indexing import has_room_to_spare, is_writable


class FrontierStore:
    """One hidden state per token with depth < L: the output of its last computed layer (law 3).

    One buffer for the whole row. A token that goes deeper and stops again overwrites its own entry; a finished token
    frees it. A copy shares the buffer until one of both writes. Subclasses keep states in another form (`pack`,
    `unpack`) or in another place (`room`).
    """

    def __init__(self) -> None:
        self._packed: Tensor | None = None
        self._like: Tensor | None = None  # [0, c], with the dtype and the device of the states that come in
        self._is_own = True
        self._slot: dict[int, int] = {}
        self._free: list[int] = []

    def pack(self, states: Tensor) -> Tensor:
        """States [a, c] in the form they are kept in, [a, w]."""
        return states

    def unpack(self, packed: Tensor, like: Tensor) -> Tensor:
        """States [a, c] from that form; `like` [0, c] tells what they were."""
        return packed

    def room(self, slots: int, like: Tensor) -> Tensor:
        """Memory [slots, w] for packed states such as those of `like` [0, w].

        Raises:
            CacheError: when there is none.
        """
        return like.new_empty(slots, like.shape[-1])

    def __len__(self) -> int:
        return len(self._slot)

    @property
    def tokens(self) -> Tensor:
        """[a] the tokens that have an entry, ascending."""
        return torch.tensor(sorted(self._slot), dtype=torch.long)

    def reserve(self, tokens: Tensor, states: Tensor) -> None:
        """Makes room for states [a, c] of `tokens` [a], so that `put` cannot fail half-way for want of it."""
        held = len(self._slot) + len(self._free)
        needed = max(held, len(self._slot) + sum(token not in self._slot for token in tokens.tolist()))
        before = self._packed
        if before is None or self._like is None:
            self._like = states.new_empty(0, states.shape[-1])
            self._packed = self.room(needed, self.pack(self._like))
        elif needed > before.shape[0] or not self._is_own or not is_writable(before):
            slots = before.shape[0] if needed <= before.shape[0] else max(needed, before.shape[0] * 3 // 2)
            self._packed = self.room(slots, self.pack(self._like))
            self._packed[:held] = before[:held]
        self._is_own = True

    def put(self, tokens: Tensor, states: Tensor) -> None:
        """Writes states [a, c] of `tokens` [a]."""
        self.reserve(tokens, states)
        self._put(tokens, self.pack(states))

    def _put(self, tokens: Tensor, packed: Tensor) -> None:
        assert self._packed is not None, "room was made"
        slots = torch.tensor([self._slot_for(token) for token in tokens.tolist()], dtype=torch.long)
        self._packed.index_copy_(0, slots.to(self._packed.device), packed.to(self._packed.device))

    def _slot_for(self, token: int) -> int:
        if token not in self._slot:
            self._slot[token] = self._free.pop() if self._free else len(self._slot)
        return self._slot[token]

    def read(self, tokens: Tensor) -> Tensor:
        """States [a, c] of `tokens` [a], each of which must have an entry."""
        assert self._like is not None, "no token was ever pruned here"
        return self.unpack(self._read(tokens), self._like)

    def _read(self, tokens: Tensor) -> Tensor:
        assert self._packed is not None, "no token was ever pruned here"
        slots = torch.tensor([self._slot[token] for token in tokens.tolist()], dtype=torch.long)
        return self._packed.index_select(0, slots.to(self._packed.device))

    def free(self, tokens: Tensor) -> None:
        """Frees the entries of `tokens`, where they have one."""
        self._free.extend(self._slot.pop(token) for token in tokens.tolist() if token in self._slot)

    def crop(self, tokens: int) -> None:
        """Frees every entry whose token index is `tokens` or more."""
        self.free(torch.tensor([token for token in self._slot if token >= tokens], dtype=torch.long))

    def trim(self) -> None:
        """Gives back memory beyond what is in use."""
        before = self._packed
        if before is None or not self._is_own or not has_room_to_spare(before.shape[0], len(self)):
            return
        assert self._like is not None, "it came with the first states"
        tokens = self.tokens
        held = self._read(tokens)
        self._packed = self.room(len(self), self.pack(self._like))
        self._packed.copy_(held)
        self._slot, self._free = {token: slot for slot, token in enumerate(tokens.tolist())}, []

    def copy(self) -> Self:
        """An independent copy."""
        self._is_own = False
        twin = copy(self)
        twin._slot, twin._free = dict(self._slot), list(self._free)
        return twin

    def state(self) -> dict[str, Tensor]:
        """Its tensors by name, for a file, as they are kept; none when it is empty."""
        if self._like is None or not self._slot:
            return {}
        return {"tokens": self.tokens, "packed": self._read(self.tokens), "like": self._like}

    def load_state(self, state: Mapping[str, Tensor], device: torch.device | None, behind: int = 0) -> None:
        """Takes up what another store's `state` gave; its tokens come behind `behind` others.

        States are read on `device`, None = where they are.
        """
        if state:
            tokens, like = state["tokens"] + behind, state["like"].to(device=device)
            if self._packed is None and (packed := self.adopted(state["packed"], like)) is not None:
                self._packed, self._like, self._is_own = packed, like, False
                self._slot = {token: slot for slot, token in enumerate(tokens.tolist())}
                return
            self.reserve(tokens, like)
            self._put(tokens, state["packed"])

    def adopted(self, packed: Tensor, like: Tensor) -> Tensor | None:
        """What stands in for states of its own until it writes, without a copy where that can be; None = copy them."""
        return packed.to(like.device)

    @property
    def used_bytes(self) -> int:
        """Bytes of the entries in use, wherever they are."""
        return 0 if self._packed is None else len(self) * self._packed.shape[-1] * self._packed.element_size()

    @property
    def offloaded_bytes(self) -> int:
        """How many of these bytes are not on the model's device."""
        return 0
