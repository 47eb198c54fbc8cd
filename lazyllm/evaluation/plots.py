"""Figures; matplotlib is imported on use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lazyllm.extras import needed

if TYPE_CHECKING:
    from lazyllm.callbacks import TokenTrace
    from lazyllm.costs import Prediction
    from lazyllm.evaluation.bench import BenchReport, Spread
    from lazyllm.evaluation.compare import Line
    from lazyllm.evaluation.engines import EngineReport
    from lazyllm.evaluation.limits import Entry
    from lazyllm.evaluation.memory import ReplySize
    from lazyllm.evaluation.predictions import Check
    from lazyllm.evaluation.scorers import Kept
    from lazyllm.evaluation.statistics import Effect
    from lazyllm.generation.result import GenerationStats

BANDS = 4
NAMED_CURVES = 6
DPI = 130
LAZY, DENSE = "#2a6f97", "0.82"
BAND_COLOURS = ("#013a63", "#2a6f97", "#e09f3e", "#9e2a2b")


def plot_computed_tokens(stats: GenerationStats, path: str | Path) -> Path:
    """Tokens computed per layer in prefill, and the share of the context computed so far per band of layers over steps.

    Redraws Figure 7 of Fu et al. 2024, arXiv 2407.14057, for one generation.
    """
    path, figure = _new_figure(path, (11, 4.2))
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    _draw_prefill(left, stats)
    _draw_shares(right, stats)
    return _save(figure, path)


def plot_bench(reports: Sequence[BenchReport], path: str | Path) -> Path:
    """Median TTFT with its range, and realised beside predicted speedup; one row of panels per report."""
    path, figure = _new_figure(path, (13, 4.4 * len(reports)))
    for (left, right), report in zip(figure.subplots(len(reports), 2, squeeze=False), reports, strict=True):
        _draw_ttft(left, report)
        _draw_speedups(right, report)
    return _save(figure, path)


def plot_engines(report: EngineReport, path: str | Path) -> Path:
    """Median and range of TTFT and of the time per output token, engine by engine and by prompt length."""
    names = list(dict.fromkeys(line.name for line in report.lines))
    path, figure = _new_figure(path, (14, 1.6 + 0.42 * len(names)))
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_engines(left, report, names, "ttft_seconds", 1)
    _draw_engines(right, report, names, "seconds_per_output_token", 1000)
    left.set(title=f"{report.model}, {report.environment['threads']} threads", xlabel="TTFT in seconds")
    right.set(title=f"median and range of {report.rounds} rounds", xlabel="ms per output token")
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    for axes in (left, right):
        axes.legend(loc="best")
    return _save(figure, path)


def _draw_engines(axes: Any, report: EngineReport, names: Sequence[str], figure: str, factor: float) -> None:
    lengths = list(dict.fromkeys(line.prompt_tokens for line in report.lines))
    height = 0.8 / len(lengths)
    for index, length in enumerate(lengths):
        lines = [line for line in report.lines if line.prompt_tokens == length and getattr(line, figure) is not None]
        at = [names.index(line.name) + (index - (len(lengths) - 1) / 2) * height for line in lines]
        middles, reach = _middles_and_reach([getattr(line, figure) for line in lines], factor=factor)
        colour = BAND_COLOURS[index % len(BAND_COLOURS)]
        axes.barh(at, middles, height, color=colour, label=f"{length:,} tokens")
        axes.errorbar(middles, at, xerr=reach, fmt="none", ecolor="0.25", elinewidth=1, capsize=2)


def plot_quality(lines: Sequence[Line], path: str | Path) -> Path:
    """Change of the right answer's loss over TTFT speedup, one panel per task (Figure 5 of arXiv 2407.14057).

    Cells whose names differ only behind an `@` are points of one curve.
    """
    from lazyllm.evaluation.compare import groups
    from lazyllm.evaluation.quality import STOCK

    tasks = {task: [line for line in group if line.cell != STOCK] for task, group in groups(lines)}
    methods = list(dict.fromkeys(_method(line) for line in lines if line.cell != STOCK))
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    path, figure = _new_figure(path, (4.6 * columns, 3.6 * rows))
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(tasks) :]:
        axes.remove()
    for axes, (task, group) in zip(panels, tasks.items(), strict=False):
        axes.axhline(0, color="0.5", linewidth=1, linestyle="--")
        axes.axvline(1, color="0.5", linewidth=1, linestyle="--")
        for index, method in enumerate(methods):
            _draw_curve(axes, method, [line for line in group if _method(line) == method], f"C{index}")
        axes.set(title=task, xlabel="TTFT speedup", xscale="log", ylabel="change of loss per answer token")
        axes.xaxis.set_major_formatter("{x:g}x")
        axes.xaxis.set_minor_formatter("{x:g}x")
        axes.tick_params(axis="x", which="both", labelsize=7)
        axes.legend(loc="best", fontsize=7)
    return _save(figure, path)


def _method(line: Line) -> str:
    return line.cell.partition("@")[0]


def _draw_curve(axes: Any, method: str, points: Sequence[Line], colour: str) -> None:
    timed = [(line.speedup.estimate, line.loss_change) for line in points if line.speedup is not None]
    timed.sort(key=lambda point: point[0])
    speedups, effects = [speedup for speedup, _ in timed], [effect for _, effect in timed]
    style = {"fmt": "o-", "markersize": 4, "linewidth": 1.2, "color": colour, "capsize": 2, "label": method}
    axes.errorbar(speedups, [effect.estimate for effect in effects], yerr=reach_of(effects), **style)


def plot_recall(found: Sequence[Kept], path: str | Path) -> Path:
    """Share of the evidence, and of the oracle's tokens, that scorers keep over the keep ratio; one column per layer.

    Means over the tasks. The best scorers and the oracle are named, the others grey.
    """
    from lazyllm.evaluation.scorers import MEASURES

    shown = {measure: [one for one in found if getattr(one, measure) is not None] for measure in MEASURES}
    shown = {measure: points for measure, points in shown.items() if points}
    layers, colours = sorted({one.layer for one in found}), _scorer_colours(found)
    path, figure = _new_figure(path, (5.2 * len(layers), 4.2 * len(shown)))
    panels = figure.subplots(len(shown), len(layers), squeeze=False)
    for row, (measure, points) in zip(panels, shown.items(), strict=True):
        for axes, layer in zip(row, layers, strict=True):
            _draw_recall(axes, [one for one in points if one.layer == layer], measure, colours)
            axes.set(title=f"{MEASURES[measure]}, before layer {layer}", xlabel="keep ratio")
            axes.set(xlim=(0, 1), ylim=(0, 1.02))
    return _save(figure, path)


def _scorer_colours(found: Sequence[Kept]) -> dict[str, str]:
    """Colours of the oracle and of the scorers that keep most on the whole; the same in all panels."""
    from lazyllm.evaluation.scorers import MEASURES, ORACLE

    def kept(name: str) -> float:
        own = [getattr(one, measure) for one in found if one.scorer == name for measure in MEASURES]
        return float(np.mean([share for share in own if share is not None] or [0.0]))

    ranked = sorted({one.scorer for one in found} - {ORACLE}, key=lambda name: (-kept(name), name))
    return {ORACLE: "0.1", **{name: f"C{index}" for index, name in enumerate(ranked[:NAMED_CURVES])}}


def _draw_recall(axes: Any, points: Sequence[Kept], measure: str, colours: Mapping[str, str]) -> None:
    for name in sorted({one.scorer for one in points}, key=lambda name: (name in colours, name)):
        own = [one for one in points if one.scorer == name]
        ratios = sorted({one.keep for one in own})
        means = [float(np.mean([getattr(one, measure) for one in own if one.keep == keep])) for keep in ratios]
        label = name if name in colours else None
        colour = colours.get(name, "0.85")
        axes.plot([*ratios, 1.0], [*means, 1.0], "o-", markersize=3, linewidth=1.4, color=colour, label=label)
    axes.plot([0, 1], [0, 1], color="0.5", linewidth=1, linestyle="--", label="at random")
    axes.legend(loc="lower right", fontsize=7)


def plot_kept(trace: TokenTrace, path: str | Path, *, marked: Sequence[tuple[int, int]] = ()) -> Path:
    """Which tokens of a prompt entered each layer of its prefill; `marked` token ranges are pointed at."""
    path, figure = _new_figure(path, (11, 3.6))
    axes = figure.subplots()
    layers = [event.rows[0] for event in trace.steps[0]]
    tokens = int(layers[0].visible.max()) + 1
    grid = np.zeros((len(layers), tokens))
    for layer, row in enumerate(layers):
        grid[layer, row.computed.numpy()] = 1
    axes.imshow(
        grid, aspect="auto", interpolation="antialiased", cmap="Blues", vmax=1.4, extent=(0, tokens, len(layers), 0)
    )
    for start, stop in marked:
        axes.axvspan(start, stop, ymin=1.0, ymax=1.06, color=BAND_COLOURS[3], clip_on=False)
    counts = [int(row.computed.numel()) for row in layers]
    axes.set(xlabel="token of the prompt (marked above: the answer's sentence)", ylabel="layer")
    axes.set_title(f"Computed: {counts[0]:,} tokens at layer 0, {counts[-1]:,} of {tokens:,} at the last", pad=14)
    axes.plot([], [], color=LAZY, linewidth=5, label="computed")
    axes.legend(loc="lower left")
    return _save(figure, path)


def plot_growth(entries: Sequence[Entry], path: str | Path) -> Path:
    """Time per prompt token, median and range, over the prompt's length; one panel per dtype."""
    dtypes = list(dict.fromkeys(entry.dtype for entry in entries))
    names = list(dict.fromkeys(entry.run for entry in entries))
    path, figure = _new_figure(path, (6.2 * len(dtypes), 4))
    for axes, dtype in zip(figure.subplots(1, len(dtypes), squeeze=False)[0], dtypes, strict=True):
        for index, name in enumerate(names):
            points = [entry for entry in entries if (entry.dtype, entry.run) == (dtype, name)]
            _draw_growth(axes, name, sorted(points, key=lambda entry: entry.prompt_tokens), f"C{index}")
        lengths = sorted({entry.prompt_tokens for entry in entries if entry.dtype == dtype})
        axes.set(title=dtype, xlabel="tokens of the prompt", ylabel="ms per prompt token", xscale="log")
        axes.set_ylim(bottom=0)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.minorticks_off()
        axes.legend(loc="best")
    return _save(figure, path)


def _draw_growth(axes: Any, name: str, points: Sequence[Entry], colour: str) -> None:
    middles, reach = _middles_and_reach([entry.milliseconds_per_prompt_token for entry in points])
    lengths = [entry.prompt_tokens for entry in points]
    axes.errorbar(
        lengths, middles, yerr=reach, fmt="o-", markersize=4, linewidth=1.4, color=colour, capsize=2, label=name
    )


def plot_reply_sizes(sizes: Sequence[ReplySize], path: str | Path) -> Path:
    """What a cache has grown by during a reply: K/V of the reply's own tokens, and of revived ones."""
    path, figure = _new_figure(path, (6.2, 4))
    axes = figure.subplots()
    tokens = [0, *(size.reply_tokens for size in sizes)]
    new, revived = ([0.0, *(getattr(size, name) / 1e6 for size in sizes)] for name in ("new_bytes", "revived_bytes"))
    axes.stackplot(tokens, new, revived, colors=(DENSE, LAZY), labels=("K/V of the reply", "K/V of revived tokens"))
    axes.set(xlabel="tokens of the reply", ylabel="MB more than after the prefill", xlim=(0, tokens[-1]))
    axes.legend(loc="upper left")
    return _save(figure, path)


def plot_checks(checks: Sequence[Check], path: str | Path) -> Path:
    """Time to the first token by prompt length, measured (median and range) and predicted; one panel per model."""
    models = list(dict.fromkeys(check.model for check in checks))
    path, figure = _new_figure(path, (6.2 * len(models), 4.4))
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        own = [check for check in checks if check.model == model]
        for index, run in enumerate(dict.fromkeys(check.run for check in own)):
            _draw_checks(axes, run, [check for check in own if check.run == run], f"C{index}")
        lengths = sorted({check.prompt_tokens for check in own})
        axes.set(title=f"{model}: points measured, lines predicted", xlabel="tokens of the prompt")
        axes.set(ylabel="TTFT in seconds", xscale="log", yscale="log")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.xaxis.minorticks_off()
        axes.legend(loc="best", fontsize=7)
    return _save(figure, path)


def _draw_checks(axes: Any, name: str, points: Sequence[Check], colour: str) -> None:
    lengths = [check.prompt_tokens for check in points]
    spreads = [check.measured_seconds for check in points]
    middles, reach = _middles_and_reach(spreads)
    axes.errorbar(lengths, middles, yerr=reach, fmt="o", markersize=4, color=colour, capsize=2, label=name)
    axes.plot(lengths, [check.predicted_seconds for check in points], color=colour, linewidth=1.2)


def plot_prediction(predictions: Mapping[str, Sequence[Prediction]], path: str | Path) -> Path:
    """Where the predicted TTFT goes, dense and pruned: a row of panels per model, a panel per prompt length."""
    columns = max(map(len, predictions.values()))
    path, figure = _new_figure(path, (1.4 + 3.2 * columns, 3.4 * len(predictions)))
    panels = figure.subplots(len(predictions), columns, squeeze=False)
    for row, (model, lengths) in zip(panels, predictions.items(), strict=True):
        for axes in row[len(lengths) :]:
            axes.remove()
        for axes, prediction in zip(row, lengths, strict=False):
            _draw_prediction(axes, prediction)
            axes.set_title(f"{model}, {prediction.tokens:,} tokens: {prediction.speedup:.1f}x", fontsize=9)
    return _save(figure, path)


def _draw_prediction(axes: Any, prediction: Prediction) -> None:
    parts = [cost.prefill for cost in (prediction.dense, prediction.pruned)]
    linear, attention = ([getattr(part, name) for part in parts] for name in ("linear", "attention"))
    rest = [part.total - part.linear - part.attention for part in parts]
    bottom = np.zeros(len(parts))
    for name, heights, colour in (
        ("linear layers", linear, LAZY),
        ("attention", attention, BAND_COLOURS[2]),
        ("rest", rest, DENSE),
    ):
        axes.bar(("dense", "pruned"), heights, 0.6, bottom=bottom, color=colour, label=name)
        bottom += heights
    axes.set_ylabel("TTFT in seconds")
    axes.legend(loc="upper right", fontsize=7)


def _draw_prefill(axes: Any, stats: GenerationStats) -> None:
    layers = range(stats.layers)
    computed = [sum(step[layer].computed for step in stats.tokens_per_layer[: stats.prefill_steps]) for layer in layers]
    axes.bar(layers, [stats.prompt_tokens] * stats.layers, color=DENSE, width=0.86, label="left out")
    axes.bar(layers, computed, color=LAZY, width=0.86, label="computed")
    axes.set(
        title=f"Prefill of {stats.prompt_tokens:,} tokens: {stats.prefill_computed_fraction:.0%} computed",
        xlabel="layer",
        ylabel="tokens",
        xlim=(-0.6, stats.layers - 0.4),
        ylim=(0, stats.prompt_tokens * 1.17),
    )
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend(loc="upper right", ncols=2)


def _draw_shares(axes: Any, stats: GenerationStats) -> None:
    bands = min(BANDS, stats.layers)
    for band, colour in zip(range(bands), BAND_COLOURS, strict=False):
        start, stop = band * stats.layers // bands, (band + 1) * stats.layers // bands
        shares = _shares_computed(stats, start, stop)
        name = f"layers {start}-{stop - 1}" if stop - start > 1 else f"layer {start}"
        axes.plot(range(len(shares)), shares, color=colour, marker="o", markersize=3.5, linewidth=1.8, label=name)
    axes.set(title="Context computed so far, decode included", xlabel="step (0 = prefill)", ylabel="%", ylim=(0, 104))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="lower left", ncols=2)


def _shares_computed(stats: GenerationStats, start: int, stop: int) -> list[float]:
    """Percent of the context seen so far that layers `start` to `stop` have computed, after each step."""
    shares, computed, context = [], 0, stats.prompt_tokens
    for index, step in enumerate(stats.tokens_per_layer):
        computed += sum(layer.computed for layer in step[start:stop])
        context += index >= stats.prefill_steps
        shares.append(100 * computed / (context * (stop - start)))
    return shares


def _draw_ttft(axes: Any, report: BenchReport) -> None:
    names, lengths = _names_and_lengths(report)
    for at, height, length, lines in _bars(report, names, lengths):
        middles, reach = _middles_and_reach([line.ttft_seconds for line in lines])
        colour = BAND_COLOURS[lengths.index(length) % len(BAND_COLOURS)]
        axes.barh(at, middles, height, color=colour, label=f"{length:,} tokens")
        axes.errorbar(middles, at, xerr=reach, fmt="none", ecolor="0.25", elinewidth=1, capsize=2)
    axes.set(
        title=f"{report.model}, {report.dtype}: median and range of {report.rounds} rounds", xlabel="TTFT in seconds"
    )
    _name_rows(axes, names)


def _draw_speedups(axes: Any, report: BenchReport) -> None:
    names, lengths = _names_and_lengths(report)
    for at, height, length, lines in _bars(report, names, lengths):
        colour = BAND_COLOURS[lengths.index(length) % len(BAND_COLOURS)]
        axes.barh(at, [line.ttft_speedup for line in lines], height, color=colour, label=f"{length:,} tokens")
        predicted = [line.predicted_ttft_speedup for line in lines]
        label = "predicted from operations" if length == lengths[-1] else None
        axes.plot(predicted, at, linestyle="none", marker="D", markersize=5, color="white", mec="0.1", label=label)
    axes.axvline(1, color="0.5", linewidth=1, linestyle="--")
    axes.set(title="Against the faster unmodified run", xlabel="TTFT speedup")
    _name_rows(axes, names)


def _names_and_lengths(report: BenchReport) -> tuple[list[str], list[int]]:
    names = list(dict.fromkeys(line.contender for line in report.measurements))
    return names, list(dict.fromkeys(line.prompt_tokens for line in report.measurements))


def _bars(
    report: BenchReport, names: Sequence[str], lengths: Sequence[int]
) -> list[tuple[list[float], float, int, list[Any]]]:
    """Per prompt length: positions of its bars, their height, the length, and its measurements."""
    height = 0.8 / len(lengths)
    return [
        (
            [row + (index - (len(lengths) - 1) / 2) * height for row in range(len(names))],
            height,
            length,
            [line for line in report.measurements if line.prompt_tokens == length],
        )
        for index, length in enumerate(lengths)
    ]


def _name_rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.legend(loc="best")


def _middles_and_reach(spreads: Sequence[Spread], *, factor: float = 1.0) -> tuple[list[float], list[list[float]]]:
    """Medians, and how far the range lies below and above them."""
    return [factor * spread.median for spread in spreads], [
        [factor * (spread.median - spread.minimum) for spread in spreads],
        [factor * (spread.maximum - spread.median) for spread in spreads],
    ]


def new_figure(size: tuple[float, float]) -> Any:
    """An empty figure of so many inches.

    Raises:
        MissingExtra: without matplotlib.
    """
    return needed("matplotlib.figure", what="a figure", extra="plots").Figure(figsize=size, layout="constrained")


def tidied(figure: Any) -> Any:
    """The figure without boxes around panels and legends."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        if axes.legend_ is not None:
            axes.legend_.set_frame_on(False)
    return figure


def reach_of(effects: Sequence[Effect]) -> list[list[float]]:
    """How far intervals lie below and above their estimates."""
    return [
        [effect.estimate - effect.low for effect in effects],
        [effect.high - effect.estimate for effect in effects],
    ]


def _new_figure(path: str | Path, size: tuple[float, float]) -> tuple[Path, Any]:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path, new_figure(size)


def _save(figure: Any, path: Path) -> Path:
    tidied(figure).savefig(path, dpi=DPI)
    return path
