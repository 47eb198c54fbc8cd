"""What one generation did with each token of its prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lazyllm.caches import LazyCache
from lazyllm.callbacks import Callback, Choice, LayerEnd, PrefillStart, StepEnd
from lazyllm.policies.base import stable_top
from lazyllm.policies.protect import no_tokens

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Cut:
    """By which scores prompt tokens were chosen to enter a layer in prefill.

    Attributes:
        layer: the layer they were to enter.
        candidates: how many tokens were scored.
        scores: [t] the scores; NaN for tokens that were no candidates.
        ranks: [t] 1 for the highest score; 0 for tokens that were no candidates.
        entered: [t] which tokens entered.
    """

    layer: int
    candidates: int
    scores: Floats
    ranks: Ints
    entered: Flags


@dataclass(frozen=True)
class Revival:
    """The score by which a token was taken up again, at the layer where it had stopped."""

    token: int
    layer: int
    score: float
    rank: int
    candidates: int


@dataclass(frozen=True)
class StepTrace:
    """The cache behind a step, and how tokens were chosen in it.

    Attributes:
        is_prefill: whether the step brought tokens of the prompt.
        depths: [t] how many layers have computed each token so far.
        kv_bytes, aux_bytes: what the cache holds.
        revived: tokens of earlier steps that were computed, ascending.
        cuts: by layer, the choices of a prefill step.
        revivals: of those that a later step revived by their scores, the scores.
    """

    is_prefill: bool
    depths: Ints
    kv_bytes: int
    aux_bytes: int
    revived: Ints
    cuts: Mapping[int, Cut] = field(default_factory=dict)
    revivals: Sequence[Revival] = ()


class Recorder(Callback):
    """Notes depths and choices of the one row of a cache, step by step.

    Attributes:
        steps: what each step left behind.
        protected: [t] which tokens a prefill step protected, where it scored any.
    """

    def __init__(self, cache: LazyCache) -> None:
        self.steps: list[StepTrace] = []
        self.protected: Flags = np.zeros(0, dtype=bool)
        self._cache = cache
        self._cuts: dict[int, Cut] = {}
        self._revivals: list[Revival] = []
        self._revived: list[Tensor] = []
        self._under_way = no_tokens()

    def on_prefill_start(self, event: PrefillStart) -> None:
        """Makes room for the new tokens."""
        self.protected = np.pad(self.protected, (0, event.new_tokens[0]))

    def on_layer_end(self, event: LayerEnd) -> None:
        """Notes how the tokens that entered the layer were chosen."""
        (row,) = event.rows
        before = no_tokens() if event.layer == 0 else self._under_way
        self._under_way = row.computed
        self._revived.append(row.revived)
        if row.choice is None:
            return
        if event.is_prefill:
            self.protected[row.choice.candidates[row.choice.protected].numpy()] = True
            self._cuts[event.layer] = _cut(event.layer, row.choice, row.visible, len(self.protected))
        else:
            revived = row.revived[~torch.isin(row.revived, before)]
            self._revivals += _revivals(event.layer, row.choice, revived)

    def on_step_end(self, event: StepEnd) -> None:
        """Notes what the cache holds now."""
        self.steps.append(
            StepTrace(
                is_prefill=event.is_prefill,
                depths=self._cache.rows[0].ledger.depth.numpy().astype(np.int32),
                kv_bytes=event.kv_bytes,
                aux_bytes=event.aux_bytes,
                revived=torch.cat(self._revived).unique().numpy().astype(np.int32),
                cuts=self._cuts,
                revivals=self._revivals,
            )
        )
        self._cuts, self._revivals, self._revived = {}, [], []


def _cut(layer: int, choice: Choice, visible: Tensor, tokens: int) -> Cut:
    candidates = choice.candidates.numpy()
    scores = np.full(tokens, np.nan, dtype=np.float32)
    scores[candidates] = choice.scores.float().numpy()
    ranks = np.zeros(tokens, dtype=np.int32)
    ranks[candidates] = _ranks(choice.scores).numpy()
    entered = np.zeros(tokens, dtype=bool)
    entered[visible.numpy()] = True
    return Cut(layer, len(candidates), scores, ranks, entered)


def _revivals(layer: int, choice: Choice, revived: Tensor) -> list[Revival]:
    places = torch.searchsorted(choice.candidates, revived)
    ranks = _ranks(choice.scores)
    return [
        Revival(token, layer, float(choice.scores[place]), int(ranks[place]), len(ranks))
        for token, place in zip(revived.tolist(), places.tolist(), strict=True)
    ]


def _ranks(scores: Tensor) -> Tensor:
    """Rank of each score [v], 1 = highest; of equals the one that would be chosen first."""
    ranks = torch.empty(len(scores), dtype=torch.int32)
    ranks[stable_top(scores, len(scores))] = torch.arange(1, len(scores) + 1, dtype=torch.int32)
    return ranks
