"""Figures; matplotlib is imported on use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lazyllm.result import GenerationStats

BANDS = 4


def plot_computed_tokens(stats: GenerationStats, path: str | Path) -> Path:
    """Share of context tokens computed so far, one line per band of layers, over steps; and tokens per layer in prefill.

    Redraws Figure 7 of Fu et al. 2024, arXiv 2407.14057, for one generation.
    """
    from matplotlib.figure import Figure

    path = Path(path)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps, layers = len(stats.tokens_per_layer), stats.layers
    prefill = [sum(step[layer].computed for step in stats.tokens_per_layer[: stats.prefill_steps]) for layer in range(layers)]
    left.bar(range(layers), prefill, color="tab:blue", width=0.9)
    left.axhline(stats.prompt_tokens, color="0.5", linestyle="--", label=f"dense: {stats.prompt_tokens:,}")
    left.set(xlabel="layer", ylabel="tokens computed in prefill", xlim=(-0.5, layers - 0.5), ylim=(0, None))
    left.legend(loc="lower left")
    for band in range(min(BANDS, layers)):
        start, stop = band * layers // BANDS, max((band + 1) * layers // BANDS, band + 1)
        shares, computed, seen = [], 0, stats.prompt_tokens
        for index, step in enumerate(stats.tokens_per_layer):
            computed += sum(layer.computed for layer in step[start:stop])
            seen += index >= stats.prefill_steps
            shares.append(100 * computed / (seen * (stop - start)))
        right.plot(range(steps), shares, marker=".", label=f"layers {start}-{stop - 1}")
    right.set(xlabel="step (0 = prefill)", ylabel="% of context computed so far", ylim=(0, 103))
    right.legend(loc="lower right")
    figure.savefig(path, dpi=130)
    return path
