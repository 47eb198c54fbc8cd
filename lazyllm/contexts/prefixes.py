"""Prompts that begin alike share what was computed for the beginning."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lazyllm.caches.lazy_cache import LazyCache
from lazyllm.config import LazyConfig
from lazyllm.errors import CacheError, InputError


def common_prefix(held: Sequence[int] | Tensor, wanted: Sequence[int] | Tensor) -> int:
    """How many tokens two sequences of vocabulary ids have in common at their start."""
    left, right = (torch.as_tensor(ids, dtype=torch.long) for ids in (held, wanted))
    length = min(left.numel(), right.numel())
    differs = torch.nonzero(left[:length] != right[:length])
    return int(differs[0]) if differs.numel() else length


def held_ids(cache: LazyCache) -> Tensor:
    """Vocabulary ids [t] of the tokens of a cache of one row, -1 where the model was given an embedding.

    Raises:
        CacheError: when it has several rows, or holds padding.
    """
    if not cache.rows:
        return torch.empty(0, dtype=torch.long)
    if len(cache.rows) > 1:
        raise CacheError(f"prefixes are those of one row; the cache holds {len(cache.rows)} rows")
    ids = cache.rows[0].ledger.token_id
    if ids.numel() != cache.columns:
        raise CacheError(f"the cache holds {ids.numel()} tokens in {cache.columns} columns; the others are padding")
    return ids


def take_up(cache: LazyCache, token_ids: Sequence[int] | Tensor) -> int:
    """Crops a cache of one row to what a prompt can go on from, and returns how many tokens are left.

    That is the longest common prefix of the tokens it holds and those of the prompt, but not all of the prompt: a
    generation needs a new token. What the forgotten tokens revived stays at the depth it has.

    Raises:
        CacheError: when it has several rows, or holds padding.
    """
    held = held_ids(cache)
    kept = min(common_prefix(held, token_ids), len(token_ids) - 1)
    cache.crop(kept - held.numel())
    return kept


@dataclass(frozen=True)
class PrefixStats:
    """What a `PrefixCache` has done so far, and what it holds.

    Attributes:
        hits, misses: calls that found a beginning, and those that did not.
        reused_tokens: prompt tokens that calls found.
        evictions: entries that had to leave for want of room.
        entries: how many there are.
        bytes: what they hold, memory that they share counted for each.
    """

    hits: int = 0
    misses: int = 0
    reused_tokens: int = 0
    evictions: int = 0
    entries: int = 0
    bytes: int = 0


@dataclass(frozen=True, eq=False)
class _Entry:
    """What one call has left."""

    cache: LazyCache
    config: LazyConfig
    token_ids: Tensor

    @property
    def bytes(self) -> int:
        return self.cache.kv_bytes + self.cache.aux_bytes

    def begins(self, other: _Entry) -> bool:
        """Whether `other` holds all of its tokens, and may stand in for it."""
        if not (self.config == other.config and self.cache.has_model_of(other.cache)):
            return False
        return common_prefix(self.token_ids, other.token_ids) == self.token_ids.numel()


class PrefixCache:
    """What calls of `generate` have computed, for later calls whose prompts begin with the same tokens.

    A call goes on from a fork of the entry that shares the longest beginning with its prompt, and its outcome becomes
    an entry in turn; one whose tokens all stand at the start of another is not kept beside it. When there is more
    than `max_bytes`, the entries used longest ago leave. Entries are found by pipelines of the same model and
    configuration alone.

    Under pruning a call that goes on does not repeat what a call of its own would have done. The beginning was computed
    with the tokens that an earlier prompt's question let in, and is taken as deep as that question needed; this call
    takes deeper what its own question needs. So no layer computes a token twice, but a reply may differ with the calls
    before it. At keep ratio 1 it does not. With a cache that does not revive, such as `DropCache`, what an earlier
    question left out stays out.

    Threads may share one; they take turns at it.

    Args:
        max_bytes: of keys, values and waiting states, that of forks counted in full.
        min_tokens: a shorter common beginning is not worth a fork.

    Raises:
        InputError: for numbers below 1.
    """

    def __init__(self, *, max_bytes: int = 2**30, min_tokens: int = 32) -> None:
        for name, number in {"max_bytes": max_bytes, "min_tokens": min_tokens}.items():
            if number < 1:
                raise InputError(f"{name} of a PrefixCache is a number from 1 on, not {number}")
        self.max_bytes, self.min_tokens = max_bytes, min_tokens
        self._lock = threading.Lock()
        self._entries: list[_Entry] = []  # used longest ago first
        self._stats = PrefixStats()

    @property
    def stats(self) -> PrefixStats:
        """Counts so far."""
        with self._lock:
            held = sum(entry.bytes for entry in self._entries)
            return replace(self._stats, entries=len(self._entries), bytes=held)

    def clear(self) -> None:
        """Forgets all entries; counts go on."""
        with self._lock:
            self._entries = []

    def take(self, empty: LazyCache, config: LazyConfig, token_ids: Sequence[int]) -> LazyCache:
        """A cache that holds the longest known beginning of `token_ids`, or `empty`, which is bound to the model."""
        with self._lock:
            found = self._find(empty, config, token_ids)
            if found is None:
                self._stats = replace(self._stats, misses=self._stats.misses + 1)
                return empty
            self._entries.remove(found)
            self._entries.append(found)
            cache = found.cache.fork()
            kept = take_up(cache, token_ids)
            counts = self._stats
            self._stats = replace(counts, hits=counts.hits + 1, reused_tokens=counts.reused_tokens + kept)
            return cache

    def _find(self, empty: LazyCache, config: LazyConfig, token_ids: Sequence[int]) -> _Entry | None:
        """The entry with the longest common beginning, of equals the latest used."""
        known = [entry for entry in self._entries if entry.config == config and entry.cache.has_model_of(empty)]
        shared = [common_prefix(entry.token_ids, token_ids) for entry in known]
        best = max(range(len(known)), key=lambda index: (shared[index], index), default=None)
        return None if best is None or min(shared[best], len(token_ids) - 1) < self.min_tokens else known[best]

    def put(self, cache: LazyCache, config: LazyConfig) -> None:
        """Stores a cache that is not used otherwise from here on, unless it alone is too large."""
        new = _Entry(cache, config, held_ids(cache).clone())
        if new.bytes > self.max_bytes:
            return
        cache.trim()
        with self._lock:
            self._entries = [entry for entry in self._entries if not entry.begins(new)]
            if not any(new.begins(entry) for entry in self._entries):
                self._entries.append(new)
            self._make_room()

    def _make_room(self) -> None:
        held = sum(entry.bytes for entry in self._entries)
        while held > self.max_bytes:
            held -= self._entries.pop(0).bytes
            self._stats = replace(self._stats, evictions=self._stats.evictions + 1)
