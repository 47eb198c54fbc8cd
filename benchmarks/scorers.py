"""How much of the evidence every scorer keeps, apart from any answer, with an oracle beside them.

    python benchmarks/scorers.py --tasks needle,squad,hotpot --items 8 --tokens 3072 --layers 1,3,9

The tables say what share of the tokens of the answering sentences each scorer would keep, and what share of the tokens
that the oracle would keep, were the prompt cut before a layer to a few shares of its length. Nothing is generated:
every scorer makes one pass over an item, up to the deepest layer. The oracle knows the answer and reads its attention,
dense. Without --model it runs the packaged SmolLM2-135M-Instruct. The tables go to out/scorers.md, the numbers to
out/scorers.json, task by task, and the curves over the keep ratio to out/scorers.png.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lazyllm import SCORERS
from lazyllm.errors import InputError, LazyLLMError
from lazyllm.evaluation.bench import environment
from lazyllm.evaluation.data import packaged_model, quiet_loading
from lazyllm.evaluation.options import names_in
from lazyllm.evaluation.plots import plot_recall
from lazyllm.evaluation.scorers import Kept, every_scorer, judge_scorers, scorer_sections
from lazyllm.evaluation.sections import command_line, conditions, save_page
from lazyllm.evaluation.tasks import Maker, make_items
from lazyllm.models.loading import dtype_named, load_model

console = Console()


def main(
    tasks: Annotated[str, typer.Option(help="Names of tasks whose items name evidence.")] = "needle,squad,hotpot",
    items: Annotated[int, typer.Option(min=1, help="Items of every task.")] = 4,
    tokens: Annotated[int, typer.Option(min=300, help="Length of the prompts.")] = 1536,
    layers: Annotated[str, typer.Option(help="Layers to prune before.")] = "0,3",
    keeps: Annotated[str, typer.Option(help="Keep ratios.")] = "0.1,0.2,0.3,0.5",
    scorers: Annotated[str, typer.Option(help="Names of scorers to judge; all without it.")] = "",
    model: Annotated[str, typer.Option(help="Hub id, folder or GGUF file; the packaged SmolLM2 without it.")] = "",
    dtype: Annotated[str, typer.Option(help="Dtype of the weights.")] = "float32",
    device: Annotated[str, typer.Option(help="Device of the model.")] = "cuda" if torch.cuda.is_available() else "cpu",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("out"),
    seed: Annotated[int, typer.Option(help="Seed of the items.")] = 0,
) -> None:
    try:
        numbers, ratios = layers_in(layers), ratios_in(keeps)
        names = scorers_in(scorers)
        chosen = {name: built for name, built in every_scorer("-").items() if name in names}
        source = model or str(packaged_model())
        with console.status(f"loading {Path(source).name}"), quiet_loading():
            network, tokenizer = load_model(source, dtype=dtype_named(dtype))
            network = network.to(device)
        maker = Maker(tokenizer, tokens)
        sets = {name: make_items(name, maker, items, seed=seed) for name in names_in(tasks)}
        said = conditions(
            Path(source).stem,
            dtype,
            environment(network),
            {},
            tokens=f"prompts of {tokens:,} tokens",
            baseline="the oracle, which knows the answer",
            measured=f"mean over {items} items per task",
            command=command_line(),
        )
        found: list[Kept] = []
        with progress() as bar:
            task = bar.add_task("", total=sum(map(len, sets.values())))
            for kept in judge_scorers(
                network,
                tokenizer,
                sets,
                layers=numbers,
                keeps=ratios,
                scorers=chosen or None,
                on_item=lambda name, index: bar.update(task, advance=1, description=f"{name} {index + 1}"),
            ):
                found.append(kept)
                save(found, said, out)
        console.print(Markdown((out / "scorers.md").read_text(encoding="utf-8")))
        console.print(
            "written:", out / "scorers.md,", out / "scorers.json", "and", plot_recall(found, out / "scorers.png")
        )
    except LazyLLMError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from None


def layers_in(text: str) -> list[int]:
    """The layer numbers between commas.

    Raises:
        InputError: when something else stands there.
    """
    names = names_in(text)
    if wrong := [name for name in names if not name.isdecimal()]:
        raise InputError(f"a layer is a whole number, 0 for before the first one, not {wrong[0]!r}")
    return sorted({int(name) for name in names})


def ratios_in(text: str) -> list[float]:
    """The keep ratios between commas.

    Raises:
        InputError: when something else stands there.
    """
    names = names_in(text)
    if wrong := [name for name in names if not re.fullmatch(r"0?\.\d*[1-9]\d*|1(\.0*)?", name)]:
        raise InputError(f"a keep ratio is a number above 0 and up to 1, not {wrong[0]!r}")
    return sorted({float(name) for name in names})


def scorers_in(text: str) -> list[str]:
    """The scorers between commas; none for an empty text.

    Raises:
        InputError: when one is unknown.
    """
    return names_in(text, known=SCORERS) if text else []


def save(found: list[Kept], said: str, out: Path) -> None:
    """Writes what is known so far."""
    save_page(scorer_sections(found, said), out / "scorers.md")
    (out / "scorers.json").write_text(json.dumps([asdict(kept) for kept in found], indent=2), encoding="utf-8")


def progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


if __name__ == "__main__":
    typer.run(main)
