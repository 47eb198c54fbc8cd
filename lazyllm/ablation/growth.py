"""How much of the prompt has been computed, over the steps of the reply."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lazyllm.evaluation.plots import BAND_COLOURS, BANDS

if TYPE_CHECKING:
    from lazyllm.ablation.results import Results

Growth = list[list[float]]
"""Of an item, by step and layer, the share of the prompt that has been computed."""


def shares_of(results: Results) -> dict[str, list[Growth]]:
    """By cell, the growth of every item; cells without results are left out."""
    lazy = [cell for cell, facts in results.plan.cells.items() if not facts.is_stock]
    return {cell: known for cell in lazy if (known := list(_of_cell(results, cell)))}


def _of_cell(results: Results, cell: str) -> Iterator[Growth]:
    for place in results.plan.places:
        verdict = results.verdict(place) if place.cell == cell else None
        if verdict is not None and verdict.growth:
            yield verdict.growth


def draw_growth(axes: Any, known: Sequence[Growth]) -> None:
    """One cell's shares, means over all items, by band of layers."""
    steps = max(map(len, known))
    layers = len(known[0][0])
    padded = np.array([[*item, *[item[-1]] * (steps - len(item))] for item in known])  # [items, steps, layers]
    for index, band in enumerate(np.array_split(np.arange(layers), min(BANDS, layers))):
        mean = padded[:, :, band].mean(axis=(0, 2))
        axes.plot(mean, color=BAND_COLOURS[index], label=f"layers {band[0] + 1}-{band[-1] + 1}")
    axes.set(xlabel="tokens of the reply", ylabel="share of the prompt computed", ylim=(0, 1.02))
