"""Everything the cache holds for one row of the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lazyllm.caches.ledger import Ledger
from lazyllm.caches.policy import CachePolicy


@dataclass(frozen=True)
class RowMark:
    """A point a row can go back to."""

    depth: Tensor
    stored: list[int]
    reply_start: int
    last_output: Tensor | None


class Row:
    """Ledger, K/V stores and frontier of one sequence; the batch is a list of these.

    Attributes:
        ledger: depth and position of every token.
        stores: K/V, one store per layer.
        frontier: hidden states of the unfinished tokens.
        spans: protected token ranges (start, stop).
        reply_start: index of the first token that came after the last prefill step.
        last_output: [c] output of the last layer for the row's last token.
    """

    def __init__(self, layers: int, policy: CachePolicy, spans: tuple[tuple[int, int], ...]) -> None:
        self.ledger = Ledger(layers)
        self.stores = [policy.new_store() for _ in range(layers)]
        self.frontier = policy.new_frontier()
        self.spans = spans
        self.reply_start = 0
        self.last_output: Tensor | None = None

    def mark(self) -> RowMark:
        """The present state, for `restore`."""
        stored = [len(store) for store in self.stores]
        return RowMark(self.ledger.depth.clone(), stored, self.reply_start, self.last_output)

    def restore(self, mark: RowMark) -> None:
        """Goes back to `mark`; K/V and depths written since are forgotten."""
        self.ledger.restore(mark.depth)
        for store, length in zip(self.stores, mark.stored, strict=True):
            store.truncate(length)
        self.reply_start, self.last_output = mark.reply_start, mark.last_output

    def crop(self, columns: int) -> None:
        """Forgets every token from column `columns` of the batch on."""
        tokens = int((self.ledger.column < columns).sum())
        if tokens == len(self.ledger):
            return
        self.ledger.restore(self.ledger.depth[:tokens].clone())
        for store in self.stores:
            store.crop(tokens)
        self.frontier.crop(tokens)
        self.reply_start = min(self.reply_start, tokens)
        self.last_output = None

    def copy(self) -> Row:
        """An independent copy."""
        twin: Row = object.__new__(Row)
        twin.ledger = self.ledger.copy()
        twin.stores = [store.copy() for store in self.stores]
        twin.frontier = self.frontier.copy()
        twin.spans, twin.reply_start = self.spans, self.reply_start
        twin.last_output = self.last_output
        return twin

    @property
    def key_value_bytes(self) -> int:
        """Bytes of all keys and values in use."""
        return sum(store.used_bytes for store in self.stores)


def token_counts(tokens: list[Tensor]) -> list[int]:
    """How many tokens each row contributes."""
    return [row.numel() for row in tokens]


def same_tokens(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether two per-row token lists are equal."""
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))
