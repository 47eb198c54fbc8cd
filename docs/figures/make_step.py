"""Draws step.svg: one prefill and one decode step on a grid of tokens and layers.

Run it from anywhere: `python docs/figures/make_step.py`.
"""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

LAYERS, PROMPT = 4, 12
ENTERS = [set(range(12)), {0, 2, 3, 5, 6, 8, 10, 11}, {0, 3, 5, 8, 11}, {0, 5, 11}]
VISIBLE_IN_DECODE = [set(range(13)), {0, 1, 2, 3, 5, 8, 9, 11, 12}, {0, 2, 5, 9, 11, 12}, {0, 2, 9, 12}]
COMPUTED, REVIVED, STORED, EMPTY = "#4477aa", "#ee7733", "#c8d6e6", "#f4f4f4"
FRONTIER = "#aa3377"


def depths_after(visible: list[set[int]], depth: list[int]) -> tuple[set[tuple[int, int]], list[int]]:
    """The (layer, token) pairs a step computes, and the depth of every token after it."""
    depth, work = list(depth), set()
    for layer, tokens in enumerate(visible):
        for token in sorted(tokens):
            if depth[token] == layer:
                work.add((layer, token))
                depth[token] += 1
    return work, depth


def draw(axes: Axes, title: str, work: set[tuple[int, int]], before: list[int], depth: list[int]) -> None:
    """One panel: a cell per layer and token, a dot where an unfinished token waits."""
    for token in range(len(depth)):
        for layer in range(LAYERS):
            color = STORED if layer < before[token] else EMPTY
            if (layer, token) in work:
                color = COMPUTED if before[token] == 0 else REVIVED
            axes.add_patch(Rectangle((token, layer), 0.92, 0.86, facecolor=color, edgecolor="white"))
        if depth[token] < LAYERS:
            axes.plot(token + 0.46, depth[token] + 0.2, marker="o", color=FRONTIER, markersize=5)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlim(-0.1, len(depth))
    axes.set_ylim(-0.1, LAYERS)
    axes.set_xticks([token + 0.46 for token in range(len(depth))], [str(token) for token in range(len(depth))])
    axes.set_yticks([layer + 0.43 for layer in range(LAYERS)], [f"layer {layer}" for layer in range(LAYERS)])
    axes.set_xlabel("token")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def main() -> None:
    """Writes step.svg beside this file."""
    matplotlib.rcParams.update({"svg.hashsalt": "lazyllm", "font.size": 10, "svg.fonttype": "none"})
    matplotlib.rcParams["font.family"] = ["DejaVu Sans", "sans-serif"]
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[PROMPT, PROMPT + 1])
    fresh = [0] * PROMPT
    work, depth = depths_after(ENTERS, fresh)
    draw(left, "Prefill: 12 new tokens", work, fresh, depth)
    before = [*depth, 0]
    work, after = depths_after(VISIBLE_IN_DECODE, before)
    draw(right, "Next step: token 12 is new, tokens 1, 2 and 9 are revived", work, before, after)
    legend = [
        Patch(color=COMPUTED, label="computed in this step"),
        Patch(color=REVIVED, label="computed after a revival"),
        Patch(color=STORED, label="K/V from an earlier step"),
        Patch(facecolor=EMPTY, edgecolor="0.8", label="not computed yet"),
        Line2D([], [], marker="o", color=FRONTIER, linestyle="", label="Aux Cache entry"),
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.savefig(Path(__file__).with_name("step.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
