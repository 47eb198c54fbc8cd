"""The Aux Cache's store: where each unfinished token stopped."""

import torch
from torch import Tensor


class FrontierStore:
    """One hidden state per token with depth < L: the output of its last computed layer (law 3).

    One `[tokens, c]` buffer for the whole row. A token that goes deeper and stops again overwrites
    its own entry; a finished token frees it.
    """

    def __init__(self) -> None:
        self._states: Tensor | None = None
        self._slot: dict[int, int] = {}
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._slot)

    @property
    def tokens(self) -> Tensor:
        """[a] the tokens that have an entry, ascending."""
        return torch.tensor(sorted(self._slot), dtype=torch.long)

    def put(self, tokens: Tensor, states: Tensor) -> None:
        """Writes states [a, c] of `tokens` [a]; an empty store takes the tensor itself."""
        slots = [self._slot_for(token) for token in tokens.tolist()]
        if self._states is None:
            self._states = states
            return
        if len(self._slot) + len(self._free) > self._states.shape[0]:
            self._states = self._grown(self._states)
        self._states.index_copy_(0, torch.tensor(slots, device=self._states.device), states.to(self._states.device))

    def _slot_for(self, token: int) -> int:
        if token not in self._slot:
            self._slot[token] = self._free.pop() if self._free else len(self._slot)
        return self._slot[token]

    def _grown(self, states: Tensor) -> Tensor:
        used = len(self._slot) + len(self._free)
        grown = states.new_empty(max(used, states.shape[0] * 3 // 2), states.shape[-1])
        grown[: states.shape[0]] = states
        return grown

    def read(self, tokens: Tensor) -> Tensor:
        """States [a, c] of `tokens` [a], each of which must have an entry."""
        assert self._states is not None, "no token was ever pruned here"
        slots = torch.tensor([self._slot[token] for token in tokens.tolist()], dtype=torch.long)
        return self._states.index_select(0, slots.to(self._states.device))

    def free(self, tokens: Tensor) -> None:
        """Frees the entries of `tokens`, where they have one."""
        self._free.extend(self._slot.pop(token) for token in tokens.tolist() if token in self._slot)

    def crop(self, tokens: int) -> None:
        """Frees every entry whose token index is `tokens` or more."""
        self.free(torch.tensor([token for token in self._slot if token >= tokens], dtype=torch.long))

    def copy(self) -> "FrontierStore":
        """An independent copy."""
        twin = type(self)()
        twin._states = None if self._states is None else self._states.clone()
        twin._slot, twin._free = dict(self._slot), list(self._free)
        return twin

    @property
    def used_bytes(self) -> int:
        """Bytes of the entries in use."""
        return 0 if self._states is None else len(self) * self._states.shape[-1] * self._states.element_size()
