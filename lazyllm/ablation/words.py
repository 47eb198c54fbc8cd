"""What figures show in words, for those who cannot see them."""

from __future__ import annotations

from operator import itemgetter
from statistics import mean
from typing import TYPE_CHECKING

from lazyllm.ablation.figures import Figure
from lazyllm.ablation.growth import shares_of
from lazyllm.ablation.measures import MEASURES

if TYPE_CHECKING:
    from lazyllm.ablation.results import Results

MOST_TOLD = 12
"""Cells that a figure is told with; of more the least and the most."""


def in_words(results: Results, figure: Figure) -> str:
    """What the figure shows."""
    if figure.kind == "growth":
        return _growth(results)
    shown = MEASURES[figure.of if figure.kind == "map" else figure.y]
    known = [
        (f"{line.task}, {line.cell}", value)
        for line in results.lines()
        if not results.plan.cells[line.cell].is_stock and (value := shown.value(line)) is not None
    ]
    if is_short := len(known) > MOST_TOLD:
        known = [min(known, key=itemgetter(1)), max(known, key=itemgetter(1))]
    told = "; ".join(f"{place} {shown.form.format(value)}" for place, value in known)
    what = f"{shown.title[:1].upper()}{shown.title[1:]}"
    return f"{what}{', from least to most' if is_short else ''}: {told}."


def _growth(results: Results) -> str:
    ends = {cell: mean(mean(item[-1]) for item in known) for cell, known in shares_of(results).items()}
    told = "; ".join(f"{cell} {share:.0%}" for cell, share in ends.items())
    return f"Share of the prompt computed by the end of the reply, mean over layers: {told}."
