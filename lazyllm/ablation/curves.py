"""Panels with curves: a measure over an axis or another measure, and the line of cells that none beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from statistics import median
from typing import TYPE_CHECKING, Any

from lazyllm.ablation.figures import Figure
from lazyllm.ablation.measures import MEASURES
from lazyllm.evaluation.compare import Line
from lazyllm.evaluation.plots import reach_of
from lazyllm.evaluation.statistics import Effect

if TYPE_CHECKING:
    from lazyllm.ablation.plan import CellFacts

MARKERS = "osD^vPX*<"
"""One more than there are colours, so that colour and marker together come again only after all of their pairs."""

Points = Sequence[tuple[Line, "CellFacts"]]
"""Lines, each with its cell."""


def draw_curves(axes: Any, figure: Figure, points: Points, stock: Line | None) -> None:
    """One task's curves, and the unmodified model as a level where it has one."""
    measure = MEASURES[figure.y]
    level = measure.neutral
    if level is None and stock is not None:
        level = measure.value(stock)
    if level is not None:
        axes.axhline(level, color="0.5", linewidth=1, linestyle="--", label="unmodified")
    ticks = _ticks(figure.x, points)
    for index, (name, own) in enumerate(_by(figure.by, points).items()):
        look = {"color": f"C{index}", "marker": MARKERS[index % len(MARKERS)]}
        _draw_curve(axes, name, own, figure, ticks, look)
    if figure.kind == "front":
        _draw_front(axes, figure, points)
    axes.set(xlabel=MEASURES[figure.x].title if figure.x in MEASURES else figure.x, ylabel=measure.title)
    _scale(axes, figure.x, ticks)
    _keep_to_estimates(axes, [effect for line, _ in points if (effect := measure.read(line)) is not None])


def _scale(axes: Any, x: str, ticks: Mapping[str, float] | None) -> None:
    if x in MEASURES:
        axes.set_xscale("log" if x == "speedup" else "linear")
        axes.xaxis.set_major_formatter(lambda value, _: MEASURES[x].form.format(value))
        axes.xaxis.set_minor_formatter(lambda value, _: MEASURES[x].form.format(value))
        axes.tick_params(axis="x", which="both", labelsize=7)
    elif ticks is not None:
        axes.set_xticks(list(ticks.values()), list(ticks), rotation=20, ha="right", fontsize=7)


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
    axes: Any, name: str, points: Points, figure: Figure, ticks: Mapping[str, float] | None, look: Mapping[str, str]
) -> None:
    placed = [
        (x, y)
        for line, cell in points
        if (x := _place(figure.x, line, cell, ticks)) is not None and (y := MEASURES[figure.y].read(line)) is not None
    ]
    if not placed:
        return
    placed.sort(key=itemgetter(0))
    effects = [effect for _, effect in placed]
    style = {"linestyle": "-" if figure.by else "", "markersize": 4, "linewidth": 1.2, "capsize": 2, **look}
    places, middles = [x for x, _ in placed], [effect.estimate for effect in effects]
    axes.errorbar(places, middles, yerr=reach_of(effects), label=name, **style)


def _draw_front(axes: Any, figure: Figure, points: Points) -> None:
    """The stairs through the cells that no other beats in both measures."""
    over, up = MEASURES[figure.x], MEASURES[figure.y]
    known = [
        (one, two)
        for line, _ in points
        if (one := over.value(line)) is not None and (two := up.value(line)) is not None
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


def _by(axis: str | None, points: Points) -> dict[str, Points]:
    """Points by the label of their cell on an axis; cells that lie on none are named by themselves."""
    found: dict[str, list[tuple[Line, CellFacts]]] = {}
    for line, cell in points:
        found.setdefault(cell.labels.get(axis or "", cell.name), []).append((line, cell))
    return dict(found)


def _ticks(name: str, points: Points) -> dict[str, float] | None:
    """Where labels of an axis stand that are no numbers; None where all are."""
    if name in MEASURES:
        return None
    labels = list(dict.fromkeys(cell.labels[name] for _, cell in points if name in cell.labels))
    if all(number_in(label) is not None for label in labels):
        return None
    return {label: float(index) for index, label in enumerate(labels)}


def _place(name: str, line: Line, cell: CellFacts, ticks: Mapping[str, float] | None) -> float | None:
    if name in MEASURES:
        return MEASURES[name].value(line)
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
