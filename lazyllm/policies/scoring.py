"""A scorer at work: what it reads is kept and handed to it, and what it returns is checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from lazyllm.caches.row import token_counts
from lazyllm.caches.step import Step
from lazyllm.errors import PolicyError
from lazyllm.models.attention import AttentionInputs, Captured
from lazyllm.models.ranks import ALONE, Ranks
from lazyllm.policies.base import ScoreContext, Scorer
from lazyllm.policies.protect import Protect
from lazyllm.policies.query import query_tokens
from lazyllm.policies.reading import Reads

Use = Literal["select", "evict"]
"""What scores are for: which tokens enter the next layer, or which K/V stay."""


@dataclass(frozen=True)
class Readings:
    """What was noted on the way to where a scorer is asked.

    Attributes:
        layers: what the latest layers noted, the last one at the end; nothing before layer 0.
        read_next: runs the next layer as far as its queries and keys, for the tokens that are visible now.
    """

    layers: tuple[Captured, ...] = ()
    read_next: Callable[[], Captured] | None = None

    def attention(self, row: int) -> tuple[AttentionInputs, ...]:
        """By layer, what the attention of a row used; layers that noted nothing are left out."""
        return tuple(layer.rows[row] for layer in self.layers if row in layer.rows)

    def update(self, row: int, step: Step) -> Tensor | None:
        """What the latest attention added to the states [q, c] of the tokens of a row that were computed."""
        if not self.layers or not self.layers[-1].updates:
            return None
        return torch.cat(self.layers[-1].updates, dim=1)[0].split(token_counts(step.flight))[row]

    def next_attention(self, row: int) -> AttentionInputs:
        """What the attention of the next layer would use."""
        assert self.read_next is not None, "there is a next layer wherever tokens are chosen for it"
        return self.read_next().rows[row]


class Scoring:
    """Asks one scorer, for one use.

    Args:
        scorer: the scorer.
        protect: tokens that need no score.
        use: what its scores are for; what it has seen so far is kept apart by it.
        reads: the language models it reads prompts with.
        ranks: the processes that share the model.
    """

    def __init__(
        self, scorer: Scorer, protect: Protect, use: Use, reads: Reads | None = None, ranks: Ranks = ALONE
    ) -> None:
        self.scorer, self.protect, self.use, self.reads, self.ranks = scorer, protect, use, reads or {}, ranks

    @property
    def watches(self) -> bool:
        """Whether it must see every step, not only those in which it is asked."""
        return self.scorer.accumulates or self.scorer.needs_update

    def note(self, step: Step, index: int, layer: int, states: Tensor, readings: Readings) -> None:
        """Keeps what the scorer will look back on: features of the tokens just computed, and attention received."""
        row = step.rows[index]
        if self.scorer.needs_memory:
            features = self.scorer.features(states, readings.update(index, step))
            row.memory(layer).append(step.flight[index], features)
        if self.scorer.accumulates:
            for attention in readings.attention(index)[-1:]:
                row.add_to_tally((self.use, layer), attention.key_tokens, self.scorer.observe(attention).cpu())

    def protected(self, step: Step, index: int, tokens: Tensor) -> Tensor:
        """Which of `tokens` [v] are never left out."""
        row = step.rows[index]
        ranges = [*row.marks.protected, step.read_range(index)]
        mask = self.protect.mask(tokens, len(row.ledger), row.reply_start, ranges, asked=row.marks.asked)
        if self.scorer.reads_query is not None or row.marks.query:
            mask |= torch.isin(tokens, self._query(step, index, rolling=False))
        return mask

    def _query(self, step: Step, index: int, *, rolling: bool) -> Tensor:
        row = step.rows[index]
        return query_tokens(self.scorer.reads_query or "auto", row.marks.query, len(row.ledger), rolling=rolling)

    def scores(self, step: Step, index: int, layer: int, tokens: Tensor, states: Tensor, readings: Readings) -> Tensor:
        """Scores [v] of the tokens [v] of a row, ascending, on the host; in every process those of the first.

        Raises:
            PolicyError: when the scorer returns something else.
        """
        row = step.rows[index]
        attention = readings.attention(index)
        context = ScoreContext(
            layer=layer,
            tokens=tokens,
            positions=row.ledger.position[tokens],
            context_tokens=len(row.ledger),
            query=self._query(step, index, rolling=not step.is_prefill),
            computed=step.flight[index],
            states=states,
            attention=attention[-1] if attention else None,
            earlier=attention[:-1],
            read_next=partial(readings.next_attention, index) if readings.read_next is not None else None,
            memory=row.memories.get(layer),
            tally=row.tallies.get((self.use, layer)),
            token_ids=row.ledger.token_id if row.ledger.knows_ids else None,
            starts=row.marks.starts,
            reads=self.reads,
        )
        return self.ranks.agree(checked(self.scorer.score(context), tokens, type(self.scorer).__name__))


def checked(scores: object, tokens: Tensor, name: str) -> Tensor:
    """The scores a scorer of that name gave `tokens` [v], on the host.

    Raises:
        PolicyError: when they are no finite floats, one for each token.
    """
    if not isinstance(scores, Tensor) or scores.shape != tokens.shape or not scores.is_floating_point():
        got = f"{tuple(scores.shape)} {scores.dtype}" if isinstance(scores, Tensor) else repr(scores)
        raise PolicyError(f"{name} must return floating scores of shape {tuple(tokens.shape)}, got {got}")
    scores = scores.cpu()
    if not bool(scores.isfinite().all()):
        raise PolicyError(f"{name} returned {int((~scores.isfinite()).sum())} scores that are NaN or infinite")
    return scores
