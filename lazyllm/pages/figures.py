"""Drawings for a report, as SVG that takes its ink from the page; matplotlib is imported on use."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from lazyllm.errors import InputError
from lazyllm.pages.report import Estimate, Figure

INK = "#010203"
"""Stands for the page's own ink until the drawing is written."""
COLOURS = ("#2f79ad", "#c4621c", "#3c8a55", "#a4529a", "#867722", "#c04a4a", "#5a6dcc", "#6b747f")
"""All with a contrast of 3 and more on a light page and on a dark one."""
MARKERS = "osD^vPX*"
LEGEND_COLUMNS = 3
STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "lazyllm",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Point:
    """A cell of a study in a drawing."""

    label: str
    x: Estimate
    y: Estimate


@dataclass(frozen=True)
class Axis:
    """What an axis shows, and which end of it is better."""

    name: str
    more_is_better: bool = True

    def better(self, one: Estimate, other: Estimate) -> float:
        """By how much one is better than the other."""
        return (one.value - other.value) * (1 if self.more_is_better else -1)


def front(points: Sequence[Point], x: Axis, y: Axis) -> list[Point]:
    """The points that no other one beats on one axis without losing on the other, from the lowest x on."""

    def beaten(point: Point) -> bool:
        gains = [(x.better(other.x, point.x), y.better(other.y, point.y)) for other in points]
        return any(min(gain) >= 0 and max(gain) > 0 for gain in gains)

    return sorted((point for point in points if not beaten(point)), key=lambda point: point.x.value)


def front_figure(groups: Mapping[str, Sequence[Point]], *, title: str, x: Axis, y: Axis) -> Figure:
    """Every point with its intervals, and the Pareto front over all groups.

    Args:
        groups: points by what they have in common, such as the scorer.
        title: what it shows.
        x, y: the axes, such as TTFT speedup and change of loss.

    Raises:
        InputError: when there is no point, or matplotlib is missing.
    """
    points = [point for group in groups.values() for point in group]
    if not points:
        raise InputError(f"the figure {title!r} has no points")
    best = front(points, x, y)

    def draw(axes: Any) -> None:
        for (name, group), colour, marker in zip(groups.items(), cycle(COLOURS), cycle(MARKERS)):
            _draw_points(axes, name, group, colour, marker)
        axes.plot(*_places(best), color=INK, linewidth=0.8, zorder=1, label="front")
        for number, point in enumerate(best, 1):
            place = (point.x.value, point.y.value)
            axes.annotate(str(number), place, xytext=(4, 4), textcoords="offset points")

    listed = [f"{number} {p.label} ({_said(p.x)}, {_said(p.y)})" for number, p in enumerate(best, 1)]
    text = f"{_opening(y)} over {x.name}. Of {len(points)} points {len(best)} are on the front: {'; '.join(listed)}."
    return Figure(title, _drawn(x, y, draw), text)


def curve_figure(curves: Mapping[str, Sequence[Point]], *, title: str, x: Axis, y: Axis) -> Figure:
    """Curves over a swept value, each with its intervals as a band.

    Raises:
        InputError: when there is no point, or matplotlib is missing.
    """
    if not any(curves.values()):
        raise InputError(f"the figure {title!r} has no points")

    def draw(axes: Any) -> None:
        for (name, points), colour, marker in zip(curves.items(), cycle(COLOURS), cycle(MARKERS)):
            _draw_curve(axes, name, points, colour, marker)

    told = [f"{name}: " + ", ".join(f"{_said(p.y)} at {_said(p.x)}" for p in points) for name, points in curves.items()]
    return Figure(title, _drawn(x, y, draw), f"{_opening(y)} over {x.name}. {'; '.join(told)}.")


def _drawn(x: Axis, y: Axis, draw: Callable[[Any], None]) -> str:
    """What `draw` puts between the axes; without a date or a background, so that the same points give the same text."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure as Canvas
    except ImportError:
        raise InputError("figures need matplotlib, which is not installed: pip install lazyllm-torch[pages]") from None
    written = io.StringIO()
    with mpl.rc_context(STYLE):
        canvas = Canvas(figsize=(5.6, 3.7), layout="constrained")
        axes = canvas.subplots()
        axes.set(xlabel=x.name, ylabel=y.name)
        draw(axes)
        canvas.legend(loc="outside upper left", ncols=LEGEND_COLUMNS, fontsize=8)
        canvas.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _of_the_page(written.getvalue())


def _of_the_page(svg: str) -> str:
    """The `svg` element with the page's ink and font."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"font: (\S+) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    return re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)


def _draw_curve(axes: Any, name: str, points: Sequence[Point], colour: str, marker: str) -> None:
    points = sorted(points, key=lambda point: point.x.value)
    xs, ys = _places(points)
    axes.plot(xs, ys, color=colour, marker=marker, markersize=4, linewidth=1.2, label=name)
    lows, highs = zip(*(_interval(point.y) for point in points), strict=True)
    axes.fill_between(xs, lows, highs, color=colour, alpha=0.2, linewidth=0)


def _draw_points(axes: Any, name: str, points: Sequence[Point], colour: str, marker: str) -> None:
    xs, ys = _places(points)
    reach = {"xerr": _reach([point.x for point in points]), "yerr": _reach([point.y for point in points])}
    axes.errorbar(xs, ys, **reach, fmt=marker, color=colour, markersize=4.5, elinewidth=0.6, label=name)


def _reach(estimates: Sequence[Estimate]) -> tuple[list[float], list[float]]:
    """How far each interval goes below its value, and above."""
    ends = [(*_interval(estimate), estimate.value) for estimate in estimates]
    return [value - low for low, _, value in ends], [high - value for _, high, value in ends]


def _places(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [point.x.value for point in points], [point.y.value for point in points]


def _interval(estimate: Estimate) -> tuple[float, float]:
    """Its ends; the value itself where it has none."""
    low = estimate.value if estimate.low is None else estimate.low
    high = estimate.value if estimate.high is None else estimate.high
    return min(low, estimate.value), max(high, estimate.value)


def _opening(axis: Axis) -> str:
    return axis.name[:1].upper() + axis.name[1:]


def _said(estimate: Estimate) -> str:
    return f"{estimate.value:.3g}"
