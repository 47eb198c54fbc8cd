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

from lazyllm.errors import InputError, LazyLLMError
from lazyllm.evaluation.bench import BenchReport, Measurement, default_presets, measure, save_reports
from lazyllm.evaluation.data import packaged_model, packaged_speech, packaged_speech_names, quiet_loading
from lazyllm.evaluation.engines import spread_text
from lazyllm.evaluation.plots import plot_bench
from lazyllm.models.loading import dtype_named, load_model

FIRST_SPEECH = "1985-Reagan-1"

console = Console(width=None if Console().is_terminal else 160)


def main(
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "1024,4096",
    dtypes: Annotated[str, typer.Option(help="Dtypes of the weights.")] = "float32",
    presets: Annotated[str, typer.Option(help="Presets; 'NAME prefill-only' selects in prefill alone.")] = ",".join(
        default_presets()
    ),
    rounds: Annotated[int, typer.Option(min=1, help="Runs of every contender, after one to warm up.")] = 5,
    new_tokens: Annotated[int, typer.Option(min=1, help="Length of the replies.")] = 16,
    model: Annotated[str, typer.Option(help="Hub id, folder or GGUF file; the packaged SmolLM2 without it.")] = "",
    device: Annotated[str, typer.Option(help="Device of the model.")] = "cuda" if torch.cuda.is_available() else "cpu",
    out: Annotated[Path, typer.Option(help="Folder for JSON and PNG.")] = Path("out"),
    seed: Annotated[int, typer.Option(help="Seed of the order within a round.")] = 0,
) -> None:
    try:
        run(numbers(lengths), names(dtypes), names(presets), rounds, new_tokens, model, device, out, seed)
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
        text = long_text(tokenizer, max(lengths))
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


def long_text(tokenizer: Any, tokens: int) -> list[int]:
    """Token ids of addresses one after the other, until there are enough."""
    speeches = packaged_speech_names()
    first = speeches.index(FIRST_SPEECH)
    ids: list[int] = []
    for name in [*speeches[first:], *speeches[:first]]:
        ids += tokenizer(packaged_speech(name) + "\n\n", add_special_tokens=not ids, verbose=False)["input_ids"]
        if len(ids) >= tokens:
            break
    return ids[:tokens]


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
        spread_text(line.ttft_seconds, 1, 2),
        f"{line.ttft_speedup:.2f}x",
        f"{line.predicted_ttft_speedup:.2f}x",
        f"{line.realised_over_predicted:.2f}",
        spread_text(line.seconds_per_output_token, 1000, 0) if line.seconds_per_output_token else "-",
        f"{line.decode_speedup:.2f}x" if line.decode_speedup else "-",
        f"{line.computed_fraction:.0%}",
    ]


def _advance(progress: Progress, task: Any) -> Callable[[int, int], None]:
    def advance(length: int, number: int) -> None:
        progress.update(task, advance=1, description=f"{length:,} tokens, round {number}")

    return advance


def names(text: str) -> list[str]:
    """The parts of an option that takes a list."""
    parts = [name.strip() for name in text.split(",") if name.strip()]
    if not parts:
        raise InputError("an option that takes a list got an empty one")
    return parts


def numbers(text: str) -> list[int]:
    """The prompt lengths of an option."""
    parts = names(text)
    if wrong := [part for part in parts if not part.isdigit() or int(part) == 0]:
        raise InputError(f"a prompt length is a positive whole number, not {wrong[0]!r}")
    return [int(part) for part in parts]


if __name__ == "__main__":
    typer.run(main)
