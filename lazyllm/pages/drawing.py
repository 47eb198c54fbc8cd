"""Drawings on a page: SVG that takes its ink from the page, so that it can be read in the dark too."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lazyllm.extras import needed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#010203"
"""Stands for the page's own ink until the drawing is written."""
COLOURS = ("#2f79ad", "#c4621c", "#3c8a55", "#a4529a", "#867722", "#c04a4a", "#5a6dcc", "#6b747f")
"""All with a contrast of 3 and more on a light page and on a dark one."""
STYLE = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "lazyllm",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": "none",
    "legend.frameon": False,
}


@contextmanager
def page_style() -> Iterator[None]:
    """What is drawn within is for a page."""
    matplotlib = needed("matplotlib", what="a figure", extra="plots")
    with matplotlib.rc_context({**STYLE, "axes.prop_cycle": matplotlib.cycler(color=COLOURS)}):
        yield


def inline_svg(figure: Figure) -> str:
    """The `svg` element of a figure that was drawn in `page_style`, the same text every time."""
    written = io.StringIO()
    with page_style():
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"font: (\S+) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    return re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
