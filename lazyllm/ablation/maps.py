"""Panels that colour a measure over two axes."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lazyllm.ablation.curves import Points, number_in
from lazyllm.ablation.figures import Figure
from lazyllm.ablation.measures import MEASURES, Measure


def draw_map(axes: Any, figure: Figure, points: Points) -> None:
    """One task's map; cells that lie on only one of the axes are left out."""
    placed = [(line, cell) for line, cell in points if figure.x in cell.labels and figure.y in cell.labels]
    if not placed:
        return
    measure = MEASURES[figure.of]
    columns, rows = (_in_order(cell.labels[name] for _, cell in placed) for name in (figure.x, figure.y))
    found: dict[tuple[int, int], list[float]] = {}
    for line, cell in placed:
        if (value := measure.value(line)) is not None:
            place = rows.index(cell.labels[figure.y]), columns.index(cell.labels[figure.x])
            found.setdefault(place, []).append(value)
    grid = np.full((len(rows), len(columns)), np.nan)
    for place, values in found.items():
        grid[place] = mean(values)
    _colour(axes, grid, measure)
    axes.set_xticks(range(len(columns)), columns, fontsize=7)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.set(xlabel=figure.x, ylabel=figure.y)


def _colour(axes: Any, grid: NDArray[np.float64], measure: Measure) -> None:
    """Colours the fields of a grid [rows, columns], writes its numbers into them, and explains the colours beside."""
    colours = "viridis" if measure.is_better_high else "viridis_r"
    shown = axes.imshow(grid, aspect="auto", cmap=colours, origin="lower")
    style = {"ha": "center", "va": "center", "fontsize": 7}
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            is_dark = (shown.norm(value) < 0.5) == measure.is_better_high
            axes.text(column, row, measure.form.format(value), color="white" if is_dark else "black", **style)
    axes.figure.colorbar(shown, ax=axes, label=measure.title)


def _in_order(labels: Iterable[str]) -> list[str]:
    """Labels once each; by their number where all have one, else as they come."""
    known = list(dict.fromkeys(labels))
    numbers = [number_in(label) for label in known]
    if any(number is None for number in numbers):
        return known
    return [label for _, label in sorted(zip(numbers, known, strict=True))]
