"""Draws what the pages on concepts explain, as SVG that follows the system's light or dark colours.

Run it from anywhere: `python docs/figures/make_diagrams.py`. All drawings but one show the same history: a prefill of
twelve tokens through four layers, and a step that brings one more and revives three.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parent
WIDTH = 540
LAYERS, PROMPT = 4, 12
PREFILL = [set(range(12)), {0, 2, 3, 5, 6, 8, 10, 11}, {0, 3, 5, 8, 11}, {0, 5, 11}]
STEP = [set(range(13)), {0, 1, 2, 3, 5, 8, 9, 11, 12}, {0, 2, 5, 9, 11, 12}, {0, 2, 9, 12}]
"""By layer, what is visible."""
LEFT, CELL, ROW = 62, 36, 27
"""Where the first column begins, how wide a column and how high a row is."""

STYLE = """
  .ground { fill: #fdfdfb; stroke: #d7d7d0; }
  text { font: 13px system-ui, sans-serif; fill: #16191d; }
  .title { font-weight: 600; }
  .quiet { fill: #565d66; }
  .middle { text-anchor: middle; }
  .end { text-anchor: end; }
  .computed { fill: #2f79ad; }
  .revived { fill: #d9732b; }
  .stored { fill: #bcd0e1; }
  .empty { fill: #ecece7; }
  .waiting { fill: #a4529a; }
  .box { fill: #f4f4f0; stroke: #9aa1a9; }
  .own { fill: #dfeaf3; stroke: #2f79ad; }
  .line { fill: none; stroke: #565d66; stroke-width: 1.5; }
  .tip { fill: #565d66; }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #171b20; stroke: #353b44; }
    text { fill: #e6e9ed; }
    .quiet { fill: #a1a9b4; }
    .computed { fill: #4b95c9; }
    .revived { fill: #e08a4a; }
    .stored { fill: #2d4a62; }
    .empty { fill: #242a32; }
    .waiting { fill: #d58bd0; }
    .box { fill: #20262d; stroke: #6b747f; }
    .own { fill: #1b3449; stroke: #4b95c9; }
    .line { stroke: #a1a9b4; }
    .tip { fill: #a1a9b4; }
  }
"""


@dataclass
class Drawing:
    """Elements of an SVG, and how far down it reaches."""

    title: str
    description: str
    height: float = 0
    elements: list[str] = field(default_factory=list)

    def add(self, element: str, bottom: float) -> None:
        """An element that reaches down to `bottom`."""
        self.elements.append(element)
        self.height = max(self.height, bottom)

    def rect(self, kind: str, x: float, y: float, width: float, height: float) -> None:
        """A rectangle with rounded corners."""
        self.add(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3"/>', y + height)

    def text(self, x: float, y: float, words: object, kind: str = "") -> None:
        """Words on the line `y`."""
        self.add(f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(str(words))}</text>', y + 4)

    def dot(self, x: float, y: float) -> None:
        """A state that waits."""
        self.add(f'<circle class="waiting" cx="{x:g}" cy="{y:g}" r="4.5"/>', y + 5)

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line through points with a tip at the last one."""
        path = " L".join(f"{x:g} {y:g}" for x, y in points)
        self.add(f'<path class="line" d="M{path}" marker-end="url(#tip)"/>', max(y for _, y in points))

    @property
    def svg(self) -> str:
        """The file."""
        height = self.height + 14
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:g}" '
            f'viewBox="0 0 {WIDTH} {height:g}" role="img" aria-labelledby="t d">',
            f'<title id="t">{escape(self.title)}</title>',
            f'<desc id="d">{escape(self.description)}</desc>',
            f"<style>{STYLE}</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path class="tip" d="M0 0 L8 4 L0 8 z"/></marker></defs>',
            f'<rect class="ground" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:g}" rx="6"/>',
            *self.elements,
            "</svg>\n",
        ]
        return "\n".join(lines)


def run(visible: list[set[int]], depth: list[int]) -> tuple[set[tuple[int, int]], list[int]]:
    """The (layer, token) pairs a step computes, and the depth of every token after it."""
    depth, work = list(depth), set()
    for layer, tokens in enumerate(visible):
        for token in sorted(tokens):
            if depth[token] == layer:
                work.add((layer, token))
                depth[token] += 1
    return work, depth


def across(token: float) -> float:
    """Where the column of a token begins."""
    return LEFT + token * CELL


def grid(drawing: Drawing, top: float, work: set[tuple[int, int]], before: list[int], after: list[int]) -> float:
    """A cell per layer and token, the last layer on top, and a dot where a token waits; gives where it ends."""
    for layer in range(LAYERS):
        y = top + (LAYERS - 1 - layer) * ROW
        drawing.text(LEFT - 8, y + 17, f"layer {layer}", "quiet end")
        for token in range(len(after)):
            drawing.rect(kind_of(layer, token, work, before), across(token), y, CELL - 3, ROW - 3)
    for token, depth in enumerate(after):
        if depth < LAYERS:
            drawing.dot(across(token) + (CELL - 3) / 2, top + (LAYERS - 1 - depth) * ROW + (ROW - 3) / 2)
    bottom = top + LAYERS * ROW
    numbers(drawing, bottom + 12, "token", range(len(after)), "quiet")
    return bottom + 16


def kind_of(layer: int, token: int, work: set[tuple[int, int]], before: list[int]) -> str:
    """How a cell looks: what this step computed, what an earlier one stored, or nothing."""
    if (layer, token) in work:
        return "computed" if before[token] == 0 else "revived"
    return "stored" if layer < before[token] else "empty"


def numbers(drawing: Drawing, y: float, name: str, values: Iterable[int], kind: str = "") -> None:
    """A row of numbers, one below each column."""
    drawing.text(LEFT - 8, y, name, f"{kind} end")
    for token, value in enumerate(values):
        drawing.text(across(token) + (CELL - 3) / 2, y, value, f"{kind} middle")


def legend(drawing: Drawing, top: float, *entries: tuple[str, str]) -> None:
    """What the colours mean, two to a line."""
    for place, (kind, words) in enumerate(entries):
        x, y = 16 + place % 2 * 260, top + place // 2 * 22
        if kind == "waiting":
            drawing.dot(x + 7, y + 7)
        else:
            drawing.rect(kind, x, y, 14, 14)
        drawing.text(x + 22, y + 12, words)


KINDS = {
    "computed": "computed in this step",
    "revived": "computed after a revival",
    "stored": "K/V from an earlier step",
    "empty": "not computed yet",
    "waiting": "state that waits (Aux Cache)",
}


def history() -> Iterator[tuple[set[tuple[int, int]], list[int], list[int]]]:
    """Of the prefill and the step behind it: the work, and the depths before and after."""
    depth = [0] * PROMPT
    for visible in (PREFILL, STEP):
        before = depth if visible is PREFILL else [*depth, 0]
        work, depth = run(visible, before)
        yield work, before, depth


def step() -> Drawing:
    """A prefill and the step after it."""
    drawing = Drawing(
        "A prefill and the step after it",
        "A grid of tokens and layers. In the prefill twelve tokens enter layer 0, eight layer 1, five layer 2 and "
        "three layer 3. In the next step token 12 is new, and tokens 1, 2 and 9 go on from where they stopped.",
    )
    titles = ("Prefill: 12 new tokens", "Next step: token 12 is new; tokens 1, 2 and 9 are revived")
    bottom = 0.0
    for title, (work, before, after) in zip(titles, history(), strict=True):
        drawing.text(16, bottom + 26, title, "title")
        bottom = grid(drawing, bottom + 38, work, before, after) + 10
    legend(drawing, bottom + 10, *KINDS.items())
    return drawing


def ledger() -> Drawing:
    """One number per token says what is computed, what is stored and what waits."""
    drawing = Drawing(
        "The ledger: one number per token",
        "Below a grid of tokens and layers stands the depth of each token before and after the step. K/V exist in the "
        "cells below the depth; a state waits at the depth of each token that is not through.",
    )
    _, (work, before, after) = history()
    drawing.text(16, 26, "K/V after the step, and the ledger below", "title")
    bottom = grid(drawing, 38, work, before, after)
    numbers(drawing, bottom + 22, "before", before)
    numbers(drawing, bottom + 42, "depth", after, "title")
    legend(drawing, bottom + 60, *((kind, KINDS[kind]) for kind in KINDS))
    return drawing


def revival() -> Drawing:
    """One token before, in and after the step that revives it."""
    drawing = Drawing(
        "Token 9 is revived",
        "Before the step token 9 has K/V at layer 0 and one waiting state. In the step layers 1 to 3 compute it from "
        "that state and write its K/V. After it nothing waits.",
    )
    columns = (
        ("after the prefill", ["stored"], "depth 1: K/V at layer 0,", "one state waits"),
        ("in the step", ["stored", *["revived"] * 3], "layers 1 to 3 go on", "from that state"),
        ("after the step", ["stored"] * 4, "depth 4: K/V everywhere,", "nothing waits"),
    )
    for place, (title, kinds, first, second) in enumerate(columns):
        x = 16 + place * 176
        drawing.text(x, 26, title, "title")
        for layer in range(LAYERS):
            y = 44 + (LAYERS - 1 - layer) * 38
            drawing.rect(kinds[layer] if layer < len(kinds) else "empty", x + 56, y, 72, 28)
            drawing.text(x + 48, y + 19, f"layer {layer}", "quiet end")
        if place == 0:
            drawing.dot(x + 92, 44 + 2 * 38 + 14)
        if place == 1:
            drawing.dot(x + 92, 44 + 3 * 38 - 5)
            drawing.arrow((x + 144, 44 + 3 * 38 - 4), (x + 144, 44))
        drawing.text(x, 216, first)
        drawing.text(x, 234, second)
    return drawing


def place() -> Drawing:
    """The parts of a call, and which of them are lazyllm's."""
    drawing = Drawing(
        "Where lazyllm sits in a model",
        "transformers embeds the tokens, and has norm, head and sampling behind the layers. Between them one module "
        "runs the original layers in a loop: take the visible tokens of this depth, run the layer, write K/V and "
        "depths, choose who enters the next one.",
    )
    outer = (("embedding", 16, 92), ("norm, head, sampling", 366, 158))
    for words, x, width in outer:
        drawing.rect("box", x, 28, width, 36)
        drawing.text(x + width / 2, 51, words, "middle")
    drawing.rect("own", 144, 28, 186, 36)
    drawing.text(237, 51, "layers: the LazyStack", "middle title")
    drawing.arrow((108, 46), (142, 46))
    drawing.arrow((330, 46), (364, 46))
    drawing.text(16, 98, "For each layer i, in order:", "title")
    parts = (
        ("1  todo", "visible tokens", "whose depth is i"),
        ("2  states", "in flight, or from", "the Aux Cache"),
        ("3  the layer", "as it is; K/V and", "depth are written"),
        ("4  choose", "score, schedule:", "who enters i + 1"),
    )
    for number, (name, first, second) in enumerate(parts):
        x = 16 + number * 130
        drawing.rect("own" if number != 2 else "box", x, 110, 118, 72)
        drawing.text(x + 10, 131, name, "title")
        drawing.text(x + 10, 151, first)
        drawing.text(x + 10, 169, second)
        if number:
            drawing.arrow((x - 12, 146), (x - 2, 146))
    drawing.arrow((465, 182), (465, 202), (75, 202), (75, 184))
    drawing.text(270, 220, "next layer", "quiet middle")
    legend(drawing, 236, ("own", "lazyllm"), ("box", "transformers, unchanged"))
    return drawing


def replay() -> Drawing:
    """The mask that makes one dense forward equal to the history, at layer 2."""
    drawing = Drawing(
        "The mask of layer 2 for the replay",
        "A row for each token and a column for each key. A token that layer 2 computed in the prefill sees what was "
        "visible then, one that it computed in the step what was visible in the step. Others have no row.",
    )
    size, left, top, layer = 25, 92, 62, 2
    (first, _, _), (second, _, _) = history()
    drawing.text(16, 26, "Who attended to whom at layer 2", "title")
    drawing.text(left + 6.5 * size, 48, "key of token", "quiet middle")
    for token in range(PROMPT + 1):
        y = top + 14 + token * size
        drawing.text(left + token * size + 11, top + 6, token, "quiet middle")
        drawing.text(left - 8, y + 16, f"token {token}", "quiet end")
        for work, visible, kind in ((first, PREFILL, "computed"), (second, STEP, "revived")):
            if (layer, token) in work:
                seen = {other for other in visible[layer] if other <= token}
                for key in range(PROMPT + 1):
                    drawing.rect(kind if key in seen else "empty", left + key * size, y, size - 3, size - 3)
    bottom = top + 14 + 13 * size
    entries = ("computed", "computed in the prefill"), ("revived", "computed in the step"), ("empty", "not seen")
    legend(drawing, bottom + 12, *entries)
    return drawing


DRAWINGS = (step, ledger, revival, place, replay)


def main() -> None:
    """Writes all of them beside this file."""
    for draw in DRAWINGS:
        (FOLDER / f"{draw.__name__}.svg").write_text(draw().svg, encoding="utf-8")


if __name__ == "__main__":
    main()
