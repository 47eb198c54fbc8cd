"""Which keys and values a cache lets go after a layer, when it holds more of them than its budget."""

from __future__ import annotations

import torch
from torch import Tensor

from lazyllm.caches.eviction import Eviction
from lazyllm.caches.step import Step
from lazyllm.models.ranks import ALONE, Ranks
from lazyllm.policies.base import stable_top
from lazyllm.policies.protect import Protect
from lazyllm.policies.reading import Reads
from lazyllm.policies.scoring import Readings, Scoring


class Evictor:
    """Narrows what is stored at a layer, row by row.

    Args:
        eviction: how much stays, when, and by whose scores.
        protect: tokens whose K/V always stay.
        reads: language models the scorer may read prompts with.
        ranks: the processes that share the model.
    """

    def __init__(self, eviction: Eviction, protect: Protect, reads: Reads, ranks: Ranks = ALONE) -> None:
        self.eviction = eviction
        self.scoring = Scoring(eviction.scorer, protect, "evict", reads, ranks)

    def listens(self, step: Step) -> bool:
        """Whether it reads what layers note in this step."""
        if self.scoring.watches:
            return True
        return self.eviction.scorer.needs_attention and any(self._acts(step, row) for row in range(len(step.rows)))

    def _acts(self, step: Step, index: int) -> bool:
        acts = self.eviction.acts
        return any(acts(is_prefill=step.is_prefill, generated=number) for number in step.replied[index])

    def evict(self, step: Step, layer: int, readings: Readings) -> None:
        """Marks what falls out of every row's store at `layer`; it is dropped when the step is done."""
        states = step.row_states()
        for index, row in enumerate(step.rows):
            if not step.flight[index].numel():
                continue
            if self.scoring.watches:
                self.scoring.note(step, index, layer, states[index], readings)
            most = self.eviction.most_tokens(len(row.ledger))
            if self._acts(step, index) and len(row.stores[layer]) > most:
                step.evict(index, layer, self._kept(step, index, layer, states[index], readings, most))

    def _kept(self, step: Step, index: int, layer: int, states: Tensor, readings: Readings, most: int) -> Tensor:
        """Slots that stay: protected tokens and the best of the others; in order of position, as nothing revives."""
        tokens = step.rows[index].stores[layer].tokens
        scores = self.scoring.scores(step, index, layer, tokens, states, readings)
        kept = self.scoring.protected(step, index, tokens)
        free = torch.nonzero(~kept).squeeze(-1)
        kept[free[stable_top(scores[free], max(0, most - int(kept.sum())))]] = True
        return torch.nonzero(kept).squeeze(-1)
