"""The cache a generation owns, and the view of it that one layer gets to see."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Cache

from lazyllm.caches.indexing import is_ascending
from lazyllm.caches.policy import CachePolicy
from lazyllm.caches.row import PromptMarks, Row, RowMark, copied, distinct, token_counts
from lazyllm.errors import CacheError, InputError
from lazyllm.models.fingerprint import fingerprint


@dataclass(frozen=True)
class CacheMark:
    """A point a cache can go back to; a row that stands at several places has one mark."""

    rows: list[Row]
    row_marks: list[RowMark]


class LazyCache(Cache):
    """K/V, depths and frontier states of a batch, usable wherever transformers takes a cache.

    It binds itself to the first model that uses it. Its sequence length is the number of columns that its longest row
    has seen, padding included, whatever was pruned. Rows of the batch that nothing has told apart yet, such as the
    beams of a prompt, are one row at several places of `rows`: it is computed once, and copied when their tokens
    differ.

    Args:
        policy: what happens to pruned tokens and what is attended.
        marks: protected and query tokens, one entry per prompt.
    """

    def __init__(self, policy: CachePolicy, *, marks: Sequence[PromptMarks] = ()) -> None:
        super().__init__(layers=[])
        self.policy = policy
        self.marks = list(marks)
        self.rows: list[Row] = []
        self.prompt_columns: int | None = None
        self._given_columns, self._copies = 0, 1
        self._decoder: weakref.ref[nn.Module] | None = None
        self._adapters: str | None = None
        self._claims: set[str] = set()

    # -- binding ---------------------------------------------------------------------------------

    def bind(self, decoder: nn.Module, adapters: str | None = None) -> None:
        """Ties the cache to the model that uses it, and to the adapters that it runs with.

        Raises:
            CacheError: when it already belongs to another model, or to other adapters.
        """
        if self._decoder is None:
            self._decoder = weakref.ref(decoder)
        elif self._decoder() is not decoder:
            raise CacheError("this cache was filled by another model; make one with new_cache() of this pipeline")
        if self.rows and adapters != self._adapters:
            raise CacheError(
                f"this cache was filled with the adapters {self._adapters or 'off'}, the model now has "
                f"{adapters or 'them off'}; make a cache for each with new_cache()"
            )
        self._adapters = adapters

    def has_model_of(self, other: LazyCache) -> bool:
        """Whether both are bound to the same model."""
        decoder = None if self._decoder is None else self._decoder()
        return decoder is not None and other._decoder is not None and decoder is other._decoder()

    def fingerprint(self) -> str | None:
        """Of the decoder the cache is bound to; None before its first step.

        Raises:
            CacheError: when that decoder is gone.
        """
        if self._decoder is None:
            return None
        decoder = self._decoder()
        if decoder is None:
            raise CacheError("the model that filled this cache is gone, so its fingerprint cannot be taken")
        return fingerprint(decoder, self._adapters)

    def open_rows(self, rows: int, layers: int) -> None:
        """Makes the rows at the first step, one for each prompt, and checks the batch size at later ones.

        Raises:
            CacheError: when the batch has other rows.
        """
        if not self.rows:
            prompts = [Row(layers, self.policy, marks) for marks in self._prompt_marks(rows)]
            self.rows = [row for row in prompts for _ in range(rows // len(prompts))]
        elif len(self.rows) * self._copies == rows:
            self.batch_repeat_interleave(self._copies)
        elif len(self.rows) != rows:
            raise CacheError(f"the cache holds {len(self.rows)} rows, the batch has {rows}")

    def mark_prompts(self, marks: Sequence[PromptMarks]) -> None:
        """Takes up what is known about the prompts of a further turn.

        Raises:
            CacheError: when the rows are not a multiple of the prompts.
        """
        self.marks = list(marks)
        if not self.rows:
            return
        prompts = self._prompt_marks(len(self.rows))
        each = len(self.rows) // len(prompts)
        rows: list[Row] = []
        for number, known in enumerate(prompts):
            own = self.rows[number * each : (number + 1) * each]
            own = copied(own) if any(row is other for row in own for other in rows) else own
            for row in distinct(own):
                row.take_up(known)
            rows += own
        self.rows = rows

    def _prompt_marks(self, rows: int) -> list[PromptMarks]:
        """Those of the prompts; where nothing is known, each row is one."""
        prompts = self.marks or [PromptMarks()] * rows
        if rows % len(prompts):
            raise CacheError(f"the cache has marks for {len(prompts)} prompts, the batch has {rows} rows")
        return prompts

    @contextmanager
    def replying(self, marks: Sequence[PromptMarks], columns: int, *, copies: int = 1) -> Iterator[None]:
        """Knows the prompts while their replies are made.

        Where the cache lacks only the last of their columns, as it does of a reply that it has made, the reply goes on:
        nothing is prefill, and what is known of its prompt stays.

        Args:
            marks: of the prompts, one each.
            columns: how many columns the prompts have, those that the cache holds included.
            copies: how many rows the batch has for each prompt; the cache may still have one.

        Raises:
            CacheError: when the rows are not a multiple of the prompts.
        """
        goes_on = bool(self.rows) and self.columns == columns - 1 and all(row.is_replying for row in self.rows)
        if not goes_on:
            self.mark_prompts(marks)
        self.prompt_columns, self._given_columns, self._copies = columns - goes_on, columns, copies
        try:
            yield
        finally:
            self.prompt_columns, self._given_columns, self._copies = None, 0, 1

    def is_prefill(self, width: int) -> bool:
        """Whether a step of `width` columns brings tokens of a prompt.

        While a reply is made it is known where the prompt ends. Else several columns are taken for one, and the first.
        """
        if self.prompt_columns is not None:
            return self.columns < self.prompt_columns
        return width > 1 or not self.columns

    @property
    def prompt_left(self) -> int:
        """How many columns of the prompt are still to come; 0 where that is not known."""
        return max(0, (self.prompt_columns or 0) - self.columns)

    def repeats(self, width: int) -> bool:
        """Whether a step of `width` columns begins with those that are here: while some are missing, it has all."""
        return 0 < self.columns < self._given_columns <= width

    @contextmanager
    def claim(self, use: Literal["question", "generation", "step"]) -> Iterator[None]:
        """Claims the cache for one question to a document, for one generation, or for one step of it.

        Raises:
            CacheError: when it is claimed for the same use already.
        """
        if use in self._claims:
            raise CacheError(f"this cache is in use by another {use}; give each its own, or wait for it to end")
        self._claims.add(use)
        try:
            yield
        finally:
            self._claims.discard(use)

    def mark(self) -> CacheMark:
        """The present state, for `restore`."""
        rows = distinct(self.rows)
        return CacheMark(list(self.rows), [row.mark() for row in rows])

    def restore(self, mark: CacheMark) -> None:
        """Goes back to `mark`, taken before the step that failed."""
        self.rows = mark.rows
        for row, row_mark in zip(distinct(mark.rows), mark.row_marks, strict=True):
            row.restore(row_mark)

    # -- what transformers asks of a cache ---------------------------------------------------------

    @property
    def columns(self) -> int:
        """How many columns the longest row has seen, padding included."""
        return max((row.columns for row in self.rows), default=0)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns seen so far, padding included."""
        return self.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys, as transformers counts them."""
        return self.columns + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no limit."""
        return -1

    @property
    def batch_size(self) -> int:
        """Number of rows, -1 before the first step."""
        return len(self.rows) or -1

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can take columns back. What a step revived of older tokens stays: it is right at any time."""
        return True

    @property
    def is_linear(self) -> list[bool]:
        """Not one layer keeps a running state in place of keys and values; an empty list would say that all do."""
        return [False]

    @property
    def is_initialized(self) -> bool:
        """Whether a step has run."""
        return bool(self.rows)

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: only a LayerView writes K/V.

        Raises:
            CacheError: always.
        """
        raise CacheError("a LazyCache works only while its pipeline is attached: use pipe.generate or pipe.attached()")

    def reset(self) -> None:
        """Forgets everything but the policy, the marks and the model."""
        self.rows = []

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` columns of every row.

        Raises:
            InputError: for a positive number, or more columns than there are.
        """
        shortest = min((row.columns for row in self.rows), default=0)
        if tokens_to_remove > 0 or -tokens_to_remove > shortest:
            raise InputError(
                f"crop takes minus the number of columns to remove, {-shortest} to 0, not {tokens_to_remove}"
            )
        if tokens_to_remove < 0:
            for row in distinct(self.rows):
                row.crop(row.columns + tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` is, and goes on by itself."""
        self.rows = [self.rows[index] for index in beam_idx.tolist()]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row `repeats` times; they go on by themselves."""
        self.rows = [row for row in self.rows for _ in range(repeats)]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows at `indices`, integers or booleans."""
        rows = torch.arange(len(self.rows))
        self.rows = [self.rows[index] for index in rows[indices.cpu()].tolist()]

    # -- several of one ----------------------------------------------------------------------------

    def fork(self) -> LazyCache:
        """A cache that goes on from here by itself, for many replies over one context.

        Both share their tensors until one of them writes; then each K/V store that grows is copied as a whole.

        Raises:
            CacheError: in the middle of a step.
        """
        self._refuse_mid_step()
        twin = LazyCache(self.policy, marks=self.marks)
        twin.rows = copied(self.rows)
        twin._decoder, twin._adapters = self._decoder, self._adapters
        return twin

    def join(self, other: LazyCache, *, moved: int = 0) -> LazyCache:
        """A cache that holds the tokens of this one and those of `other` behind them; both stay as they are.

        The tokens of either were computed without those of the other, and keep their positions.

        Args:
            other: of the same model and policy.
            moved: added to the positions of its tokens, which works while no layer has computed any of them.

        Raises:
            CacheError: when they do not fit, or positions of `other` do not come behind all of this one's.
        """
        other._refuse_mid_step()
        twin = self.fork()
        if self._decoder is None or other._decoder is None or self._decoder() is not other._decoder():
            raise CacheError("two caches can be joined when one model has filled both")
        if self.policy != other.policy or len(self.rows) != len(other.rows):
            raise CacheError(
                f"caches to be joined need the same policy and number of rows, got {self.policy} with "
                f"{len(self.rows)} and {other.policy} with {len(other.rows)}"
            )
        for row, more in zip(twin.rows, other.rows, strict=True):
            row.join(more, moved=moved)
        return twin

    @classmethod
    def beside(cls, caches: Sequence[LazyCache]) -> LazyCache:
        """One batch of the rows of several caches, which may differ in length: a step of it is a step of each.

        The rows are shared, not copied. For decode steps: what is known of prompts stays with the rows.

        Args:
            caches: one or more, of the same model and policy, none of them in the middle of a step.

        Raises:
            CacheError: when they are of different models, adapters or policies.
        """
        first = caches[0]
        batch = cls(first.policy)
        batch._decoder, batch._adapters = first._decoder, first._adapters
        for cache in caches:
            cache._refuse_mid_step()
            if not cache.has_model_of(first) or (cache.policy, cache._adapters) != (first.policy, first._adapters):
                raise CacheError("caches side by side need the same model, adapters and policy")
            batch.rows += cache.rows
        return batch

    def trim(self) -> None:
        """Gives back memory that the cache has beyond what is in use, such as room to grow; takes a copy of its parts.

        Raises:
            CacheError: in the middle of a step.
        """
        self._refuse_mid_step()
        for row in distinct(self.rows):
            row.trim()

    def save(self, path: str | Path, *, note: str = "") -> Path:
        """Writes the cache to one file in the safetensors format, which `pipe.load_cache` reads.

        What was at `path` before stays until the new file is complete. Takes the bytes of the cache once more in CPU
        memory while it writes.

        Args:
            path: the file.
            note: anything that belongs to the cache, kept and checked with it.

        Raises:
            CacheError: in the middle of a step, when the model is gone, or when the file cannot be written.
        """
        from lazyllm.caches.saved import save_cache  # which needs this class

        self._refuse_mid_step()
        return save_cache(self, path, note=note)

    def _refuse_mid_step(self) -> None:
        if "step" in self._claims:
            raise CacheError("this cache is in the middle of a step; wait for the step to end")

    # -- what it holds -----------------------------------------------------------------------------

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values in use, those shared with a fork included."""
        return sum(row.key_value_bytes for row in distinct(self.rows))

    @property
    def aux_bytes(self) -> int:
        """Bytes of frontier states, and of states a scorer looks back on."""
        return sum(row.aux_bytes for row in distinct(self.rows))

    @property
    def offloaded_bytes(self) -> int:
        """How many of the `aux_bytes` are not on the model's device, but in CPU memory or on the disk."""
        return sum(row.offloaded_bytes for row in distinct(self.rows))

    def __repr__(self) -> str:
        tokens = [len(row.ledger) for row in self.rows]
        return f"LazyCache({self.policy}, tokens={tokens}, kv_bytes={self.kv_bytes}, aux_bytes={self.aux_bytes})"


class LayerView:
    """What one layer sees of the cache during one step; the only writer of K/V.

    Attributes:
        todo: by row, the tokens [t] whose K/V the layer is about to hand over.
    """

    MANY = 256

    def __init__(
        self, rows: Sequence[Row], policy: CachePolicy, layer: int, todo: list[Tensor], visible: list[Tensor]
    ) -> None:
        self.policy, self.todo, self._visible = policy, todo, visible
        self._stores = [row.stores[layer] for row in rows]
        self._held = [len(store) for store in self._stores]
        self._attends_all = [self._is_all(*row) for row in zip(self._held, todo, visible, strict=True)]

    def _is_all(self, held: int, todo: Tensor, visible: Tensor) -> bool:
        return bool(todo.numel()) and (self.policy.attend == "cached" or visible.numel() == held + todo.numel())

    def pieces(self, most: int) -> Iterator[tuple[slice, LayerView]]:
        """Views of at most `most` tokens in order of position, each with its place on the packed axis.

        A piece attends to what comes before it, so each must be stored before the next one is asked for.
        """
        counts = token_counts(self.todo)
        total = sum(counts)
        if total <= most:
            yield slice(0, total), self
            return
        for store, held, count in zip(self._stores, self._held, counts, strict=True):
            store.reserve(held + count)
        ends = list(accumulate(counts))
        for start in range(0, total, most):
            stop = min(start + most, total)
            todo = [
                tokens[max(start - end + count, 0) : max(stop - end + count, 0)]
                for tokens, count, end in zip(self.todo, counts, ends, strict=True)
            ]
            yield slice(start, stop), self._piece(todo)

    def _piece(self, todo: list[Tensor]) -> LayerView:
        piece = copy(self)
        piece.todo = todo
        piece._held = [len(store) for store in self._stores]
        piece._visible = [
            visible[: int(torch.searchsorted(visible, tokens[-1], right=True))] if tokens.numel() else visible
            for visible, tokens in zip(self._visible, todo, strict=True)
        ]
        return piece

    def peeking(self) -> LayerView:
        """The same view, which stores nothing: `update` writes to copies."""
        peeking = copy(self)
        peeking._stores = [store.copy() for store in self._stores]
        return peeking

    @property
    def copies(self) -> bool:
        """Whether `update` copies what it is given, and keeps no reference to it."""
        return all(held for held, todo in zip(self._held, self.todo, strict=True) if todo.numel())

    def attended(self, row: int) -> Tensor:
        """The tokens [k] of a row whose K/V `update` has returned for it, in that order."""
        if not self._attends_all[row]:
            return self._visible[row]
        tokens = self._stores[row].tokens if self._held[row] else self.todo[row]
        return tokens.sort().values if self._reorders(row) else tokens

    def _reorders(self, row: int) -> bool:
        """Whether to hand over keys in order of position, so that early queries need not look at later keys.

        Reviving 4,000 of 4,096 tokens at once takes half of the attention's time this way; a few queries are not worth
        the copy.
        """
        return self.todo[row].numel() >= self.MANY and not is_ascending(self._stores[row].tokens)

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Stores keys and values [1, g, t, d] of the packed todo; returns those attended [1, g, k, d], by row.

        A layer hands them on to its attention as they are. Packed they would be a copy of all rows at each layer.
        """
        rows = [row for row, todo in enumerate(self.todo) if todo.numel()]
        if len(rows) == 1:  # nothing to split, which takes its time at each layer
            key, value = self._update_row(rows[0], keys, values)
            return [key], [value]
        counts = [self.todo[row].numel() for row in rows]
        new = zip(rows, keys.split(counts, dim=2), values.split(counts, dim=2), strict=True)
        attended = [self._update_row(*row) for row in new]
        return [part for part, _ in attended], [part for _, part in attended]

    def _update_row(self, row: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        store = self._stores[row]
        store.append(self.todo[row], keys, values)
        if not self._held[row] and self._attends_all[row] and store.is_exact:
            return keys, values
        if not self._attends_all[row] or self._reorders(row):
            return store.gather(self.attended(row))
        return store.read()
