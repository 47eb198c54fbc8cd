"""What pruning gains and costs on real tasks: methods beside the unmodified model, item by item.

    python benchmarks/policies.py --items 50 --tokens 3072 --presets recommended,paper,static-pruning
    python benchmarks/policies.py --items 20 --presets "" --curves late-interaction,paper,static-pruning,random-drop

Without --model it runs the packaged SmolLM2-135M-Instruct. Tasks are made from packaged data. It is a study (see
docs/ablation.md) with a cell for each method: every result is written to out/policies/ as it comes, and a second call
goes on where the first one stopped. The table goes to out/policies.md and out/policies.json, the curve of the answer's
loss over the speedup to out/policies.png.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from lazyllm import preset_names
from lazyllm.ablation import Study
from lazyllm.ablation.progress import ProgressLine
from lazyllm.ablation.tables import markdown_of, table
from lazyllm.errors import LazyLLMError
from lazyllm.evaluation.curves import CURVES, curve_points
from lazyllm.evaluation.options import names_in
from lazyllm.evaluation.plots import plot_quality

TASKS = "needle,squad,hotpot,labels,code"
PRESETS = "recommended,recommended-fast,static-pruning"

console = Console(width=None if Console().is_terminal else 200)


def main(
    tasks: Annotated[str, typer.Option(help="Names of tasks.")] = TASKS,
    presets: Annotated[str, typer.Option(help="Names of presets, or paths of configuration files; all.")] = PRESETS,
    items: Annotated[int, typer.Option(min=1, help="Items of every task.")] = 50,
    tokens: Annotated[int, typer.Option(min=300, help="Length of the prompts.")] = 3072,
    curves: Annotated[str, typer.Option(help="Methods to run from gentle to strong: " + ", ".join(CURVES))] = "",
    question: Annotated[str, typer.Option(help="Where it stands: last, first or middle.")] = "last",
    model: Annotated[
        str, typer.Option(help="Hub id, folder or GGUF file; the packaged SmolLM2 without it.")
    ] = "packaged",
    dtype: Annotated[str, typer.Option(help="Dtype of the weights.")] = "float32",
    device: Annotated[str, typer.Option(help="Device of the model.")] = "cuda" if torch.cuda.is_available() else "cpu",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("out"),
    seed: Annotated[int, typer.Option(help="Seed of the items.")] = 0,
) -> None:
    try:
        study = Study(
            name="policies", model=model, dtype=dtype, device=device, tasks=dict.fromkeys(names_in(tasks), items),
            tokens=tokens, question=question, seed=seed, cells=[*named(presets), *swept(curves)],
        )  # fmt: skip
        with ProgressLine(console) as progress:
            results = study.run(out / study.name, callbacks=[progress])
        lines = results.lines()
        console.print(table(lines, f"{study.setting}; {torch.get_num_threads()} threads"))
        for told in [*results.notices, *(f"{count} units failed: {reason}" for reason, count in results.failures())]:
            console.print(told)
        (out / "policies.md").write_text(markdown_of(lines), encoding="utf-8")
        (out / "policies.json").write_text(json.dumps([line.to_dict() for line in lines], indent=2))
        console.print("written:", out / "policies.json", "and", plot_quality(lines, out / "policies.png"))
    except LazyLLMError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from None


def named(presets: str) -> Iterator[dict[str, Any]]:
    """A cell for each preset or file; "all" is every shipped preset but the unmodified model's."""
    names = [name for name in preset_names() if name != "dense"] if presets == "all" else presets.split(",")
    yield from ({"name": Path(name).stem, "preset": name} for name in names if name)


def swept(curves: str) -> Iterator[dict[str, Any]]:
    """A cell for every point of every curve."""
    for curve in filter(None, curves.split(",")):
        yield from ({"name": name, "config": config} for name, config in curve_points(curve).items())


if __name__ == "__main__":
    typer.run(main)
