"""A terminal recording as an SVG that plays by itself: text and CSS, no script, so that it plays as an image too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from xml.sax.saxutils import escape

import pyte
from cast import Cast
from pyte.screens import Char

FRAME_SECONDS = 0.08
"""What is written within this time is shown together."""
LAST_SECONDS = 4.0
"""How long the end stays before it begins again."""
CELL, LINE, FONT, EDGE, BAR = 8.0, 18.0, 13.3, 14.0, 26.0
"""In pixels: width and height of a character, size of the font, the frame's inner edge, and its title bar."""
PAPER, INK, FAINT = "#161b22", "#d6dde6", "#8b949e"
COLOURS = {
    "black": "#484f58",
    "red": "#ff7b72",
    "green": "#56d364",
    "brown": "#e3b341",
    "blue": "#79c0ff",
    "magenta": "#d2a8ff",
    "cyan": "#56d4dd",
    "white": "#d6dde6",
}
"""Of the terminal's sixteen; bright ones look like the others."""

TEXT = f"text{{font:{FONT}px ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;white-space:pre}}"
STILL = "@media(prefers-reduced-motion:reduce){g{animation:none!important}}"

Span = tuple[float, float]
"""From when to when, in seconds."""
Style = tuple[str, str, bool, bool, bool]
"""Colour of the text, of what is behind it; bold, italic, underlined."""


@dataclass(frozen=True)
class Run:
    """Characters of one style that stand side by side."""

    column: int
    text: str
    style: Style


Row = tuple[Run, ...]


@dataclass(frozen=True)
class Shown:
    """A row, and from when to when it stands on which line; `stop` is infinite for what stays to the end."""

    line: int
    row: Row
    start: float
    stop: float


def svg_of(cast: Cast, title: str = "") -> str:
    """The recording as SVG text."""
    loop = cast.seconds + LAST_SECONDS
    shown = list(lifespans(cast))
    styles = sorted({run.style for one in shown for run in one.row})
    names = {style: f"s{index}" for index, style in enumerate(styles)}
    spans = sorted({(one.start, one.stop) for one in shown})
    width, height = 2 * EDGE + cast.width * CELL, BAR + 2 * EDGE + cast.height * LINE
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img" '
        f'xml:space="preserve">',
        f"<title>{escape(title)}</title>",
        f"<style>{style_sheet(names, spans, loop)}</style>",
        f'<rect x=".5" y=".5" width="{width - 1:g}" height="{height - 1:g}" rx="9" fill="{PAPER}" stroke="#30363d"/>',
        *(f'<circle cx="{EDGE + 5 + 16 * dot:g}" cy="16" r="5" fill="#484f58"/>' for dot in range(3)),
        f'<g transform="translate({EDGE:g} {BAR + EDGE:g})">',
    ]
    for index, span in enumerate(spans):
        rows = "".join(row_svg(one, names) for one in shown if (one.start, one.stop) == span)
        parts.append(f'<g class="k{index}">{rows}</g>')
    return "\n".join([*parts, "</g>", "</svg>", ""])


def lifespans(cast: Cast) -> Iterator[Shown]:
    """Every row that stands on a line for a while."""
    standing: dict[int, tuple[Row, float]] = {}
    for seconds, rows in frames(cast):
        for line, row in enumerate(rows):
            old, since = standing.get(line, ((), 0.0))
            if row != old:
                if old:
                    yield Shown(line, old, since, seconds)
                standing[line] = row, seconds
    for line, (row, since) in standing.items():
        if row:
            yield Shown(line, row, since, float("inf"))


def frames(cast: Cast) -> Iterator[tuple[float, list[Row]]]:
    """What stands on the screen, from when on; changes that follow each other at once are one frame."""
    screen = pyte.Screen(cast.width, cast.height)
    stream = pyte.Stream(screen)
    began = cast.events[0][0] if cast.events else 0.0
    for index, (seconds, text) in enumerate(cast.events):
        stream.feed(text)
        following = cast.events[index + 1][0] if index + 1 < len(cast.events) else float("inf")
        if following - began >= FRAME_SECONDS:
            yield seconds, [row_of(screen, line) for line in range(cast.height)]
            began = following


def row_of(screen: pyte.Screen, line: int) -> Row:
    """The runs of a line; spaces that nobody sees are left out."""
    cells = [(column, screen.buffer[line][column]) for column in range(screen.columns)]
    runs = []
    for style, group in groupby(cells, key=lambda cell: style_of(cell[1])):
        members = list(group)
        text = "".join(char.data for _, char in members)
        lead = 0 if style[1] else len(text) - len(text.lstrip(" "))
        text = text if style[1] else text.strip(" ")
        if text:
            runs.append(Run(members[0][0] + lead, text, style))
    return tuple(runs)


def style_of(char: Char) -> Style:
    """How a character looks; blanks without a colour behind them look the same."""
    ink, paper = colour(char.fg, INK), colour(char.bg, "")
    if char.reverse:
        ink, paper = paper or PAPER, ink
    if char.data == " " and not paper:
        return INK, "", False, False, False
    return ink, paper, char.bold, char.italics, char.underscore


def colour(name: str, default: str) -> str:
    """A colour of the terminal as CSS."""
    if name == "default":
        return default
    named = COLOURS.get(name.removeprefix("bright"))
    return named or f"#{name}"


def style_sheet(names: dict[Style, str], spans: list[Span], loop: float) -> str:
    """What things look like, and when they are seen. Without animation the end is seen."""
    looks = (look(style, name) for style, name in names.items())
    return "".join([TEXT, *looks, *(timing(f"k{index}", span, loop) for index, span in enumerate(spans)), STILL])


def look(style: Style, name: str) -> str:
    """The rule of a style."""
    ink, _, bold, italic, underlined = style
    traits = {"font-weight:bold": bold, "font-style:italic": italic, "text-decoration:underline": underlined}
    return f".{name}{{{';'.join([f'fill:{ink}', *(trait for trait, has in traits.items() if has)])}}}"


def timing(name: str, span: Span, loop: float) -> str:
    """The rules by which something is seen from one moment of the loop to another."""
    start, stop = span
    stays = stop == float("inf")
    frames = [] if start == 0 else ["0%{visibility:hidden}"]
    frames.append(f"{percent(start, loop)}{',to' * stays}{{visibility:visible}}")
    if not stays:
        frames.append(f"{percent(stop, loop)},to{{visibility:hidden}}")
    rule = f"visibility:{'visible' if stays else 'hidden'};animation:{name} {loop:g}s step-end infinite"
    return f".{name}{{{rule}}}@keyframes {name}{{{''.join(frames)}}}"


def percent(seconds: float, loop: float) -> str:
    """A moment of the loop, as CSS."""
    return f"{100 * seconds / loop:.3f}".rstrip("0").rstrip(".") + "%"


def row_svg(shown: Shown, names: dict[Style, str]) -> str:
    """A row's runs, each as wide as its characters are in a terminal, whatever font is there."""
    top = shown.line * LINE
    return "".join(run_svg(run, top, names[run.style]) for run in shown.row)


def run_svg(run: Run, top: float, name: str) -> str:
    """The text, on its colour where it has one."""
    left, width = run.column * CELL, len(run.text) * CELL
    paper = run.style[1]
    behind = f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="{LINE:g}" fill="{paper}"/>' if paper else ""
    return (
        f'{behind}<text class="{name}" x="{left:g}" y="{top + 0.75 * LINE:g}" textLength="{width:g}" '
        f'lengthAdjust="spacingAndGlyphs">{escape(run.text)}</text>'
    )
