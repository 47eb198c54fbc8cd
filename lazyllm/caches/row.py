"""Everything the cache holds for one row of the batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from lazyllm.caches.ledger import Ledger
from lazyllm.caches.memory import StateMemory
from lazyllm.caches.policy import CachePolicy
from lazyllm.errors import CacheError
from lazyllm.policies.protect import no_tokens
from lazyllm.policies.query import TokenRange, Unit


@dataclass(frozen=True)
class PromptMarks:
    """What is known about a prompt's tokens.

    Attributes:
        protected: token ranges (start, stop) that are never pruned.
        query: token ranges of the query; the last tokens where there is none.
        asked: whether the prompt asks something, by a question in its text or by a query that was named.
        starts: by kind of unit ("line", "sentence", "paragraph"), the first token of each, ascending; empty where the
            text is not known.
    """

    protected: tuple[TokenRange, ...] = ()
    query: tuple[TokenRange, ...] = ()
    asked: bool = False
    starts: Mapping[Unit, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class RowMark:
    """A point a row can go back to."""

    depth: Tensor
    stored: list[int]
    remembered: dict[int, int]
    origins: int
    tallies: dict[tuple[str, int], Tensor]
    reply_start: int
    counted: int
    last_output: Tensor | None
    columns: int


class Row:
    """Ledger, K/V stores and frontier of one sequence; the batch is a list of these.

    Attributes:
        ledger: depth and position of every token.
        stores: K/V, one store per layer.
        frontier: hidden states of the unfinished tokens.
        memories: by layer, what the scorer looks back on; -1 is before the first.
        origins: hidden states to which tokens may be sent back, where the policy does so.
        last_used: [t] number of the latest step in which each token was visible at the last layer, where that is asked.
        retreated: layer-tokens whose K/V were given up; computing them again is work done twice.
        tallies: by use and layer, sums [t] a scorer has added up over steps; replaced as a whole, never written to.
        marks: protected and query tokens of the prompt.
        reply_start: index of the first token that came after the last prefill step.
        counted: how many tokens of the reply were certain at the latest step.
        last_output: [c] output of the last layer for the row's last token.
        columns: how many columns of its batch the row has seen, padding included.
    """

    def __init__(self, layers: int, policy: CachePolicy, marks: PromptMarks) -> None:
        self.ledger = Ledger(layers)
        self.stores = [policy.new_store() for _ in range(layers)]
        self.frontier = policy.new_frontier()
        self.memories: dict[int, StateMemory] = {}
        self.tallies: dict[tuple[str, int], Tensor] = {}
        self.origins = StateMemory()
        self.last_used = no_tokens()
        self.retreated = 0
        self.marks = marks
        self.reply_start = self.counted = self.columns = 0
        self.last_output: Tensor | None = None

    @property
    def is_replying(self) -> bool:
        """Whether the next token is the reply's: nothing was taken back, or some of the reply is left."""
        return self.last_output is not None or len(self.ledger) > self.reply_start

    def memory(self, layer: int) -> StateMemory:
        """The states remembered after `layer`; made at the first call."""
        return self.memories.setdefault(layer, StateMemory())

    def take_up(self, marks: PromptMarks) -> None:
        """Takes the marks of a further turn's prompt.

        Where its text is not known, the units of the turns before stay; the reply, and what is new, are one each.
        """
        before = self.marks.starts
        if before and not marks.starts:
            turns = self.reply_start, len(self.ledger)
            starts = {unit: tuple(sorted({*tokens, *turns})) for unit, tokens in before.items()}
            marks = replace(marks, starts=starts)
        self.marks = marks

    def add_to_tally(self, key: tuple[str, int], tokens: Tensor, amounts: Tensor) -> None:
        """Adds amounts [k] to the sums of `tokens` [k]."""
        before = self.tallies.get(key, amounts.new_zeros(0))
        padded = pad(before, (0, len(self.ledger) - before.numel()))
        self.tallies[key] = padded.index_add(0, tokens, amounts)

    def use(self, tokens: Tensor) -> None:
        """Notes that `tokens` were visible at the last layer of the step that ends now."""
        now = int(self.last_used.max()) + 1 if self.last_used.numel() else 0
        used = pad(self.last_used, (0, len(self.ledger) - self.last_used.numel()), value=now - 1)
        self.last_used = used.index_fill(0, tokens, now)

    def retreat(self, most: int, layer: int, sinks: int) -> None:
        """Sends the tokens used longest ago back to `layer`, of equals the earlier, until at most `most` are deeper."""
        depth = self.ledger.depth
        deep = torch.nonzero(depth > layer).squeeze(-1)
        free = deep[deep >= sinks]
        excess = min(deep.numel() - most, free.numel())
        if excess <= 0:
            return
        back = free[self.last_used[free].argsort(stable=True)[:excess]].sort().values
        self.retreated += int(depth[back].sum()) - back.numel() * layer
        unfinished = back[depth[back] < self.ledger.layers]
        self.frontier.free(unfinished)
        self.frontier.put(back, self.origins.gather(back).clone())
        for store in self.stores[layer:]:
            store.keep(torch.nonzero(~torch.isin(store.tokens, back)).squeeze(-1))
        for after, memory in self.memories.items():
            if after >= layer:
                memory.forget(back)
        self.ledger.retreat(back, layer)

    def mark(self) -> RowMark:
        """The present state, for `restore`."""
        stored = [len(store) for store in self.stores]
        remembered = {layer: len(memory) for layer, memory in self.memories.items()}
        return RowMark(
            self.ledger.depth.clone(),
            stored,
            remembered,
            len(self.origins),
            dict(self.tallies),
            self.reply_start,
            self.counted,
            self.last_output,
            self.columns,
        )

    def restore(self, mark: RowMark) -> None:
        """Goes back to `mark`; K/V and depths written since are forgotten."""
        self.ledger.restore(mark.depth)
        for store, length in zip(self.stores, mark.stored, strict=True):
            store.truncate(length)
        for layer, memory in self.memories.items():
            memory.truncate(mark.remembered.get(layer, 0))
        self.origins.truncate(mark.origins)
        self.tallies = dict(mark.tallies)
        self.reply_start, self.counted = mark.reply_start, mark.counted
        self.last_output, self.columns = mark.last_output, mark.columns

    def crop(self, columns: int) -> None:
        """Forgets every token from column `columns` of the batch on."""
        self.columns = columns
        tokens = int((self.ledger.column < columns).sum())
        if tokens == len(self.ledger):
            return
        self.ledger.restore(self.ledger.depth[:tokens].clone())
        for store in self.stores:
            store.crop(tokens)
        for memory in (*self.memories.values(), self.origins):
            memory.crop(tokens)
        self.last_used = self.last_used[:tokens]
        self.tallies = {key: tally[:tokens] for key, tally in self.tallies.items()}
        self.frontier.crop(tokens)
        self.reply_start = min(self.reply_start, tokens)
        self.counted = min(self.counted, tokens - self.reply_start)
        self.last_output = None

    def join(self, other: Row, *, moved: int) -> None:
        """Takes up the tokens of `other` behind its own.

        Args:
            other: another row of the same model and policy, which stays as it is.
            moved: added to the positions of its tokens.

        Raises:
            CacheError: when they would not stand behind its own, or are moved after a layer has computed them.
        """
        columns = self.columns
        self.columns += other.columns
        if not len(other.ledger):
            return
        last = int(self.ledger.position[-1]) if len(self.ledger) else -1
        first = int(other.ledger.position[0])
        if moved and other.ledger.at_depth[0] < len(other.ledger):
            raise CacheError(
                f"tokens at positions {first} to {int(other.ledger.position[-1])} cannot be moved by {moved}: layers "
                "have computed some of them there"
            )
        if first + moved <= last:
            raise CacheError(
                f"tokens that begin at position {first + moved} cannot be joined to others that end at {last}"
            )
        self.load_state(other.state(), None, columns=columns, moved=moved)
        self.retreated += other.retreated
        self.reply_start = len(self.ledger)

    def trim(self) -> None:
        """Gives back memory beyond what is in use."""
        for store in self.stores:
            store.trim()
        self.frontier.trim()
        for memory in (*self.memories.values(), self.origins):
            memory.trim()

    def copy(self) -> Row:
        """An independent copy; both share their tensors until one of them writes."""
        twin: Row = object.__new__(Row)
        twin.ledger = self.ledger.copy()
        twin.stores = [store.copy() for store in self.stores]
        twin.frontier = self.frontier.copy()
        twin.memories = {layer: memory.copy() for layer, memory in self.memories.items()}
        twin.origins, twin.last_used, twin.retreated = self.origins.copy(), self.last_used, self.retreated
        twin.tallies = dict(self.tallies)
        twin.marks, twin.reply_start, twin.counted = self.marks, self.reply_start, self.counted
        twin.last_output, twin.columns = self.last_output, self.columns
        return twin

    def state(self) -> dict[str, Tensor]:
        """Its tensors by name, `part.name`, for a file."""
        parts = {
            "ledger": self.ledger.state(),
            "frontier": self.frontier.state(),
            **{f"layer{layer}": store.state() for layer, store in enumerate(self.stores)},
            **{f"memory{layer}": memory.state() for layer, memory in self.memories.items()},
            "origins": self.origins.state(),
            "tallies": {f"{use}.{layer}": tally for (use, layer), tally in self.tallies.items()},
            "row": {"last_used": self.last_used},
        }
        if self.last_output is not None:
            parts["row"]["last_output"] = self.last_output
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def load_state(
        self, state: Mapping[str, Tensor], devices: Sequence[torch.device] | None, *, columns: int = 0, moved: int = 0
    ) -> None:
        """Takes up what another row's `state` gave, behind its own tokens.

        Args:
            state: tensors by name.
            devices: by layer, where it runs; None = the tensors are there.
            columns: added to the columns of the tokens.
            moved: added to their positions.
        """
        behind = len(self.ledger)
        places: Sequence[torch.device | None] = devices or [None] * len(self.stores)
        parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in state.items():
            part, _, name = key.partition(".")
            parts[part][name] = tensor
        self.ledger.load_state(parts["ledger"], columns=columns, moved=moved)
        self.frontier.load_state(parts["frontier"], places[0], behind)
        for layer, store in enumerate(self.stores):
            store.load_state(parts[f"layer{layer}"], places[layer], behind)
        for part, tensors in parts.items():
            if part.startswith("memory"):
                layer = int(part.removeprefix("memory"))
                self.memory(layer).load_state(tensors, places[max(layer, 0)], behind)
        self.origins.load_state(parts["origins"], places[0], behind)
        for key, tally in parts["tallies"].items():
            use, _, at = key.rpartition(".")
            self.tallies[use, int(at)] = torch.cat([_filled(self.tallies.get((use, int(at))), behind, tally), tally])
        used = parts["row"]["last_used"]
        self.last_used = torch.cat([_filled(self.last_used, behind if used.numel() else 0, used), used])
        if "last_output" in parts["row"]:
            self.last_output = parts["row"]["last_output"].to(device=places[-1])

    @property
    def key_value_bytes(self) -> int:
        """Bytes of all keys and values in use."""
        return sum(store.used_bytes for store in self.stores)

    @property
    def aux_bytes(self) -> int:
        """Bytes of the frontier states, and of states that are looked back on."""
        memories = (*self.memories.values(), self.origins)
        return self.frontier.used_bytes + sum(memory.used_bytes for memory in memories)

    @property
    def offloaded_bytes(self) -> int:
        """How many of these bytes are not on the model's device."""
        return self.frontier.offloaded_bytes


def _filled(amounts: Tensor | None, tokens: int, like: Tensor) -> Tensor:
    """Amounts [t] of the first tokens, 0 where there are none, up to `tokens` of them."""
    known = like.new_zeros(0) if amounts is None else amounts
    return pad(known, (0, max(tokens - known.numel(), 0)))


def distinct(rows: Iterable[Row]) -> list[Row]:
    """Each row once, in the order in which they first come."""
    return list({id(row): row for row in rows}.values())


def places_of(rows: Sequence[Row]) -> list[int]:
    """By place, which of the `distinct` rows stands there."""
    numbers = {id(row): number for number, row in enumerate(distinct(rows))}
    return [numbers[id(row)] for row in rows]


def copied(rows: Sequence[Row]) -> list[Row]:
    """Independent copies; what is one row at several places stays one."""
    twins = {id(row): row.copy() for row in distinct(rows)}
    return [twins[id(row)] for row in rows]


def token_counts(tokens: list[Tensor]) -> list[int]:
    """How many tokens each row contributes."""
    return [row.numel() for row in tokens]


def same_tokens(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether two per-row token lists are equal."""
    return all(torch.equal(one, other) for one, other in zip(left, right, strict=True))
