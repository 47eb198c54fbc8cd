"""One pass through the layers as a transaction on the cache: all of it happens, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from torch import Tensor

from lazyllm.caches.arrival import Arrival
from lazyllm.caches.lazy_cache import LayerView, LazyCache
from lazyllm.caches.ledger import AXES
from lazyllm.caches.row import Row, distinct, places_of, same_tokens, token_counts
from lazyllm.callbacks import Choice
from lazyllm.errors import InputError
from lazyllm.policies.base import layer_number


@dataclass(frozen=True)
class Parked:
    """Tokens of a row that stopped in this step, and the states they stopped with."""

    row: int
    tokens: Tensor
    states: Tensor


@contextmanager
def open_step(cache: LazyCache, arrival: Arrival, *, layers: int) -> Iterator[Step]:
    """A step over new columns that is committed at the end, or rolled back if anything raises.

    Args:
        cache: the cache to work on.
        arrival: what the step brings.
        layers: number of layers of the model.

    Raises:
        CacheError: when the cache is in the middle of another step, or of another batch size.
        InputError: for positions that cannot be.
    """
    with cache.claim("step"):
        mark = cache.mark()
        try:
            cache.open_rows(arrival.rows, layers)
            cache.rows = arrival.told_apart(cache.rows)
            step = Step(cache, arrival)
            yield step
            step.commit()
        except BaseException:
            cache.restore(mark)
            raise


class Step:
    """The tokens of a forward call on their way through the layers, all rows packed behind each other.

    Rows of the batch that are one row of the cache, since nothing has told them apart yet, go this way once.

    Attributes:
        rows: the cache's rows, each once.
        places: by row of the batch, which of `rows` it is.
        new: by row, the tokens this call brought.
        replied: by row, which tokens of its reply have become certain.
        flight: by row, the tokens computed by the latest layer, ascending; before the first, `new`.
        reached: how many layers have computed the tokens in flight.
        states: [1, t, c] their hidden states, packed.
        token_positions: by row, the position [t] of every token.
        is_prefill: whether it brings tokens of a prompt.
        selects: by row, whether its tokens are chosen anew in this step.
        most_revived: how many older tokens of a row the step may revive, None = any number.
        looks_ahead: whether tokens of a row see others behind them, so that it must be computed in one piece.
        choices: by row, how the tokens that enter the present layer were chosen, for those who are told.
    """

    def __init__(self, cache: LazyCache, arrival: Arrival) -> None:
        self.cache = cache
        self.rows: list[Row] = distinct(cache.rows)
        self.places = places_of(cache.rows)
        arrival = arrival.of_rows([self.places.index(index) for index in range(len(self.rows))])
        self.batch, self.width = arrival.rows, arrival.width
        self.is_prefill = cache.is_prefill(self.width)
        self._read_last = arrival.read_last
        self._parked: list[Parked] = []
        self._revived: list[list[Tensor]] = [[] for _ in self.rows]
        self._evicted: list[tuple[int, int, Tensor]] = []
        self._real = self._real_columns(arrival.padding)
        self.states = self._pack(arrival.hidden)
        positions = self._row_positions(arrival.position_ids)
        places = self._row_places(arrival.places, positions)
        self.new = self._append(positions, arrival.token_ids, places, arrival.ahead)
        self.looks_ahead = any(row.ledger.reach is not None for row in self.rows)
        self.token_positions = [row.ledger.position for row in self.rows]
        self.flight = self.new
        self.choices: dict[int, Choice] = {}
        self.reached = 0
        self._visible: list[Tensor] | None = None
        self._received: Tensor | None = None
        retreat = cache.policy.retreat
        layers = self.rows[0].ledger.layers
        self._retreat_layer = None if retreat is None else layer_number(retreat.layer, layers, owner=cache.policy)
        self.selects = [self._selects(replied) for replied in self.replied]
        self.most_revived = None if self.is_prefill else cache.policy.most_revived

    # -- opening -----------------------------------------------------------------------------------

    def _real_columns(self, padding: Tensor | None) -> list[Tensor]:
        """By row, the columns [t] of this call that hold real tokens."""
        everything = torch.arange(self.width)
        if padding is None:
            return [everything] * self.batch
        recent = padding[:, -self.width :].cpu().bool()
        return [everything[row] for row in recent]

    def _row_positions(self, position_ids: Tensor | None) -> list[Tensor]:
        """By row, the positions [t] of its new tokens.

        Positions that do not continue the row are counted on from its last token: transformers'
        generate counts from the padding when that stands on the right.
        """
        given = None if position_ids is None else position_ids.cpu().expand(self.batch, -1)
        rows = []
        for index, (row, columns) in enumerate(zip(self.rows, self._real, strict=True)):
            last = int(row.ledger.position[-1]) if len(row.ledger) else -1
            positions = last + 1 + torch.arange(columns.numel()) if given is None else given[index][columns]
            if positions.numel() and positions[0] <= last:
                positions = positions - positions[0] + last + 1
            if not bool((positions.diff() > 0).all()):
                place, got = self.places.index(index), positions.tolist()[:16]
                raise InputError(f"positions of row {place} must rise from token to token, got {got}")
            rows.append(positions)
        return rows

    def _row_places(self, places: Tensor | None, positions: list[Tensor]) -> list[Tensor | None]:
        """By row, where its new tokens [t, 3] stand along the axes of RoPE.

        They go on behind the row's last ones: a model that counts from what it saw in the prompt before, which may have
        been another row's, is put right.
        """
        if places is None:
            return [None] * self.batch
        given = rearrange(places.cpu().expand(AXES, self.batch, -1), "a b t -> b t a")
        found: list[Tensor | None] = []
        for row, columns, where, own in zip(self.rows, self._real, positions, given, strict=True):
            own = own[columns]
            if len(row.ledger) and columns.numel():
                own = own - own[0].min() + where[0] + row.ledger.ahead
            found.append(own)
        return found

    def _pack(self, hidden: Tensor) -> Tensor:
        """Real tokens of hidden [b, t, c] behind each other, [1, t, c]."""
        if sum(token_counts(self._real)) == self.batch * self.width:
            return rearrange(hidden, "b t c -> 1 (b t) c")
        return torch.cat([hidden[row, columns.to(hidden.device)] for row, columns in enumerate(self._real)])[None]

    def _append(
        self, positions: list[Tensor], token_ids: Tensor | None, places: list[Tensor | None], ahead: Tensor | None
    ) -> list[Tensor]:
        """Enters the new tokens in the ledgers, at depth 0."""
        ids = None if token_ids is None else token_ids.cpu()
        further = None if ahead is None else ahead.cpu()
        new = [
            row.ledger.append(
                where,
                real + row.columns,
                None if ids is None else ids[index, real],
                place=places[index],
                reach=None if further is None else where + further[index, real],
            )
            for index, (row, where, real) in enumerate(zip(self.rows, positions, self._real, strict=True))
        ]
        for row in self.rows:
            row.columns += self.width
        self.replied = [self._count(row, tokens) for row, tokens in zip(self.rows, new, strict=True)]
        return new

    def _count(self, row: Row, new: Tensor) -> range:
        """Which tokens of a row's reply, from 1, are certain now and were not before; only 0 in a prefill.

        Of several new ones only the first is: the others are candidates, and may be taken back.
        """
        if self.is_prefill:
            row.reply_start, row.counted = len(row.ledger), 0
            return range(1)
        counted, row.counted = row.counted, len(row.ledger) - row.reply_start - max(new.numel() - 1, 0)
        return range(counted + 1, row.counted + 1)

    def _selects(self, replied: range) -> bool:
        policy = self.cache.policy
        if self.is_prefill or not policy.prunes:
            return policy.prunes
        return any(map(policy.selects_in_decode, replied))

    # -- the way through the layers ------------------------------------------------------------------

    def todo(self, visible: list[Tensor], layer: int) -> list[Tensor]:
        """By row, the visible tokens whose next layer is `layer` (law 2)."""
        unchanged, self._visible = visible is self._visible, visible
        if unchanged and not any(self.any_stopped(row, layer) for row in range(len(self.rows))):
            return self.flight
        ready = [row.ledger.ready(tokens, layer) for row, tokens in zip(self.rows, visible, strict=True)]
        return self.flight if same_tokens(ready, self.flight) else ready

    def pending(self, todo: list[Tensor]) -> Tensor:
        """Hidden states [1, t, c] of `todo`: those in flight, and revived ones from where they stopped.

        Tokens in flight that are not in `todo` were pruned: they are parked.
        """
        if todo is not self.flight:
            packed = self.row_states()
            self.states = torch.cat([self._next_states(row, todo[row], states) for row, states in enumerate(packed)])[
                None
            ]
            self.flight = todo
        return self.states

    def _next_states(self, row: int, todo: Tensor, states: Tensor) -> Tensor:
        flight = self.flight[row]
        goes_on = torch.isin(flight, todo, assume_unique=True)
        if not bool(goes_on.all()):
            stops = ~goes_on
            self._parked.append(Parked(row, flight[stops], states[stops.to(states.device)]))
            states = states[goes_on.to(states.device)]
        if todo.numel() == states.shape[0]:
            return states
        revived = ~torch.isin(todo, flight, assume_unique=True)
        self._revived[row].append(todo[revived])
        return self._with_revived(row, todo, states, revived)

    def _with_revived(self, row: int, todo: Tensor, states: Tensor, revived: Tensor) -> Tensor:
        """States [t, c] of `todo`, given those of the tokens that are not `revived` [t]."""
        merged = states.new_empty(todo.numel(), states.shape[-1])
        merged[(~revived).to(states.device)] = states
        merged[revived.to(states.device)] = self.rows[row].frontier.read(todo[revived]).to(states)
        return merged

    def row_states(self) -> tuple[Tensor, ...]:
        """By row, the states [t, c] of the tokens in flight."""
        return self.states[0].split(token_counts(self.flight))

    def peek(self, visible: list[Tensor], layer: int) -> tuple[list[Tensor], Tensor]:
        """What `layer` would compute were all of `visible` to enter it: by row the tokens, and their states [1, t, c].

        To be asked between the layer before and `layer`; changes nothing.
        """
        todo = [row.ledger.ready(tokens, layer) for row, tokens in zip(self.rows, visible, strict=True)]
        packed = self.row_states()
        return todo, torch.cat([self._peek_row(row, todo[row], states) for row, states in enumerate(packed)])[None]

    def _peek_row(self, row: int, todo: Tensor, states: Tensor) -> Tensor:
        goes_on = torch.isin(self.flight[row], todo, assume_unique=True)
        revived = ~torch.isin(todo, self.flight[row], assume_unique=True)
        states = states[goes_on.to(states.device)]
        return self._with_revived(row, todo, states, revived) if bool(revived.any()) else states

    def any_stopped(self, row: int, layer: int) -> bool:
        """Whether tokens of a row stopped just before `layer` in an earlier step."""
        in_flight = self.flight[row].numel() if self.reached == layer else 0
        return self.rows[row].ledger.at_depth[layer] > in_flight

    def stopped(self, row: int, layer: int, tokens: Tensor) -> Tensor:
        """Which of `tokens` [v], none of which stopped earlier, stopped just before `layer` in an earlier step."""
        if not self.any_stopped(row, layer):
            return torch.zeros(tokens.numel(), dtype=torch.bool)
        return (self.rows[row].ledger.depth[tokens] <= layer) & ~torch.isin(
            tokens, self.flight[row], assume_unique=True
        )

    def without_stopped(self, row: int, layer: int, tokens: Tensor) -> Tensor:
        """Leaves out the tokens that stopped before `layer` in an earlier step."""
        if not self.any_stopped(row, layer):
            return tokens
        return tokens[~self.stopped(row, layer, tokens)]

    def new_among(self, row: int, todo: Tensor) -> int:
        """How many of the row's tokens to compute are new in this step."""
        new = self.new[row]
        return todo.numel() if todo is new or not new.numel() else int((todo >= new[0]).sum())

    def revived_tokens(self, row: int) -> int:
        """How many older tokens of a row this step has revived so far."""
        return sum(tokens.numel() for tokens in self._revived[row])

    def positions(self, todo: list[Tensor] | None = None) -> Tensor:
        """Positions [1, t] of the packed tokens in flight, or of others."""
        tokens = self.flight if todo is None else todo
        parts = [positions[row] for positions, row in zip(self.token_positions, tokens, strict=True)]
        return torch.cat(parts)[None].to(self.states.device)

    def rope_positions(self, positions: Tensor, todo: list[Tensor] | None = None) -> Tensor:
        """Where RoPE sees the packed tokens at `positions`: there, or along its axes [3, 1, t]."""
        known = [row.ledger.place for row in self.rows]
        if all(place is None for place in known):
            return positions
        tokens = self.flight if todo is None else todo
        parts = [place[row] for place, row in zip(known, tokens, strict=True) if place is not None]
        return rearrange(torch.cat(parts), "t a -> a 1 t").to(self.states.device)

    def view(self, layer: int, visible: list[Tensor]) -> LayerView:
        """The cache as `layer` sees it."""
        return self.view_of(layer, self.flight, visible)

    def view_of(self, layer: int, todo: list[Tensor], visible: list[Tensor]) -> LayerView:
        """The cache as `layer` sees it when it computes other tokens than those in flight."""
        return LayerView(self.rows, self.cache.policy, layer, todo, visible)

    def receive(self, place: slice, states: Tensor) -> None:
        """Takes the layer's output [1, t, c] for the packed tokens at `place`."""
        tokens = self.states.shape[1]
        if place == slice(0, tokens):
            self._received = states
            return
        if self._received is None:
            self._received = states.new_empty(1, tokens, states.shape[-1])
        self._received[:, place] = states

    def advance(self, layer: int) -> None:
        """The tokens in flight, whose output was received, are one layer deeper."""
        assert self._received is not None, "a layer that ran gave its output"
        self.states, self._received = self._received, None
        self.reached = layer + 1
        for row, tokens in zip(self.rows, self.flight, strict=True):
            row.ledger.advance(tokens, layer)
        if layer + 1 == self._retreat_layer:
            for row, tokens, states in zip(self.rows, self.flight, self.row_states(), strict=True):
                row.origins.append(tokens, states)

    def evict(self, row: int, layer: int, slots: Tensor) -> None:
        """Says that of a row's store at `layer` only `slots` are to stay once the step is done."""
        self._evicted.append((row, layer, slots))

    def read_range(self, row: int) -> tuple[int, int]:
        """Token range of the row whose logits the caller asked for by number (never pruned)."""
        length = len(self.rows[row].ledger)
        if not self._read_last:
            return length, length
        read = self._real[row] >= self._first_read
        return length - int(read.sum()), length

    # -- closing -------------------------------------------------------------------------------------

    def output(self, *, allow_missing: bool) -> Tensor:
        """The last layer's output as the model expects it, [b, n, c]: all columns, or those that will be read.

        A token that was pruned on the way has none: its place holds NaN. A padding column repeats the
        row's last token, so that column -1 predicts the next token on either side of padding.

        Raises:
            InputError: when such a place will be read and `allow_missing` is not set.
        """
        output = self._unpacked(allow_missing)
        return output if len(self.places) == len(self.rows) else output[self.places]

    def _unpacked(self, allow_missing: bool) -> Tensor:
        """The same for each row of the cache once."""
        packed = self.row_states()
        reached = [tokens[tokens >= self._first_new(row)] for row, tokens in enumerate(self.flight)]
        for row, states in enumerate(packed):
            if states.shape[0]:
                self.rows[row].last_output = states[-1].clone()
        if not allow_missing:
            self._check_read(reached)
        first = self._first_read
        if all(tokens.numel() == self.width == states.shape[0] for tokens, states in zip(reached, packed, strict=True)):
            return rearrange(self.states, "1 (b t) c -> b t c", b=self.batch)[:, first:]
        out = self.states.new_full((self.batch, self.width - first, self.states.shape[-1]), torch.nan)
        for row, (tokens, states) in enumerate(zip(reached, packed, strict=True)):
            real, last_output = self._real[row], self.rows[row].last_output
            if last_output is not None and real.numel() < self.width:
                out[row] = repeat(last_output, "c -> t c", t=out.shape[1])
                out[row, (real[real >= first] - first).to(out.device)] = torch.nan
            columns = real[tokens - self._first_new(row)]
            read = columns >= first
            out[row, (columns[read] - first).to(out.device)] = states[states.shape[0] - int(read.sum()) :]
        return out

    @property
    def _first_read(self) -> int:
        """The first column whose logits are read, as far as is known."""
        return max(self.width - self._read_last, 0) if self._read_last else 0

    def _first_new(self, row: int) -> int:
        return len(self.rows[row].ledger) - self.new[row].numel()

    def _check_read(self, reached: list[Tensor]) -> None:
        for row, tokens in enumerate(reached):
            asked = self.new[row][self._real[row] >= self._first_read]
            missing = asked[~torch.isin(asked, tokens)]
            if missing.numel():
                place = self.places.index(row)
                raise InputError(
                    f"logits were asked for {asked.numel()} positions of row {place}, but {missing.numel()} of them "
                    f"were pruned and have none (tokens {missing.tolist()[:8]}...). Ask for the last ones only "
                    "(logits_to_keep=1), protect them with Protect(spans=[(start, stop)]), or take NaN in their place "
                    "with attached(missing='nan')"
                )

    def commit(self) -> None:
        """Makes the step's effect on the frontier states final; what may fail for want of room comes first."""
        if self.cache.policy.revives:
            for index, row in enumerate(self.rows):
                if stopped := [parked for parked in self._parked if parked.row == index]:
                    row.frontier.reserve(torch.cat([parked.tokens for parked in stopped]), stopped[0].states)
        for row, revived in zip(self.rows, self._revived, strict=True):
            for tokens in revived:
                row.frontier.free(tokens)
        if self.cache.policy.revives:
            while self._parked:
                parked = self._parked.pop(0)
                self.rows[parked.row].frontier.put(parked.tokens, parked.states)
        for index, layer, slots in self._evicted:
            self.rows[index].stores[layer].keep(slots)
        if self._retreat_layer is not None:
            self._retreat()

    def _retreat(self) -> None:
        """Sends the tokens used longest ago back to an early layer, where more are deep than the cache may hold."""
        retreat = self.cache.policy.retreat
        assert retreat is not None
        assert self._retreat_layer is not None
        assert self._visible is not None
        for row, visible in zip(self.rows, self._visible, strict=True):
            row.use(visible)
            row.retreat(retreat.most_tokens, self._retreat_layer, retreat.sinks)
