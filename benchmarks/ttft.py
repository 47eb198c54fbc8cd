"""Time to first token and per output token: presets beside the unmodified model, by prompt length and dtype.

    python benchmarks/ttft.py --lengths 1024,4096 --dtypes float32,bfloat16 --rounds 7 --new-tokens 16

Without --model it measures the packaged SmolLM2-135M-Instruct; prompts are the beginning of State of the Union
addresses. Writes out/ttft.json and out/ttft.png.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lazyllm.errors import LazyLLMError
from lazyllm.evaluation.bench import BenchReport, Measurement, default_presets, measure, save_reports
from lazyllm.evaluation.data import packaged_model, packaged_text, quiet_loading
from lazyllm.evaluation.options import names_in, numbers_in
from lazyllm.evaluation.plots import plot_bench
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
    model: Annotated[str, typer.Option(help="Hub id, folder or GGUF file; the packaged SmolLM2 without it.")] = "",
    device: Annotated[str, typer.Option(help="Device of the model.")] = "cuda" if torch.cuda.is_available() else "cpu",
    out: Annotated[Path, typer.Option(help="Folder for JSON and PNG.")] = Path("out"),
    seed: Annotated[int, typer.Option(help="Seed of the order within a round.")] = 0,
) -> None:
    try:
        run(numbers_in(lengths), names_in(dtypes), names_in(presets), rounds, new_tokens, model, device, out, seed)
    except LazyLLMError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from None


def run(
    lengths: Sequence[int],
    dtypes: Sequence[str],
    presets: Sequence[str],
    rounds: int,
    new_tokens: int,
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
                on_round=_advance(progress, task),
            )
        reports.append(report)
        console.print(table(report))
        written = save_reports(reports, out / "ttft.json"), plot_bench(reports, out / "ttft.png")
    console.print("written:", *written)


def table(report: BenchReport) -> Table:
    """Medians with the range over the rounds."""
    view = Table(
        title=f"{report.model}, {report.dtype}, {report.environment['threads']} threads, "
        f"median (min - max) of {report.rounds} rounds"
    )
    for column, justify in (("prompt", "right"), ("run", "left")):
        view.add_column(column, justify=justify)  # type: ignore[arg-type]
    for column in ("TTFT s", "speedup", "predicted", "realised / predicted", "ms / token", "speedup", "computed"):
        view.add_column(column, justify="right")
    previous = None
    for line in report.measurements:
        if previous not in (None, line.prompt_tokens):
            view.add_section()
        previous = line.prompt_tokens
        view.add_row(*_cells(line), style="bold" if line.is_baseline else None)
    view.caption = "speedups over the faster unmodified run (bold); predicted: from operations counted"
    return view


def _cells(line: Measurement) -> list[str]:
    return [
        f"{line.prompt_tokens:,}",
        line.contender,
        line.ttft_seconds.show(2),
        f"{line.ttft_speedup:.2f}x",
        f"{line.predicted_ttft_speedup:.2f}x",
        f"{line.realised_over_predicted:.2f}",
        line.seconds_per_output_token.show(0, factor=1000) if line.seconds_per_output_token else "-",
        f"{line.decode_speedup:.2f}x" if line.decode_speedup else "-",
        f"{line.computed_fraction:.0%}",
    ]


def _advance(progress: Progress, task: Any) -> Callable[[int, int], None]:
    def advance(length: int, number: int) -> None:
        progress.update(task, advance=1, description=f"{length:,} tokens, round {number}")

    return advance


if __name__ == "__main__":
    typer.run(main)
