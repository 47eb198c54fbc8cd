"""Draws the figures of a study, into a file or for a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazyllm.ablation.curves import draw_curves
from lazyllm.ablation.figures import Figure
from lazyllm.ablation.growth import draw_growth, shares_of
from lazyllm.ablation.maps import draw_map
from lazyllm.errors import InputError
from lazyllm.evaluation.compare import Line
from lazyllm.evaluation.plots import DPI, new_figure, tidied

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

    from lazyllm.ablation.results import Results

PANEL = (4.8, 3.8)
"""Inches of one panel."""
ROW = 3
"""Panels side by side."""
FEW_CURVES = 6
"""That a panel has room to name."""
LEGEND_COLUMNS = 3
"""Names in a line of the legend, for each panel above it."""


def draw(results: Results, figure: Figure) -> Drawing:
    """The figure of what is known so far.

    Raises:
        InputError: when there is nothing to draw yet.
    """
    drawing = _growth(results, figure) if figure.kind == "growth" else _tasks(results, figure)
    return tidied(drawing)


def save_figure(results: Results, figure: Figure, path: str | Path) -> Path:
    """Draws into a file whose ending says how.

    Raises:
        InputError: when there is nothing to draw, or the file cannot be written.
    """
    path, drawing = Path(path), draw(results, figure)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        drawing.savefig(path, dpi=DPI)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {str(path)!r}: {getattr(error, 'strerror', None) or error}") from None
    return path


def svg_of(results: Results, figure: Figure) -> str:
    """The figure without its title as an `svg` element for a page, the same text every time."""
    from lazyllm.pages.drawing import inline_svg, page_style

    with page_style():
        drawing = draw(results, figure.model_copy(update={"title": ""}))
    return inline_svg(drawing)


def _tasks(results: Results, figure: Figure) -> Drawing:
    """A panel per task."""
    cells = results.plan.cells
    lines = [line for line in results.lines() if not cells[line.cell].is_stock]
    tasks = list(dict.fromkeys(_panel_of(line) for line in lines))
    drawing, panels = _panels(len(tasks), figure.title)
    for axes, task in zip(panels, tasks, strict=True):
        own = [(line, cells[line.cell]) for line in lines if _panel_of(line) == task]
        axes.set_title(task)
        if figure.kind == "map":
            draw_map(axes, figure, own)
        else:
            draw_curves(axes, figure, own, _stock_of(results, task))
    _name_curves(drawing, panels)
    return drawing


def _name_curves(drawing: Drawing, panels: Sequence[Any]) -> None:
    """In each panel where they are few, else below all of them, which then share the names."""
    named = [axes.get_legend_handles_labels() for axes in panels]
    shared = {label: handle for own in named for handle, label in zip(*own, strict=True)}
    if len(shared) > FEW_CURVES:
        columns = LEGEND_COLUMNS * min(ROW, len(panels))
        drawing.legend(shared.values(), shared, loc="outside lower center", ncols=columns, fontsize=7, frameon=False)
        return
    for axes, (handles, labels) in zip(panels, named, strict=True):
        if labels:  # a task without this measure has nothing to name
            axes.legend(handles, labels, loc="best", fontsize=7)


def _growth(results: Results, figure: Figure) -> Drawing:
    """A panel per cell."""
    shares = shares_of(results)
    drawing, panels = _panels(len(shares), figure.title)
    for axes, (cell, known) in zip(panels, shares.items(), strict=True):
        axes.set_title(cell)
        draw_growth(axes, known)
    _name_curves(drawing, panels)
    return drawing


def _stock_of(results: Results, task: str) -> Line | None:
    """The unmodified model's line in a panel; None where there are several, one for each setting."""
    found = [line for line in results.lines() if _panel_of(line) == task and results.plan.cells[line.cell].is_stock]
    return found[0] if len(found) == 1 else None


def _panel_of(line: Line) -> str:
    """The task without its options, which are an axis where they differ."""
    return line.task.partition("(")[0]


def _panels(count: int, title: str) -> tuple[Drawing, Sequence[Any]]:
    if not count:
        raise InputError("the study has no results to draw yet")
    columns = min(ROW, count)
    rows = -(-count // columns)
    drawing = new_figure((PANEL[0] * columns, PANEL[1] * rows))
    panels = drawing.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[count:]:
        axes.remove()
    if title:
        drawing.suptitle(title)
    return drawing, panels[:count]
