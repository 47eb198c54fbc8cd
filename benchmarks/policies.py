"""What pruning gains and costs on real tasks: methods beside the unmodified model, item by item.

    python benchmarks/policies.py --items 50 --tokens 3072 --presets recommended,paper,static-pruning
    python benchmarks/policies.py --items 20 --presets "" --curves late-interaction,paper,static-pruning,random-drop

Without --model it runs the packaged SmolLM2-135M-Instruct. Tasks are made from packaged data. Every result is written
to out/policies.jsonl as it comes, and a second call goes on where the first one stopped; the table goes to
out/policies.json and the curve of the answer's loss over the speedup to out/policies.png.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lazyllm import LazyConfig, LazyPipeline, preset_names
from lazyllm.errors import InputError, LazyLLMError
from lazyllm.evaluation.compare import STOCK, Journal, Line, compare, groups, run
from lazyllm.evaluation.curves import CURVES, curve_points
from lazyllm.evaluation.data import packaged_model, quiet_loading
from lazyllm.evaluation.options import names_in
from lazyllm.evaluation.plots import plot_quality
from lazyllm.evaluation.quality import Contender
from lazyllm.evaluation.statistics import Effect
from lazyllm.evaluation.tasks import Layout, Maker, make_items
from lazyllm.models.loading import dtype_named, load_model

TASKS = "needle,squad,hotpot,labels,code"
PRESETS = "recommended,recommended-fast,static-pruning"
LAYOUTS = {"last": "question last", "first": "question first", "middle": "question in the middle"}

COLUMNS = (
    "TTFT speedup",
    "decode speedup",
    "computed",
    "memory",
    "evidence",
    "right",
    "won / lost",
    "p",
    "loss",
    "change of loss",
    "agreement",
)

console = Console(width=None if Console().is_terminal else 160)


def main(
    tasks: Annotated[str, typer.Option(help="Names of tasks.")] = TASKS,
    presets: Annotated[str, typer.Option(help="Names of presets, or paths of configuration files; all.")] = PRESETS,
    items: Annotated[int, typer.Option(min=1, help="Items of every task.")] = 50,
    tokens: Annotated[int, typer.Option(min=300, help="Length of the prompts.")] = 3072,
    curves: Annotated[str, typer.Option(help="Methods to run from gentle to strong: " + ", ".join(CURVES))] = "",
    question: Annotated[str, typer.Option(help="Where it stands: last, first or middle.")] = "last",
    model: Annotated[str, typer.Option(help="Hub id, folder or GGUF file; the packaged SmolLM2 without it.")] = "",
    dtype: Annotated[str, typer.Option(help="Dtype of the weights.")] = "float32",
    device: Annotated[str, typer.Option(help="Device of the model.")] = "cuda" if torch.cuda.is_available() else "cpu",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("out"),
    seed: Annotated[int, typer.Option(help="Seed of the items.")] = 0,
) -> None:
    try:
        if question not in LAYOUTS:
            raise InputError(f"--question is one of {', '.join(LAYOUTS)}, not {question!r}")
        source = model or str(packaged_model())
        with console.status(f"loading {Path(source).name}"), quiet_loading():
            network, tokenizer = load_model(source, dtype=dtype_named(dtype))
            network = network.to(device)
        layout = cast(Layout, LAYOUTS[question])
        maker = Maker(tokenizer, tokens, layout)
        sets = {name: make_items(name, maker, items, seed=seed) for name in names_in(tasks)}
        field = contenders(network, tokenizer, {**named(presets), **swept(curves)})
        prefix = f"{Path(source).name}/{dtype}/{tokens}/{question}/{seed}"
        with progress() as bar:
            task = bar.add_task("", total=sum(map(len, sets.values())))
            verdicts = run(
                field,
                sets,
                Journal(out / "policies.jsonl"),
                prefix=prefix,
                on_item=lambda name, index: bar.update(task, advance=1, description=f"{name} {index + 1}"),
            )
        lines = compare(verdicts)
        console.print(table(lines, f"{prefix}: {items} items per task, {torch.get_num_threads()} threads"))
        (out / "policies.md").write_text(markdown(lines), encoding="utf-8")
        (out / "policies.json").write_text(json.dumps([line.to_dict() for line in lines], indent=2))
        console.print("written:", out / "policies.json", "and", plot_quality(lines, out / "policies.png"))
    except LazyLLMError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from None


def named(presets: str) -> dict[str, LazyConfig]:
    """Configurations of presets and files, by name; "all" is every shipped preset but the unmodified model's."""
    names = [name for name in preset_names() if name != "dense"] if presets == "all" else presets.split(",")
    return {Path(name).stem: LazyConfig.preset(name) for name in names if name}


def swept(curves: str) -> dict[str, LazyConfig]:
    """Configurations of every point of every curve, by name."""
    return {name: config for curve in curves.split(",") if curve for name, config in curve_points(curve).items()}


def contenders(model: Any, tokenizer: Any, configs: Mapping[str, LazyConfig]) -> list[Contender]:
    """The unmodified model and one pipeline per configuration."""
    stock = Contender(LazyPipeline.from_preset("dense", model, tokenizer), STOCK, is_stock=True)
    return [
        stock,
        *(Contender(LazyPipeline.from_config(config, model, tokenizer), name) for name, config in configs.items()),
    ]


def progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def table(lines: Sequence[Line], title: str) -> Table:
    view = Table(title=title)
    for column in ("task", "run"):
        view.add_column(column)
    for column in COLUMNS:
        view.add_column(column, justify="right")
    for task, group in groups(lines):
        view.add_section()
        for line in group:
            view.add_row(task, *_cells(line), style="bold" if line.contender == STOCK else None)
    view.caption = (
        "speedups: medians of paired ratios; computed: layer-tokens of the prefill; memory: K/V and waiting states at "
        "the end, of the unmodified model's; evidence: its share with K/V at the last layer; change of loss: per token "
        "of the right answer, paired; 95 % intervals"
    )
    return view


def _cells(line: Line) -> list[str]:
    return [
        line.contender,
        _interval(line.speedup, "{:.1f}", "x"),
        "-" if line.decode_speedup is None else f"{line.decode_speedup.estimate:.2f}x",
        f"{line.computed_fraction:.0%}",
        "-" if line.memory is None else f"{line.memory:.0%}",
        "-" if line.recall is None else f"{line.recall:.2f}",
        "-" if line.score is None else f"{line.score:.2f}",
        f"+{line.won} -{line.lost}",
        "-" if line.p_value is None else f"{line.p_value:.2f}",
        f"{line.loss:.2f}",
        _interval(line.loss_change, "{:+.2f}"),
        f"{line.agreement:.2f}",
    ]


def markdown(lines: Sequence[Line]) -> str:
    """The table in Markdown."""
    head = ["task", "run", *COLUMNS]
    rows = [[task, *_cells(line)] for task, group in groups(lines) for line in group]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]) + "\n"


def _interval(effect: Effect, form: str, unit: str = "") -> str:
    return f"{form.format(effect.estimate)}{unit} ({form.format(effect.low)} to {form.format(effect.high)})"


if __name__ == "__main__":
    typer.run(main)
