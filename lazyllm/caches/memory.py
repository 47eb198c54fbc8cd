"""States and other features of tokens that are looked back on."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lazyllm.caches.indexing import GrowingBuffer, is_ascending, locate


class StateMemory:
    """One vector for each of a row's tokens, its hidden state after one layer or another, in order of computation."""

    def __init__(self) -> None:
        self._states, self._tokens = GrowingBuffer(0), GrowingBuffer(0)
        self._tokens.append(torch.empty(0, dtype=torch.long))

    def __len__(self) -> int:
        return self._tokens.length

    def append(self, tokens: Tensor, states: Tensor) -> None:
        """Remembers states [t, c] of `tokens` [t]."""
        self._tokens.append(tokens)
        self._states.append(states)

    def gather(self, tokens: Tensor) -> Tensor:
        """States [v, c] of `tokens` [v], all of which were remembered."""
        states = self._states.read()
        slots = locate(self._tokens.read(), tokens)
        if slots.numel() and int(slots[-1] - slots[0]) + 1 == slots.numel() and is_ascending(slots):
            return states.narrow(0, int(slots[0]), slots.numel())  # what stands side by side is not copied
        return states.index_select(0, slots.to(states.device))

    def truncate(self, length: int) -> None:
        """Forgets the entries from `length` on."""
        self._tokens.truncate(length)
        self._states.truncate(length)

    def crop(self, tokens: int) -> None:
        """Forgets every token whose index is `tokens` or more."""
        self._keep(self._tokens.read() < tokens)

    def forget(self, tokens: Tensor) -> None:
        """Forgets `tokens` [f], where they were remembered."""
        self._keep(~torch.isin(self._tokens.read(), tokens))

    def _keep(self, kept: Tensor) -> None:
        slots = torch.nonzero(kept).squeeze(-1)
        if slots.numel() < len(self):
            self._tokens.keep(slots)
            self._states.keep(slots)

    def trim(self) -> None:
        """Gives back memory beyond what is in use."""
        self._tokens.trim()
        self._states.trim()

    def copy(self) -> "StateMemory":
        """An independent copy."""
        twin = StateMemory()
        twin._states, twin._tokens = self._states.copy(), self._tokens.copy()
        return twin

    @property
    def used_bytes(self) -> int:
        """Bytes of the states in use."""
        return self._states.used_bytes

    def state(self) -> dict[str, Tensor]:
        """Its tensors by name, for a file; none when it is empty."""
        return {"tokens": self._tokens.read(), "states": self._states.read()} if len(self) else {}

    def load_state(self, state: Mapping[str, Tensor], device: torch.device | None, behind: int = 0) -> None:
        """Takes up what another memory's `state` gave; its tokens come behind `behind` others."""
        if state:
            self.append(state["tokens"] + behind, state["states"].to(device=device))
