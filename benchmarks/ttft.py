"""Time to first token and per output token: presets beside the unmodified model, by prompt length and dtype.

    python benchmarks/ttft.py --lengths 1024,4096 --dtypes float32,bfloat16 --rounds 7 --new-tokens 16
    python benchmarks/ttft.py --quick

Without --model it measures the packaged SmolLM2-135M-Instruct; prompts are the beginning of State of the Union
addresses. Writes out/ttft.json, out/ttft.md and out/ttft.png, anew after every dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lazyllm.errors import LazyLLMError
from lazyllm.evaluation.bench import default_presets, measure, save_reports, section
from lazyllm.evaluation.data import packaged_model, packaged_text, quiet_loading
from lazyllm.evaluation.options import names_in, numbers_in
from lazyllm.evaluation.plots import plot_bench
from lazyllm.evaluation.sections import command_line, save_page
from lazyllm.models.loading import dtype_named, load_model

console = Console(width=None if Console().is_terminal else 160)


def main(
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "1024,4096",
    dtypes: Annotated[str, typer.Option(help="Dtypes of the weights.")] = "float32",
    presets: Annotated[str, typer.Option(help="Presets; 'NAME prefill-only' selects in prefill alone.")] = ",".join(
        default_presets()
    ),
    rounds: Annotated[int, typer.Option(min=1, help="Runs of everything, after one to warm up.")] = 5,
    new_tokens: Annotated[int, typer.Option(min=1, help="Length of the replies.")] = 16,
    quick: Annotated[bool, typer.Option("--quick", help="256 and 512 tokens, one round, 4 new tokens.")] = False,
    model: Annotated[str, typer.Option(help="Hub id, folder or GGUF file; the packaged SmolLM2 without it.")] = "",
    device: Annotated[str, typer.Option(help="Device of the model.")] = "cuda" if torch.cuda.is_available() else "cpu",
    out: Annotated[Path, typer.Option(help="Folder for JSON, Markdown and PNG.")] = Path("out"),
    seed: Annotated[int, typer.Option(help="Seed of the order within a round.")] = 0,
) -> None:
    try:
        sizes = ([256, 512], 1, 4) if quick else (numbers_in(lengths), rounds, new_tokens)
        run(*sizes, names_in(dtypes), names_in(presets), model, device, out, seed)
    except LazyLLMError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from None


def run(
    lengths: Sequence[int],
    rounds: int,
    new_tokens: int,
    dtypes: Sequence[str],
    presets: Sequence[str],
    model: str,
    device: str,
    out: Path,
    seed: int,
) -> None:
    kinds = [dtype_named(dtype) for dtype in dtypes]
    source = model or str(packaged_model())
    reports = []
    for dtype, kind in zip(dtypes, kinds, strict=True):
        with console.status(f"loading {Path(source).name} in {dtype}"), quiet_loading():
            network, tokenizer = load_model(source, dtype=kind)
            network = network.to(device)
        text = packaged_text(tokenizer, max(lengths))
        with Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        ) as progress:
            task = progress.add_task(f"{dtype}", total=len(lengths) * (rounds + 1))
            report = measure(
                network,
                text,
                lengths=lengths,
                presets=presets,
                rounds=rounds,
                new_tokens=new_tokens,
                seed=seed,
                model_name=Path(source).name,
                command=command_line(),
                on_round=_advance(progress, task),
            )
        reports.append(report)
        console.print(Markdown(section(report).markdown()))
        page = save_page([section(report) for report in reports], out / "ttft.md")
        written = save_reports(reports, out / "ttft.json"), page, plot_bench(reports, out / "ttft.png")
    console.print("written:", *written)


def _advance(progress: Progress, task: Any) -> Callable[[int, int], None]:
    def advance(length: int, number: int) -> None:
        progress.update(task, advance=1, description=f"{length:,} tokens, round {number}")

    return advance


if __name__ == "__main__":
    typer.run(main)
