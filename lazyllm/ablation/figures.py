"""Pictures of a study: measures over axes and over each other, as curves, as a map, and over the steps of a reply."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import model_validator

from lazyllm.errors import ConfigError, InputError, unknown
from lazyllm.evaluation.compare import Line
from lazyllm.evaluation.plots import BAND_COLOURS, BANDS, DPI, new_figure, reach_of, tidied
from lazyllm.evaluation.statistics import Effect
from lazyllm.policies.base import Value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lazyllm.ablation.plan import CellFacts
    from lazyllm.ablation.results import Results

PANEL = (4.8, 3.8)
"""Inches of one panel."""
MARKERS = "osD^vPX*"
MOST_TOLD = 12
"""Cells that a picture is told with in words; of more the least and the most."""


@dataclass(frozen=True)
class Measure:
    """A figure of a line.

    Attributes:
        title: what an axis is called that shows it.
        read: its estimate and interval; None where the line has none.
        form: how a number is written.
        is_better_high: whether more of it is better.
        neutral: the unmodified model's, where it is the same in every study.
    """

    title: str
    read: Callable[[Line], Effect | None]
    form: str = "{:.2f}"
    is_better_high: bool = True
    neutral: float | None = None


def _plain(name: str) -> Callable[[Line], Effect | None]:
    """Reads a field that is a number without an interval."""

    def read(line: Line) -> Effect | None:
        value = getattr(line, name)
        return None if value is None else Effect(value, value, value)

    return read


def _effect(name: str) -> Callable[[Line], Effect | None]:
    return lambda line: getattr(line, name)


MEASURES: dict[str, Measure] = {
    "score": Measure("score", _plain("score")),
    "loss": Measure("loss per answer token", _plain("loss"), is_better_high=False),
    "loss_change": Measure("change of loss per answer token", _effect("loss_change"), "{:+.2f}", False, 0.0),
    "speedup": Measure("TTFT speedup", _effect("speedup"), "{:.1f}x", neutral=1.0),
    "decode_speedup": Measure("speedup per output token", _effect("decode_speedup"), "{:.2f}x", neutral=1.0),
    "computed_fraction": Measure("share computed in prefill", _plain("computed_fraction"), is_better_high=False),
    "memory": Measure("memory, of the unmodified model's", _plain("memory"), is_better_high=False, neutral=1.0),
    "recall": Measure("evidence kept", _plain("recall"), neutral=1.0),
    "agreement": Measure("agreement with the unmodified reply", _plain("agreement"), neutral=1.0),
}
"""What a picture can show of a line, by name."""


class Picture(Value):
    """One picture of a study, a panel per task, whatever its options.

    Attributes:
        kind: "curves" draws `y` over `x`, a curve for each value of the axis `by`; "front" adds the line of cells that
            none beats in both; "map" colours `of` over two axes; "growth" draws the share of the prompt that has been
            computed, by band of layers, over the steps of the reply, a panel per cell (Figure 7 of arXiv 2407.14057).
        x, y: axes of the study, or measures.
        by: an axis; every cell is a point of its own without one.
        of: a measure.
        title: above the picture.

    Raises:
        ConfigError: for a kind without what it shows.
    """

    kind: Literal["curves", "front", "map", "growth"] = "curves"
    x: str = "speedup"
    y: str = "score"
    by: str | None = None
    of: str = "score"
    title: str = ""

    @model_validator(mode="after")
    def _check(self) -> Picture:
        if self.kind in ("curves", "front") and self.y not in MEASURES:
            raise ConfigError(unknown("measure", self.y, MEASURES))
        if self.kind == "front" and self.x not in MEASURES:
            raise ConfigError(f"a front is drawn over a measure: {unknown('measure', self.x, MEASURES)}")
        if self.kind == "map" and self.of not in MEASURES:
            raise ConfigError(unknown("measure", self.of, MEASURES))
        return self

    def check_axes(self, titles: Iterable[str]) -> None:
        """Refuses names that are neither axes of a study nor measures.

        Raises:
            ConfigError: for one that is not.
        """
        known = set(titles)
        if self.kind == "growth":
            return
        wanted = {"map": [self.x, self.y]}.get(self.kind, [name for name in (self.x, self.by) if name])
        for name in wanted:
            allowed = known if self.kind == "map" or name == self.by else known | MEASURES.keys()
            if name not in allowed:
                raise ConfigError(f"the picture {self.title or self.kind!r}: {unknown('axis', name, allowed)}")


def draw(results: Results, picture: Picture) -> Figure:
    """The picture of what is known so far.

    Raises:
        InputError: when there is nothing to draw yet.
    """
    if picture.kind == "growth":
        return _growth(results, picture)
    lines = [line for line in results.lines() if not results.plan.cells[line.contender].is_stock]
    if not lines:
        raise InputError("the study has no results to draw yet")
    tasks = list(dict.fromkeys(_panel_of(line) for line in lines))
    figure, panels = _panels(len(tasks), picture.title)
    for axes, task in zip(panels, tasks, strict=True):
        own = [(line, results.plan.cells[line.contender]) for line in lines if _panel_of(line) == task]
        axes.set_title(task)
        if picture.kind == "map":
            _draw_map(axes, picture, own)
        else:
            _draw_curves(axes, picture, own, _stock_of(results, task))
    return tidied(figure)


def save_picture(results: Results, picture: Picture, path: str | Path) -> Path:
    """Draws into a file whose ending says how.

    Raises:
        InputError: when there is nothing to draw, or the file cannot be written.
    """
    path, figure = Path(path), draw(results, picture)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write {str(path)!r}: {getattr(error, 'strerror', None) or error}") from None
    return path


def svg_of(results: Results, picture: Picture) -> str:
    """The picture without its title as an `svg` element for a page, the same text every time."""
    from lazyllm.pages.drawing import inline_svg, page_style

    with page_style():
        figure = draw(results, picture.model_copy(update={"title": ""}))
    return inline_svg(figure)


def in_words(results: Results, picture: Picture) -> str:
    """What the picture shows, for those who cannot see it."""
    if picture.kind == "growth":
        return (
            "Share of the prompt computed by the end of the reply, mean over layers: "
            + "; ".join(
                f"{cell} {mean(mean(item[-1]) for item in known):.0%}" for cell, known in _growing(results).items()
            )
            + "."
        )
    shown = MEASURES[picture.of if picture.kind == "map" else picture.y]
    known = [
        (f"{line.task}, {line.contender}", value)
        for line in results.lines()
        if not results.plan.cells[line.contender].is_stock and (value := _value(shown.read(line))) is not None
    ]
    if is_short := len(known) > MOST_TOLD:
        known = [min(known, key=_number_of), max(known, key=_number_of)]
    told = "; ".join(f"{place} {shown.form.format(value)}" for place, value in known)
    what = f"{shown.title[:1].upper()}{shown.title[1:]}"
    return f"{what}{', from least to most' if is_short else ''}: {told}."


def _number_of(told: tuple[str, float]) -> float:
    return told[1]


def _stock_of(results: Results, task: str) -> Line | None:
    """The unmodified model's line in a panel; None where there are several, one for each setting."""
    found = [
        line for line in results.lines() if _panel_of(line) == task and results.plan.cells[line.contender].is_stock
    ]
    return found[0] if len(found) == 1 else None


def _panel_of(line: Line) -> str:
    """The task without its options, which are an axis where they differ."""
    return line.task.partition("(")[0]


def _panels(count: int, title: str) -> tuple[Figure, Sequence[Any]]:
    columns = min(3, count)
    rows = -(-count // columns)
    figure = new_figure((PANEL[0] * columns, PANEL[1] * rows))
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[count:]:
        axes.remove()
    if title:
        figure.suptitle(title)
    return figure, panels[:count]


# -- curves --------------------------------------------------------------------------------------------

Cells = Sequence[tuple[Line, "CellFacts"]]


def _draw_curves(axes: Any, picture: Picture, cells: Cells, stock: Line | None) -> None:
    measure = MEASURES[picture.y]
    level = measure.neutral
    if level is None and stock is not None:
        level = _value(measure.read(stock))
    if level is not None:
        axes.axhline(level, color="0.5", linewidth=1, linestyle="--", label="unmodified")
    ticks = _ticks(picture.x, cells)
    for index, (name, points) in enumerate(_by(picture.by, cells).items()):
        look = {"color": f"C{index}", "marker": MARKERS[index % len(MARKERS)]}
        _draw_curve(axes, name, points, picture, ticks, look)
    if picture.kind == "front":
        _draw_front(axes, picture, cells)
    axes.set(xlabel=_title(picture.x), ylabel=measure.title)
    if picture.x in MEASURES:
        axes.set_xscale("log" if picture.x == "speedup" else "linear")
        axes.xaxis.set_major_formatter(lambda value, _: MEASURES[picture.x].form.format(value))
        axes.xaxis.set_minor_formatter(lambda value, _: MEASURES[picture.x].form.format(value))
        axes.tick_params(axis="x", which="both", labelsize=7)
    elif ticks is not None:
        axes.set_xticks(list(ticks.values()), list(ticks), rotation=20, ha="right", fontsize=7)
    _keep_to_estimates(axes, [effect for line, _ in cells if (effect := measure.read(line)) is not None])
    if axes.get_legend_handles_labels()[0]:  # a task without this measure has nothing to name
        axes.legend(loc="best", fontsize=7)


def _keep_to_estimates(axes: Any, effects: Sequence[Effect]) -> None:
    """Cuts intervals that reach far further than most, as those of few items do, so that the estimates can be told."""
    if len(effects) < 2:
        return
    values = [effect.estimate for effect in effects]
    span = max(max(values) - min(values), median(effect.high - effect.low for effect in effects))
    low, high = axes.get_ylim()
    if span > 0:
        axes.set_ylim(max(low, min(values) - span), min(high, max(values) + span))


def _draw_curve(
    axes: Any, name: str, cells: Cells, picture: Picture, ticks: Mapping[str, float] | None, look: Mapping[str, str]
) -> None:
    points = [
        (x, y)
        for line, cell in cells
        if (x := _place(picture.x, line, cell, ticks)) is not None and (y := MEASURES[picture.y].read(line)) is not None
    ]
    if not points:
        return
    points.sort(key=lambda point: point[0])
    effects = [effect for _, effect in points]
    style = {"linestyle": "-" if picture.by else "", "markersize": 4, "linewidth": 1.2, "capsize": 2, **look}
    places, middles = [x for x, _ in points], [effect.estimate for effect in effects]
    axes.errorbar(places, middles, yerr=reach_of(effects), label=name, **style)


def _draw_front(axes: Any, picture: Picture, cells: Cells) -> None:
    """The stairs through the cells that no other beats in both measures."""
    over, up = MEASURES[picture.x], MEASURES[picture.y]
    known = [
        (one, two)
        for line, _ in cells
        if (one := _value(over.read(line))) is not None and (two := _value(up.read(line))) is not None
    ]
    if not known:
        return
    best = front(known, (over.is_better_high, up.is_better_high))
    axes.step(*zip(*best, strict=True), where="post", color="0.3", linewidth=1, alpha=0.7, label="front")


def front(points: Sequence[tuple[float, float]], is_better_high: tuple[bool, bool]) -> list[tuple[float, float]]:
    """The points that none beats in one value without losing in the other, in order of the first."""
    signs = [1 if high else -1 for high in is_better_high]
    found: list[tuple[float, float]] = []
    for point in sorted(set(points), key=lambda point: (-signs[0] * point[0], -signs[1] * point[1])):
        if not found or signs[1] * point[1] > signs[1] * found[-1][1]:
            found.append(point)
    return sorted(found)


def _by(axis: str | None, cells: Cells) -> dict[str, Cells]:
    """Cells by their label on an axis; those that lie on none are named by themselves."""
    found: dict[str, list[tuple[Line, CellFacts]]] = {}
    for line, cell in cells:
        found.setdefault(cell.labels.get(axis or "", cell.name), []).append((line, cell))
    return dict(found)


def _title(name: str) -> str:
    return MEASURES[name].title if name in MEASURES else name


def _value(effect: Effect | None) -> float | None:
    return None if effect is None else effect.estimate


def _ticks(name: str, cells: Cells) -> dict[str, float] | None:
    """Where labels of an axis stand that are no numbers; None where all are."""
    if name in MEASURES:
        return None
    labels = list(dict.fromkeys(cell.labels[name] for _, cell in cells if name in cell.labels))
    if all(number_in(label) is not None for label in labels):
        return None
    return {label: float(index) for index, label in enumerate(labels)}


def _place(name: str, line: Line, cell: CellFacts, ticks: Mapping[str, float] | None) -> float | None:
    if name in MEASURES:
        return _value(MEASURES[name].read(line))
    label = cell.labels.get(name)
    if label is None:
        return None
    return number_in(label) if ticks is None else ticks[label]


def number_in(label: str) -> float | None:
    """The number that a label is, None where it is none."""
    try:
        return float(label)
    except ValueError:
        return None


# -- maps ----------------------------------------------------------------------------------------------


def _draw_map(axes: Any, picture: Picture, cells: Cells) -> None:
    measure = MEASURES[picture.of]
    placed = [(line, cell) for line, cell in cells if picture.x in cell.labels and picture.y in cell.labels]
    if not placed:
        return
    columns, rows = (_in_order(cell.labels[name] for _, cell in placed) for name in (picture.x, picture.y))
    found: dict[tuple[int, int], list[float]] = {}
    for line, cell in placed:
        if (value := _value(measure.read(line))) is not None:
            place = rows.index(cell.labels[picture.y]), columns.index(cell.labels[picture.x])
            found.setdefault(place, []).append(value)
    grid = np.full((len(rows), len(columns)), np.nan)
    for place, values in found.items():
        grid[place] = float(np.mean(values))
    colours = "viridis" if measure.is_better_high else "viridis_r"
    shown = axes.imshow(grid, aspect="auto", cmap=colours, origin="lower")
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            dark = (shown.norm(value) < 0.5) == measure.is_better_high
            axes.text(
                column,
                row,
                measure.form.format(value),
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark else "black",
            )
    axes.set_xticks(range(len(columns)), columns, fontsize=7)
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.set(xlabel=picture.x, ylabel=picture.y)
    axes.figure.colorbar(shown, ax=axes, label=measure.title)


def _in_order(labels: Iterable[str]) -> list[str]:
    """Labels once each; by their number where all have one, else as they come."""
    known = list(dict.fromkeys(labels))
    numbers = [number_in(label) for label in known]
    if any(number is None for number in numbers):
        return known
    return [label for _, label in sorted(zip(numbers, known, strict=True))]


# -- growth --------------------------------------------------------------------------------------------


def _growth(results: Results, picture: Picture) -> Figure:
    """A panel per cell: means over all items, by band of layers."""
    shares = _growing(results)
    if not shares:
        raise InputError("the study has no results to draw yet")
    figure, panels = _panels(len(shares), picture.title)
    for axes, (cell, known) in zip(panels, shares.items(), strict=True):
        steps = max(map(len, known))
        layers = len(known[0][0])
        padded = np.array([[*item, *[item[-1]] * (steps - len(item))] for item in known])  # [items, steps, layers]
        for index, band in enumerate(np.array_split(np.arange(layers), min(BANDS, layers))):
            mean = padded[:, :, band].mean(axis=(0, 2))
            axes.plot(mean, color=BAND_COLOURS[index], label=f"layers {band[0] + 1}-{band[-1] + 1}")
        axes.set(title=cell, xlabel="tokens of the reply", ylabel="share of the prompt computed", ylim=(0, 1.02))
        axes.legend(loc="best", fontsize=7)
    return tidied(figure)


def _growing(results: Results) -> dict[str, list[list[list[float]]]]:
    """By cell, `_shares` of every item."""
    lazy = [cell for cell, facts in results.plan.cells.items() if not facts.is_stock]
    return {cell: known for cell in lazy if (known := list(_shares(results, cell)))}


def _shares(results: Results, cell: str) -> Iterator[list[list[float]]]:
    """Of each item, by step and layer, what share of the prompt has been computed."""
    for place in results.plan.places:
        verdict = results.verdict(place) if place.cell == cell else None
        if verdict is not None and verdict.growth:
            yield verdict.growth
