"""Masks, built only where a kernel's own causal rule would be wrong, and decided on positions."""

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from lazyllm.indexing import is_ascending


def causal(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """Which keys each query may see, booleans [q, k]."""
    distance = rearrange(query_positions, "q -> q 1") - rearrange(key_positions, "k -> 1 k")
    allowed = distance >= 0
    return allowed if window is None else allowed & (distance < window)


def needs_mask(query_positions: Tensor, key_positions: Tensor, window: int | None) -> bool:
    """Whether a kernel that is told nothing would attend to the wrong keys.

    Without a mask, one query sees every key, and n queries are taken for the n keys in the same order.
    """
    if query_positions.numel() == 1:
        return window is not None and bool(query_positions - key_positions.min() >= window)
    if query_positions.numel() != key_positions.numel() or not is_ascending(key_positions):
        return True
    return window is not None and bool(key_positions[-1] - key_positions[0] + 1 >= window)


class RowMasks:
    """Masks of one step; a row's mask is made again only when its tokens or window change."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._made: dict[tuple[int, int | None], tuple[Tensor, Tensor, Tensor | None]] = {}

    def get(
        self, row: int, todo: Tensor, read_attended: Callable[[], Tensor], positions: Tensor, window: int | None
    ) -> Tensor | None:
        """Mask [1, 1, q, k] for todo [q] over attended [k] tokens, None where the kernel needs none."""
        if todo.numel() == 1 and (window is None or positions.numel() <= window):
            return None
        attended = read_attended()
        made = self._made.get((row, window))
        if made is not None and torch.equal(made[0], todo) and torch.equal(made[1], attended):
            return made[2]
        queries, keys = positions[todo], positions[attended]
        mask = None
        if needs_mask(queries, keys, window):
            mask = causal(queries.to(self.device), keys.to(self.device), window)[None, None]
        self._made[row, window] = (todo, attended, mask)
        return mask


def additive(mask: Tensor | None, queries: Tensor) -> Tensor | None:
    """The mask as eager attention adds it: 0 where allowed, the lowest float elsewhere.

    Eager attention knows no causal rule of its own, so for several queries `None` becomes causal.
    """
    length = queries.shape[2]
    if mask is None:
        if length == 1:
            return None
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=queries.device).tril()
    lowest = torch.finfo(queries.dtype).min
    return torch.zeros(mask.shape, dtype=queries.dtype, device=queries.device).masked_fill(~mask, lowest)


def padding_mask(*, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """The registered mask function: hands the caller's 2-D padding mask [b, t] through to the stack."""
    return attention_mask
