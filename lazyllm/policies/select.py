"""The one place where tokens are chosen: counts, rounding, protected tokens and revivals follow one rule."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from lazyllm.caches.step import Step
from lazyllm.errors import ConfigError, PolicyError
from lazyllm.models.attention import AttentionInputs
from lazyllm.policies.base import Keep, Phase, Schedule, ScoreContext, Scorer, stable_top
from lazyllm.policies.protect import Protect, no_tokens
from lazyllm.policies.query import query_tokens


class Selector:
    """Narrows the visible tokens of each row from layer to layer.

    Attributes:
        cut_layers: the layers before which tokens may be pruned, in any phase.

    Raises:
        ConfigError: when the schedule does not fit the model or the scorer.
    """

    def __init__(self, scorer: Scorer, schedule: Schedule, protect: Protect, layers: int) -> None:
        self.scorer, self.protect = scorer, protect
        self.cuts = lru_cache(maxsize=256)(lambda phase: schedule.cuts(layers, phase))
        phases = [Phase(is_prefill, sys.maxsize, asked) for is_prefill, asked in product((True, False), repeat=2)]
        self.cut_layers = frozenset(layer for phase in phases for layer in self.cuts(phase))
        if scorer.needs_attention and 0 in self.cut_layers:
            raise ConfigError(
                f"{schedule} prunes before layer 0, where {type(scorer).__name__} has no attention to read yet; "
                "start at layer 1 or later, or use a scorer that reads no attention"
            )

    def first(self, step: Step) -> list[Tensor]:
        """By row, the tokens that enter layer 0: the whole context of every row with new tokens."""
        visible = [
            torch.arange(len(row.ledger)) if new.numel() else no_tokens()
            for row, new in zip(step.rows, step.new, strict=True)
        ]
        return self.select(step, -1, visible, {})

    def will_score(self, step: Step, layer: int, visible: list[Tensor]) -> bool:
        """Whether the scorer will be asked after `layer`."""
        return any(self._cut(step, index, layer + 1, tokens) is not None for index, tokens in enumerate(visible))

    def select(
        self, step: Step, layer: int, visible: list[Tensor], attention: Mapping[int, AttentionInputs]
    ) -> list[Tensor]:
        """By row, those of `visible` that enter the layer after `layer`."""
        revives = step.selects and step.cache.policy.revives
        bounded = not revives or step.most_revived is not None
        if not self._may_narrow(step, layer + 1, bounded):
            return visible
        states = step.states[0].split([tokens.numel() for tokens in step.flight])
        chosen = []
        for index, tokens in enumerate(visible):
            self._remember(step, index, layer, states[index])
            keep = self._cut(step, index, layer + 1, tokens)
            if not revives or (keep is None and bounded):
                tokens = step.without_stopped(index, layer + 1, tokens)
            if keep is not None:
                tokens = self._top(step, index, layer, tokens, states[index], attention.get(index), keep)
            chosen.append(tokens)
        return chosen

    def _may_narrow(self, step: Step, layer: int, bounded: bool) -> bool:
        """Whether fewer tokens may enter `layer` than the one before: at a cut, or where not all stopped ones go on."""
        if layer in self.cut_layers:
            return True
        return bounded and any(step.any_stopped(row, layer) for row in range(len(step.rows)))

    def _remember(self, step: Step, index: int, layer: int, states: Tensor) -> None:
        if self.scorer.needs_memory and layer + 1 in self.cut_layers and step.cache.policy.prunes:
            step.rows[index].memory(layer).append(step.flight[index], states)

    def _cut(self, step: Step, index: int, layer: int, tokens: Tensor) -> Keep | None:
        """How many of `tokens` may enter `layer`; None where the scorer need not be asked."""
        if layer not in self.cut_layers or not step.selects:
            return None
        row = step.rows[index]
        context_tokens = len(row.ledger)
        keep = self.cuts(Phase(step.is_prefill, context_tokens, row.marks.asked)).get(layer)
        if keep is None:
            return None
        narrows = keep.adapts or tokens.numel() > keep.limit(context_tokens)
        if not narrows and (step.most_revived is None or not step.any_stopped(index, layer)):
            return None
        return None if bool(self._protected(step, index, tokens).all()) else keep

    def _protected(self, step: Step, index: int, tokens: Tensor) -> Tensor:
        row = step.rows[index]
        ranges = [*row.marks.protected, step.read_range(index)]
        mask = self.protect.mask(tokens, len(row.ledger), row.reply_start, ranges, asked=row.marks.asked)
        if self.scorer.reads_query is not None or row.marks.query:
            mask |= torch.isin(tokens, self._query(step, index, rolling=False))
        return mask

    def _query(self, step: Step, index: int, *, rolling: bool) -> Tensor:
        row = step.rows[index]
        return query_tokens(self.scorer.reads_query or "auto", row.marks.query, len(row.ledger), rolling=rolling)

    def _top(
        self,
        step: Step,
        index: int,
        layer: int,
        tokens: Tensor,
        states: Tensor,
        attention: AttentionInputs | None,
        keep: Keep,
    ) -> Tensor:
        row = step.rows[index]
        context_tokens = len(row.ledger)
        context = ScoreContext(
            layer=layer,
            tokens=tokens,
            positions=row.ledger.position[tokens],
            context_tokens=context_tokens,
            query=self._query(step, index, rolling=not step.is_prefill),
            computed=step.flight[index],
            states=states,
            attention=attention,
            memory=row.memories.get(layer),
            token_ids=row.ledger.token_id if row.ledger.knows_ids else None,
            starts=row.marks.starts,
        )
        scores = self._checked(self.scorer.score(context), tokens)
        kept = self._protected(step, index, tokens)
        free = torch.nonzero(~kept).squeeze(-1)
        best = free[stable_top(scores[free], keep.free_tokens(scores[free], int(kept.sum()), context_tokens))]
        if step.most_revived is not None:
            stopped = step.stopped(index, layer + 1, tokens)
            revived = best[stopped[best]][: step.most_revived - step.revived_tokens(index)]
            kept &= ~stopped
            best = torch.cat([best[~stopped[best]], revived])
        kept[best] = True
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
