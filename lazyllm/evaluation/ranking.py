"""How a scorer ranks the tokens of a prompt before several layers, from one unpruned pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lazyllm.caches import DropCache
from lazyllm.caches.step import Step
from lazyllm.models.attach import attached
from lazyllm.models.families import contract_of
from lazyllm.models.names import CACHE
from lazyllm.models.reader import open_readers
from lazyllm.pipeline import LazyPipeline
from lazyllm.policies.base import Keep, Phase, Schedule, Scorer, layer_number, stable_top
from lazyllm.policies.protect import Protect
from lazyllm.policies.reading import Reads
from lazyllm.policies.scoring import Readings
from lazyllm.policies.select import Selector
from lazyllm.prompts import Prompt


@dataclass(frozen=True)
class Ranking:
    """Scores [t] of all tokens of a prompt, and which of them [t] are never pruned."""

    scores: Tensor
    protected: Tensor

    def kept(self, keep: float) -> Tensor:
        """Which tokens [t] enter a layer at this keep ratio."""
        free = torch.nonzero(~self.protected).squeeze(-1)
        count = Keep(keep).free_tokens(self.scores[free], int(self.protected.sum()), self.scores.numel())
        kept = self.protected.clone()
        kept[free[stable_top(self.scores[free], count)]] = True
        return kept


class Before(Schedule):
    """Asks the scorer before some layers.

    Attributes:
        layers: which.
    """

    layers: tuple[int, ...]

    def cuts(self, layers: int, phase: Phase) -> dict[int, Keep]:
        """By layer, half of the tokens: few enough that the scorer has to choose."""
        return {layer_number(layer, layers, owner="the table of scorers"): Keep(0.5) for layer in self.layers}


class _Done(Exception):
    """Ends a pass once the last ranking is known."""


class _Watcher(Selector):
    """Lets every token enter every layer, and notes on the way how the scorer ranks them.

    Attributes:
        found: by layer, the ranking before it.
    """

    def __init__(self, scorer: Scorer, schedule: Before, layers: int, reads: Reads) -> None:
        super().__init__(scorer, schedule, Protect(), layers, reads=reads)
        self.found: dict[int, Ranking] = {}

    def select(self, step: Step, layer: int, visible: list[Tensor], readings: Readings) -> list[Tensor]:
        """All of `visible`."""
        if layer + 1 not in self.cut_layers:
            return visible
        tokens, states = visible[0], step.states[0]
        self._scoring.note(step, 0, layer, states, readings)
        protected = self._scoring.protected(step, 0, tokens)
        if bool(protected.all()):
            scores = torch.zeros(tokens.shape)
        else:
            scores = self._scoring.scores(step, 0, layer, tokens, states, readings)
        self.found[layer + 1] = Ranking(scores, protected)
        if layer + 1 == max(self.cut_layers):
            raise _Done
        return visible


@torch.no_grad()
def rankings(pipe: LazyPipeline, scorer: Scorer, prompt: Prompt, layers: Sequence[int]) -> dict[int, Ranking]:
    """By layer, how a scorer ranks the prompt's tokens before it; the pass ends at the deepest of `layers`.

    Whatever reads token ids alone ranks alike everywhere, and is asked once. Layer 0 is left out for scorers that read
    attention, since there is none yet. Of `pipe` only model and tokenizer are used.

    Raises:
        ConfigError: for a layer that the model lacks.
    """
    asked = tuple(layer for layer in sorted(set(layers)) if layer or not scorer.needs_attention)
    schedule = Before(layers=asked)
    schedule.cuts(len(contract_of(pipe.model).layers), Phase(is_prefill=True, context_tokens=1))
    if not asked:
        return {}
    if _reads_ids_alone(scorer):
        (found,) = _pass(pipe, scorer, prompt, Before(layers=(0,))).values()
        return dict.fromkeys(asked, found)
    return _pass(pipe, scorer, prompt, schedule)


def _reads_ids_alone(scorer: Scorer) -> bool:
    """Whether it looks at what other passes read of the prompt, and at nothing of this one."""
    looks = (scorer.needs_attention, scorer.needs_memory, scorer.needs_next, scorer.needs_update, scorer.accumulates)
    return bool(scorer.reads_models) and not any(looks)


def _pass(pipe: LazyPipeline, scorer: Scorer, prompt: Prompt, schedule: Before) -> dict[int, Ranking]:
    own = LazyPipeline(
        pipe.model, pipe.tokenizer, scorer=scorer, schedule=schedule, cache=DropCache(), protect=Protect()
    )
    model, contract, encoded = own.model, contract_of(own.model), own.encode(prompt)
    reads = open_readers(scorer.reads_models, model, own.tokenizer, contract)
    watcher = _Watcher(scorer, schedule, len(contract.layers), reads)
    ids = torch.tensor([encoded.token_ids], device=model.device)
    try:
        with attached(model, contract, watcher):
            model(ids, **{CACHE: own.new_cache(marks=[encoded.marks])}, logits_to_keep=1)
    except _Done:
        pass
    return watcher.found
