"""Masks, built only where a kernel's own causal rule would be wrong, and decided on positions."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from lazyllm.caches.indexing import is_ascending
from lazyllm.errors import InputError


def causal(query_positions: Tensor, key_positions: Tensor, window: int | None, reach: Tensor | None = None) -> Tensor:
    """Which keys each query may see, booleans [q, k]; up to position `reach` [q] where that is not its own."""
    queries, keys = rearrange(query_positions, "q -> q 1"), rearrange(key_positions, "k -> 1 k")
    allowed = keys <= (queries if reach is None else rearrange(reach, "q -> q 1"))
    return allowed if window is None else allowed.logical_and_(keys > queries - window)


def needs_mask(query_positions: Tensor, key_positions: Tensor, window: int | None) -> bool:
    """Whether a kernel that is told nothing would attend to the wrong keys.

    Without a mask, one query sees every key, and n queries are taken for the n keys in the same order.
    """
    if query_positions.numel() == 1:
        first, last = key_positions.aminmax()
        return bool(last > query_positions) or (window is not None and bool(query_positions - first >= window))
    if query_positions.numel() != key_positions.numel() or not is_ascending(key_positions):
        return True
    return window is not None and bool(key_positions[-1] - key_positions[0] + 1 >= window)


WHOLE = slice(None)


@dataclass(frozen=True)
class Span:
    """Queries of a row that are attended in one call of the kernel, and the keys they may see.

    Attributes:
        queries, keys: slices of the row's queries and keys.
        read_mask: gives booleans [1, 1, q, k], or None where the kernel's own causal rule is right.
    """

    queries: slice
    keys: slice
    read_mask: Callable[[], Tensor | None]

    def take(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Its part of queries [1, h, q, d] and of keys and values [1, g, k, d]; no view is made of the whole."""
        if self.queries != WHOLE:
            queries = queries[:, :, self.queries]
        if self.keys != WHOLE:
            keys, values = keys[:, :, self.keys], values[:, :, self.keys]
        return queries, keys, values


EVERYTHING = Span(WHOLE, WHOLE, lambda: None)
"""All queries and keys of a row, without a mask."""


class RowMasks:
    """Masks of one step; a row's mask is made again only when its tokens or window change.

    Where a mask would have more than `MOST` entries, the queries are taken in spans that each have fewer, with the keys
    that none of a span may see left out, and no mask is kept.
    """

    MOST = 2**20

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._made: dict[tuple[int, int | None], tuple[Tensor, Tensor, list[Span]]] = {}

    def spans(
        self,
        row: int,
        todo: Tensor,
        read_attended: Callable[[], Tensor],
        positions: Tensor,
        window: int | None,
        *,
        new: int = 0,
        reach: Tensor | None = None,
    ) -> list[Span]:
        """How todo [q] attends to attended [k]: one span where a mask is small or none is needed, else several.

        A single query that is one of the step's `new` tokens stands behind every key there is. `reach` [t] is the last
        position each token may see; None = its own.
        """
        if todo.numel() == new == 1 and (window is None or positions.numel() <= window):
            return [EVERYTHING]
        attended = read_attended()
        made = self._made.get((row, window))
        if made is not None and torch.equal(made[0], todo) and torch.equal(made[1], attended):
            return made[2]
        queries = positions[todo]
        ahead = None if reach is None or torch.equal(reach[todo], queries) else reach[todo]
        spans = self._spans(queries, positions[attended], window, ahead)
        self._made[row, window] = (todo, attended, spans)
        return spans

    def _spans(self, queries: Tensor, keys: Tensor, window: int | None, reach: Tensor | None) -> list[Span]:
        if reach is None and not needs_mask(queries, keys, window):
            return [EVERYTHING]
        if queries.numel() * keys.numel() <= self.MOST:
            mask = self._mask(queries, keys, window, reach)
            return [Span(WHOLE, WHOLE, lambda: mask)]
        width, ordered = max(1, self.MOST // keys.numel()), is_ascending(keys)
        return [
            self._span(queries, keys, window, reach, slice(start, start + width), ordered)
            for start in range(0, queries.numel(), width)
        ]

    def _span(
        self, queries: Tensor, keys: Tensor, window: int | None, reach: Tensor | None, taken: slice, ordered: bool
    ) -> Span:
        queries, reach = queries[taken], None if reach is None else reach[taken]
        seen = WHOLE
        if ordered:
            first = 0 if window is None else int(torch.searchsorted(keys, queries[0] - window, right=True))
            last = queries[-1] if reach is None else reach.max()
            seen = slice(first, int(torch.searchsorted(keys, last, right=True)))
        return Span(taken, seen, partial(self._mask, queries, keys[seen], window, reach))

    def _mask(self, queries: Tensor, keys: Tensor, window: int | None, reach: Tensor | None) -> Tensor:
        on_device = None if reach is None else reach.to(self.device)
        return causal(queries.to(self.device), keys.to(self.device), window, on_device)[None, None]


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


@dataclass(frozen=True)
class Seen:
    """What a caller's mask says besides causality.

    Attributes:
        padding: [b, >= t] true where a real token stands; None = no padding.
        ahead: [b, t] how many columns beyond its own each new token sees; None = none does.
    """

    padding: Tensor | None = None
    ahead: Tensor | None = None


def seen_by(mask: Tensor | Seen | None) -> Seen:
    """What the stack was given as a mask."""
    return mask if isinstance(mask, Seen) else Seen(mask)


def padding_mask(
    *,
    attention_mask: Tensor | None = None,
    mask_function: Callable[..., Any] | None = None,
    allow_is_causal_skip: bool = True,
    **sizes: Any,
) -> Tensor | Seen | None:
    """The registered mask function: hands the caller's 2-D padding mask [b, t] through to the stack, and what is new.

    Raises:
        InputError: when tokens see others behind them in a way that is no block.
    """
    if allow_is_causal_skip or mask_function is None:
        return attention_mask
    return Seen(attention_mask, _ahead(mask_function, **sizes))


def _ahead(
    mask_function: Callable[..., Any], *, batch_size: int, q_length: int, q_offset: int, device: Any, **_: Any
) -> Tensor | None:
    """How many columns beyond its own each query sees [b, q]: up to the end of the block it is in; None = none does.

    Read off transformers' mask at two places per query, so that the mask is never written down.
    """
    row = rearrange(torch.arange(batch_size, device=device), "b -> b 1")
    query = repeat(torch.arange(q_length, device=device), "q -> b q", b=batch_size)
    last = q_length - 1

    def sees(key: Tensor) -> Tensor:
        inside = (key <= last) & (key > query)
        found = mask_function(row, torch.zeros_like(row), query + q_offset, key.clamp(max=last) + q_offset)
        return torch.as_tensor(found, device=device).expand_as(inside) & inside

    next_one = sees(query + 1)
    if not bool(next_one.any()):
        return None
    stop = torch.where(next_one, last, query).flip(1).cummin(1).values.flip(1)
    ahead = stop - query
    if not bool((sees(stop) == (ahead > 0)).all()) or bool(sees(stop + 1).any()):
        raise InputError(
            "tokens of this prompt see some of the tokens behind them, but not all of a block up to its end; lazyllm "
            "cannot prune such a prompt: give it as text"
        )
    return ahead
