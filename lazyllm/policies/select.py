"""The one place where tokens are chosen: counts, rounding and protected tokens follow one rule."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lazyllm.caches.step import Step
from lazyllm.errors import ConfigError, PolicyError
from lazyllm.models.attention import AttentionInputs
from lazyllm.policies.base import Schedule, ScoreContext, Scorer, stable_top
from lazyllm.policies.protect import Protect, no_tokens


class Selector:
    """Narrows the visible tokens of each row from layer to layer.

    `keep` is the schedule resolved for the model: `keep[l]` of all tokens a row has seen may enter layer l.

    Raises:
        ConfigError: when the schedule does not fit the model or the scorer.
    """

    def __init__(self, scorer: Scorer, schedule: Schedule, protect: Protect, layers: int) -> None:
        self.scorer, self.protect = scorer, protect
        self.keep = schedule.resolve(layers)
        if scorer.needs_attention and self.keep[0] < 1:
            raise ConfigError(
                f"{schedule} prunes before layer 0 (keep ratio {self.keep[0]}), where {type(scorer).__name__} has no "
                "attention to read yet; start at layer 1 or later, or use a scorer that reads no attention"
            )

    def limit(self, layer: int, context_tokens: int) -> int:
        """How many tokens may enter `layer`: the keep ratio of the whole context, rounded down, at least one."""
        return max(1, int(self.keep[layer] * context_tokens + 1e-9))

    def first(self, step: Step) -> list[Tensor]:
        """By row, the tokens that enter layer 0: the whole context of every row with new tokens."""
        visible = [
            torch.arange(len(row.ledger)) if new.numel() else no_tokens()
            for row, new in zip(step.rows, step.new, strict=True)
        ]
        return self.select(step, -1, visible, {})

    def will_score(self, step: Step, layer: int, visible: list[Tensor]) -> bool:
        """Whether the scorer will be asked after `layer`."""
        if layer + 1 >= len(self.keep) or not self._selects(step):
            return False
        return any(
            tokens.numel() > self.limit(layer + 1, len(row.ledger))
            for row, tokens in zip(step.rows, visible, strict=True)
        )

    @staticmethod
    def _selects(step: Step) -> bool:
        policy = step.cache.policy
        return policy.prunes and (step.is_prefill or policy.selects_in_decode)

    def select(
        self, step: Step, layer: int, visible: list[Tensor], attention: Mapping[int, AttentionInputs]
    ) -> list[Tensor]:
        """By row, those of `visible` that enter the layer after `layer`."""
        if layer + 1 >= len(self.keep):
            return visible
        revives = step.cache.policy.revives and self._selects(step)
        chosen = []
        states = step.states[0].split([tokens.numel() for tokens in step.flight])
        for index, tokens in enumerate(visible):
            if not revives:
                tokens = self._without_stopped(step, index, layer + 1, tokens)
            if self._selects(step) and tokens.numel() > self.limit(layer + 1, len(step.rows[index].ledger)):
                tokens = self._top(step, index, layer, tokens, states[index], attention.get(index))
            chosen.append(tokens)
        return chosen

    @staticmethod
    def _without_stopped(step: Step, index: int, layer: int, tokens: Tensor) -> Tensor:
        """Leaves out the tokens that stopped before `layer` in an earlier step."""
        ledger, flight = step.rows[index].ledger, step.flight[index]
        if ledger.at_depth[layer] == flight.numel():
            return tokens
        return tokens[(ledger.depth[tokens] > layer) | torch.isin(tokens, flight, assume_unique=True)]

    def _top(
        self, step: Step, index: int, layer: int, tokens: Tensor, states: Tensor, attention: AttentionInputs | None
    ) -> Tensor:
        row = step.rows[index]
        context_tokens = len(row.ledger)
        context = ScoreContext(
            layer=layer,
            tokens=tokens,
            positions=row.ledger.position[tokens],
            context_tokens=context_tokens,
            computed=step.flight[index],
            states=states,
            attention=attention,
        )
        scores = self._checked(self.scorer.score(context), tokens)
        ranges = [*row.spans, step.read_range(index)]
        protected = self.protect.mask(tokens, context_tokens, row.reply_start, ranges)
        free = self.limit(layer + 1, context_tokens) - int(protected.sum())
        kept = protected.clone()
        if free > 0:
            kept[stable_top(scores.masked_fill(protected, -torch.inf), free)] = True
        return tokens[kept]

    def _checked(self, scores: Tensor, tokens: Tensor) -> Tensor:
        name = type(self.scorer).__name__
        if not isinstance(scores, Tensor) or scores.shape != tokens.shape or not scores.is_floating_point():
            got = f"{tuple(scores.shape)} {scores.dtype}" if isinstance(scores, Tensor) else repr(scores)
            raise PolicyError(f"{name} must return floating scores of shape {tuple(tokens.shape)}, got {got}")
        scores = scores.cpu()
        if not bool(scores.isfinite().all()):
            raise PolicyError(f"{name} returned {int((~scores.isfinite()).sum())} scores that are NaN or infinite")
        return scores
