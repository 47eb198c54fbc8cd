"""What a forward call brings: columns of the batch, padding included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lazyllm.caches.row import Row
from lazyllm.errors import InputError


@dataclass(frozen=True)
class Arrival:
    """New columns, and what is known about them.

    Attributes:
        hidden: [b, t, c] embeddings.
        padding: 2-D mask [b, >= t], true where a real token stands; None = no padding.
        position_ids: [b or 1, t]; None = counted on.
        places: [3 or 1, b or 1, t] where a RoPE with several axes sees the tokens; None = at their positions.
        ahead: [b, t] how many columns beyond its own each token sees; None = none does.
        token_ids: [b, t] vocabulary ids, if they are known.
        read_last: how many columns at the end will have their logits read; None = all of them, as far as is known.
    """

    hidden: Tensor
    padding: Tensor | None = None
    position_ids: Tensor | None = None
    places: Tensor | None = None
    ahead: Tensor | None = None
    token_ids: Tensor | None = None
    read_last: int | None = None

    def __post_init__(self) -> None:
        """Refuses a mask that does not fit.

        Raises:
            InputError: with its shape.
        """
        mask = self.padding
        if mask is not None and (mask.ndim != 2 or mask.shape[0] != self.rows or mask.shape[1] < self.width):
            raise InputError(
                f"the attention mask must be 2-D, {self.rows} rows by at least {self.width} columns, "
                f"got shape {tuple(mask.shape)}"
            )

    @property
    def rows(self) -> int:
        """How many rows the batch has."""
        return self.hidden.shape[0]

    @property
    def width(self) -> int:
        """How many columns there are."""
        return self.hidden.shape[1]

    def parts(self, columns: int) -> Iterator[Arrival]:
        """The first `columns` and the rest, as far as there are any."""
        if not 0 < columns < self.width:
            yield self
            return
        behind = self.width - columns
        yield replace(
            self._columns(slice(0, columns)),
            padding=None if self.padding is None else self.padding[:, :-behind],
            read_last=self.read_last and max(1, self.read_last - behind),
        )
        yield self._columns(slice(columns, self.width))

    def _columns(self, place: slice) -> Arrival:
        return replace(
            self,
            hidden=self.hidden[:, place],
            position_ids=None if self.position_ids is None else self.position_ids[:, place],
            places=None if self.places is None else self.places[..., place],
            ahead=None if self.ahead is None else self.ahead[:, place],
            token_ids=None if self.token_ids is None else self.token_ids[:, place],
        )

    def of_rows(self, indices: Sequence[int]) -> Arrival:
        """What some of the rows are brought."""
        if len(indices) == self.rows:
            return self
        positions, places = self.position_ids, self.places
        return replace(
            self,
            hidden=self.hidden[indices],
            padding=None if self.padding is None else self.padding[indices],
            position_ids=positions if positions is None or positions.shape[0] == 1 else positions[indices],
            places=places if places is None or places.shape[1] == 1 else places[:, indices],
            ahead=None if self.ahead is None else self.ahead[indices],
            token_ids=None if self.token_ids is None else self.token_ids[indices],
        )

    def same(self, row: int, other: int) -> bool:
        """Whether two rows are brought the same."""
        recent = None if self.padding is None else self.padding[:, -self.width :]
        positions = None if self.position_ids is None else self.position_ids.expand(self.rows, -1)
        places = None if self.places is None else self.places.expand(-1, self.rows, -1).movedim(1, 0)
        parts = (self.token_ids, recent, positions, places, self.ahead, self.hidden)
        return all(part is None or torch.equal(part[row], part[other]) for part in parts)

    def told_apart(self, rows: Sequence[Row]) -> list[Row]:
        """By row of the batch, its row of the cache: one that stands at several places stays one where all are alike.

        Where they are brought different columns, each kind but the first gets a copy.
        """
        told: list[Row] = []
        firsts: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            kinds = firsts.setdefault(id(row), [])
            alike = next((first for first in kinds if self.same(first, place)), None)
            if alike is None:
                told.append(row.copy() if kinds else row)
                kinds.append(place)
            else:
                told.append(told[alike])
        return told
