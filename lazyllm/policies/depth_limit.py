"""Tokens that wait at one depth until somebody asks for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lazyllm.caches.step import Step
from lazyllm.models.attention import Captured
from lazyllm.policies.protect import no_tokens
from lazyllm.policies.scoring import Readings
from lazyllm.policies.select import Selector


class DepthLimit:
    """Takes every token through the first `depth` layers and none further; stands in for a Selector in one step.

    What the selector's scorer will look back on is kept, so that a later step chooses as if it had seen everything.

    Args:
        selector: which will choose later.
        depth: the number of layers.
    """

    def __init__(self, selector: Selector, depth: int) -> None:
        self.selector, self.depth = selector, depth
        self.reads_layers = selector.reads_layers

    def first(self, step: Step, read_next: Callable[[list[Tensor]], Captured]) -> list[Tensor]:
        """By row, all tokens of the context, or none when no layer is to run."""
        return self.select(step, -1, [torch.arange(len(row.ledger)) for row in step.rows], Readings())

    def notes_of(self, step: Step, layer: int, visible: list[Tensor]) -> Captured | None:
        """Where `layer` is to note what the scorer adds up; None if it adds nothing up."""
        if not self.selector.watches(layer):
            return None
        return Captured(updates=[] if self.selector.scorer.needs_update else None)

    def select(self, step: Step, layer: int, visible: list[Tensor], readings: Readings) -> list[Tensor]:
        """By row, all of `visible`, or none once `depth` layers have run."""
        self.selector.remember(step, layer, step.row_states(), readings)
        return visible if layer + 1 < self.depth else [no_tokens() for _ in visible]
