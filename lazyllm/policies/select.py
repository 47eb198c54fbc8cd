"""The one place where tokens are chosen: counts, rounding, protected tokens and revivals follow one rule."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import product

import torch
from torch import Tensor

from lazyllm.caches.step import Step
from lazyllm.callbacks import Choice
from lazyllm.errors import ConfigError
from lazyllm.models.attention import Captured
from lazyllm.models.ranks import ALONE, Ranks
from lazyllm.policies.base import Keep, Phase, Schedule, Scorer, stable_top
from lazyllm.policies.evict import Evictor
from lazyllm.policies.protect import Protect, no_tokens
from lazyllm.policies.reading import Reads
from lazyllm.policies.scoring import Readings, Scoring


class Selector:
    """Narrows the visible tokens of each row from layer to layer, and what a cache that evicts has stored.

    Attributes:
        cut_layers: the layers before which tokens may be pruned, in any phase.
        reads_layers: of how many of the latest layers the scorer reads attention.

    Args:
        scorer, schedule, protect: the policies.
        layers: number of layers of the model.
        reads: language models that scorers may read prompts with.
        ranks: the processes that share the model; all choose the same tokens.

    Raises:
        ConfigError: when the schedule does not fit the model or the scorer.
    """

    def __init__(
        self,
        scorer: Scorer,
        schedule: Schedule,
        protect: Protect,
        layers: int,
        *,
        reads: Reads | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.scorer, self.protect, self.reads, self.ranks = scorer, protect, reads or {}, ranks
        self.reads_layers = scorer.reads_layers
        self._scoring = Scoring(scorer, protect, "select", self.reads, ranks)
        self.cuts = lru_cache(maxsize=256)(lambda phase: schedule.cuts(layers, phase))
        phases = [Phase(is_prefill, sys.maxsize, asked) for is_prefill, asked in product((True, False), repeat=2)]
        self.cut_layers = frozenset(layer for phase in phases for layer in self.cuts(phase))
        if scorer.needs_attention and 0 in self.cut_layers:
            raise ConfigError(
                f"{type(scorer).__name__} has no attention to read before layer 0, where {schedule} prunes; give a "
                "schedule that starts at layer 1 or later, such as Constant(0.5, start=1), or a scorer that reads no "
                "attention"
            )

    def first(self, step: Step, read_next: Callable[[list[Tensor]], Captured]) -> list[Tensor]:
        """By row, the tokens that enter layer 0: of the whole context of every row with new tokens.

        `read_next` runs layer 0 as far as its queries and keys, for the tokens it is given.
        """
        visible = [
            torch.arange(len(row.ledger)) if new.numel() else no_tokens()
            for row, new in zip(step.rows, step.new, strict=True)
        ]
        return self.select(step, -1, visible, Readings(read_next=partial(read_next, visible)))

    def notes_of(self, step: Step, layer: int, visible: list[Tensor]) -> Captured | None:
        """Where `layer` is to note what scorers will read, now or after one of the next layers; None if none will."""
        evictor = self._evictor(step)
        if not self._will_read(step, layer, visible) and (evictor is None or not evictor.listens(step)):
            return None
        return Captured(updates=[] if self.scorer.needs_update else None)

    def _will_read(self, step: Step, layer: int, visible: list[Tensor]) -> bool:
        if self.watches(layer):
            return True
        reached = range(layer + 1, layer + 1 + self.reads_layers)
        return any(
            self._cut(step, index, cut, tokens) is not None for cut in reached for index, tokens in enumerate(visible)
        )

    def select(self, step: Step, layer: int, visible: list[Tensor], readings: Readings) -> list[Tensor]:
        """By row, those of `visible` that enter the layer after `layer`; where scores decide, the step keeps them."""
        step.choices = {}
        evictor = self._evictor(step)
        if evictor is not None and layer >= 0:
            evictor.evict(step, layer, readings)
        revives = [selects and step.cache.policy.revives for selects in step.selects]
        bounded = [not free or step.most_revived is not None for free in revives]
        if not self._may_narrow(step, layer + 1, bounded):
            return visible
        states = step.row_states()
        chosen = []
        self.remember(step, layer, states, readings)
        for index, tokens in enumerate(visible):
            keep = self._cut(step, index, layer + 1, tokens)
            if not revives[index] or (keep is None and bounded[index]):
                tokens = step.without_stopped(index, layer + 1, tokens)
            if keep is not None:
                tokens = self._top(step, index, layer, tokens, states[index], readings, keep)
            chosen.append(tokens)
        return chosen

    def remember(self, step: Step, layer: int, states: Sequence[Tensor], readings: Readings) -> None:
        """Keeps what the scorer will look back on where tokens are chosen after `layer`, now or in a later step.

        `states` are by row those [t, c] of the tokens in flight.
        """
        if layer + 1 in self.cut_layers and step.cache.policy.prunes:
            for index, own in enumerate(states):
                self._scoring.note(step, index, layer, own, readings)

    def watches(self, layer: int) -> bool:
        """Whether the scorer must see what `layer` does, also where no token is chosen after it."""
        return self._scoring.watches and layer + 1 in self.cut_layers

    def _evictor(self, step: Step) -> Evictor | None:
        """What the step's cache asks for; None when nothing is ever evicted."""
        eviction = step.cache.policy.eviction
        return None if eviction is None else Evictor(eviction, self.protect, self.reads, self.ranks)

    def _may_narrow(self, step: Step, layer: int, bounded: Sequence[bool]) -> bool:
        """Whether fewer tokens may enter `layer` than the one before: at a cut, or where not all stopped ones go on."""
        if layer in self.cut_layers:
            return True
        return any(one and step.any_stopped(row, layer) for row, one in enumerate(bounded))

    def _cut(self, step: Step, index: int, layer: int, tokens: Tensor) -> Keep | None:
        """How many of `tokens` may enter `layer`; None where the scorer need not be asked."""
        if layer not in self.cut_layers or not step.selects[index]:
            return None
        row = step.rows[index]
        context_tokens = len(row.ledger)
        keep = self.cuts(Phase(step.is_prefill, context_tokens, row.marks.asked)).get(layer)
        if keep is None:
            return None
        narrows = keep.adapts or tokens.numel() > keep.limit(context_tokens)
        if not narrows and (step.most_revived is None or not step.any_stopped(index, layer)):
            return None
        return None if bool(self._scoring.protected(step, index, tokens).all()) else keep

    def _top(
        self,
        step: Step,
        index: int,
        layer: int,
        tokens: Tensor,
        states: Tensor,
        readings: Readings,
        keep: Keep,
    ) -> Tensor:
        context_tokens = len(step.rows[index].ledger)
        scores = self._scoring.scores(step, index, layer, tokens, states, readings)
        protected = self._scoring.protected(step, index, tokens)
        step.choices[index] = Choice(tokens, scores, protected)
        kept, free = protected.clone(), torch.nonzero(~protected).squeeze(-1)
        best = free[stable_top(scores[free], keep.free_tokens(scores[free], int(kept.sum()), context_tokens))]
        if step.most_revived is not None:
            stopped = step.stopped(index, layer + 1, tokens)
            revived = best[stopped[best]][: step.most_revived - step.revived_tokens(index)]
            kept &= ~stopped
            best = torch.cat([best[~stopped[best]], revived])
        kept[best] = True
        return tokens[kept]
