"""The commands of studies: ablate, eval, and study status, table and export."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from lazyllm.ablation.store import STUDY
from lazyllm.ablation.study import Study
from lazyllm.cli.console import device_named, errors_as_lines
from lazyllm.errors import InputError
from lazyllm.evaluation.data import PACKAGED
from lazyllm.evaluation.options import names_in
from lazyllm.extras import needed

if TYPE_CHECKING:
    from lazyllm.ablation.engine import StudyCallback
    from lazyllm.ablation.results import Results
    from lazyllm.evaluation.statistics import Comparison

app = typer.Typer(help="Reads the results of a study.", no_args_is_help=True)

OutOption = Annotated[Path | None, typer.Option(help="Folder of the results; out/NAME without it.")]
WorkersOption = Annotated[int, typer.Option(min=1, help="Processes that share the work.")]
RayOption = Annotated[str | None, typer.Option(help="Address of a Ray cluster, 'local' for one of this machine.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be run and what it costs.")]
RetryOption = Annotated[bool, typer.Option("--retry", help="Run again what failed before.")]
RetimeOption = Annotated[
    bool,
    typer.Option(
        "--retime", help="Run the unmodified model again beside new cells, and with it what ran apart from it."
    ),
]
OnOption = Annotated[str, typer.Option(help="The device of --dry-run, as in predict.")]
TrackOption = Annotated[list[str] | None, typer.Option(help="mlflow:URI or tensorboard:FOLDER.")]
FolderArgument = Annotated[Path, typer.Argument(help="Folder of the results.")]


COMPARE_CAPTION = (
    "paired by item, 95 % intervals; p: exact, two-sided; shows from: the smallest true difference that so many items "
    "find in 80 % of samples; worse?: by the end of the interval, against the margin"
)


@errors_as_lines()
def ablate(
    study: Annotated[Path, typer.Argument(help="The study, a YAML or JSON file.")],
    out: OutOption = None,
    workers: WorkersOption = 1,
    ray: RayOption = None,
    dry_run: DryRunOption = False,
    retry: RetryOption = False,
    retime: RetimeOption = False,
    device: OnOption = "h100-sxm",
    track: TrackOption = None,
) -> None:
    """Runs a study, or goes on with it where it stopped."""
    loaded = Study.load(study)
    if dry_run:
        _preview(loaded, out, retry, retime, device)
    else:
        _run(loaded, out, workers, ray, retry, retime, track or [])


@errors_as_lines()
def evaluate(
    preset: Annotated[str, typer.Option(help="Presets, or paths of configurations.")] = "recommended",
    tasks: Annotated[str, typer.Option(help="Names of tasks; lm-eval:NAME for those of lm-eval.")] = "needle,squad",
    items: Annotated[int, typer.Option(min=1, help="Items of every task.")] = 24,
    tokens: Annotated[int, typer.Option(help="Length of the prompts.")] = 2048,
    question: Annotated[
        str, typer.Option(help="Where it stands: last, first, middle, or later: asked once the rest is loaded.")
    ] = "last",
    model: Annotated[str, typer.Option(help="Hub id, folder or .gguf file, or the packaged SmolLM2.")] = PACKAGED,
    dtype: Annotated[str, typer.Option(help="Dtype of the weights.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of the items.")] = 0,
    name: Annotated[str, typer.Option(help="What the study is called.")] = "eval",
    out: OutOption = None,
    workers: WorkersOption = 1,
    ray: RayOption = None,
    dry_run: DryRunOption = False,
    retry: RetryOption = False,
    retime: RetimeOption = False,
    device: OnOption = "h100-sxm",
) -> None:
    """Judges configurations beside the unmodified model: a study with a cell for each, then tasks of lm-eval."""
    own, foreign = _split(names_in(tasks))
    presets = _by_name(names_in(preset), ["dense"] if foreign else [])
    cells = [{"preset": one, "name": label} for label, one in presets.items()]
    study = Study(
        name=name, model=model, dtype=dtype, tasks=dict.fromkeys(own or ["needle"], items), tokens=tokens,
        question=question, seed=seed, cells=cells,
    )  # fmt: skip
    if own and dry_run:
        _preview(study, out, retry, retime, device)
    elif own:
        _run(study, out, workers, ray, retry, retime, [])
    if foreign and dry_run:
        typer.echo(f"what tasks of lm-eval cost is not known before they run: {', '.join(foreign)}", err=True)
    elif foreign:
        _run_lm_eval(study, presets, foreign, items, out)


LM_EVAL = "lm-eval:"
"""How names of tasks begin that are lm-eval's."""


def _split(names: list[str]) -> tuple[list[str], list[str]]:
    """Tasks of this project, and those of lm-eval without their prefix."""
    foreign = [name.removeprefix(LM_EVAL) for name in names if name.startswith(LM_EVAL)]
    return [name for name in names if not name.startswith(LM_EVAL)], foreign


def _by_name(presets: list[str], taken: list[str]) -> dict[str, str]:
    """Presets by what their cells are called; files without folder and ending. Presets in `taken` keep their names.

    Raises:
        InputError: when two would be called the same.
    """
    named: dict[str, str] = {name: name for name in taken}
    for preset in presets:
        name = Path(preset).stem
        if named.setdefault(name, preset) != preset:
            raise InputError(f"two configurations are called {name!r}, {named[name]!r} and {preset!r}; rename a file")
    return {Path(preset).stem: preset for preset in presets}


def _run_lm_eval(study: Study, presets: dict[str, str], tasks: list[str], items: int, out: Path | None) -> None:
    """Runs lm-eval's tasks under the unmodified model and each preset, and compares them item by item."""
    needed("lm_eval", what="a task of lm-eval", extra="lm-eval")
    from lazyllm.ablation.engine import folder_of
    from lazyllm.ablation.lm_eval_tasks import family, judged
    from lazyllm.config import LazyConfig

    configs = {"dense": LazyConfig.preset("dense")} | {label: LazyConfig.preset(one) for label, one in presets.items()}
    path = folder_of(study, out) / "lm-eval.json"
    with Console(stderr=True).status("lm-eval") as status:
        results = judged(study, configs, tasks, items, path, lambda told: status.update(told))
    _show_comparisons(family(results), "metrics of lm-eval against the unmodified model")
    typer.echo(f"written: {path}")


@errors_as_lines()
def report(
    folder: FolderArgument,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The HTML file; FOLDER.html.")] = None,
    prompts: Annotated[bool, typer.Option("--prompts/--no-prompts", help="Whether prompts go into the page.")] = True,
    items: Annotated[bool, typer.Option("--items/--no-items", help="Whether items and replies do.")] = True,
) -> None:
    """Writes a page of a study: table, figures, and every item with its replies."""
    from lazyllm.ablation.report import report_data
    from lazyllm.pages.report import report as write

    data = report_data(_results(folder), Study.load(folder / STUDY), folder, items=items)
    beside = folder if folder.name else folder.resolve()  # the folder may be "."
    path = write(data, output or beside.with_name(f"{beside.resolve().name}.html"), prompts=prompts)
    typer.echo(f"written: {path}")


@app.command()
@errors_as_lines()
def status(folder: FolderArgument) -> None:
    """Shows how far a study is, and why units failed."""
    results = _results(folder)
    table = Table("task", "cell", box=SIMPLE, title=results.plan.name)
    for column in ("done", "failed", "missing"):
        table.add_column(column, justify="right")
    for line in results.status():
        table.add_row(line.task, line.cell, *(str(count) for count in (line.done, line.failed, line.missing)))
    Console().print(table)
    _say(results)


@app.command()
@errors_as_lines()
def table(
    folder: FolderArgument,
    paper: Annotated[bool, typer.Option("--paper", help="In the form of the paper's Tables 1 and 2.")] = False,
) -> None:
    """Shows every cell beside the unmodified model, task by task."""
    results = _results(folder)
    if not paper:
        _show(results, folder)
        return
    from lazyllm.ablation.paper_tables import paper_sections

    for section in paper_sections(results):
        typer.echo(section.markdown())


@app.command()
@errors_as_lines()
def export(
    folder: FolderArgument,
    to: Annotated[Path, typer.Option("--to", "-o", help="A .csv, .json, .md or .parquet file.")],
) -> None:
    """Writes the results to a file: units as CSV, JSON or Parquet, lines as Markdown."""
    from lazyllm.ablation.tables import export as write

    typer.echo(f"written: {write(_results(folder), to)}")


@app.command()
@errors_as_lines()
def compare(
    folder: FolderArgument,
    by: Annotated[str, typer.Option(help="What to compare by: score or loss.")] = "score",
    margin: Annotated[float | None, typer.Option(help="By how much a cell may be worse.")] = None,
    against: Annotated[str | None, typer.Option(help="A cell; the unmodified model without it.")] = None,
) -> None:
    """Says of every cell whether it is no worse than the unmodified model, and whether that can be told at all."""
    from lazyllm.ablation.comparisons import VALUES, comparisons

    found = comparisons(_results(folder), by=by, margin=margin, against=against)
    unit, margin = VALUES[by].unit, found[0].margin
    _show_comparisons(found, f"{by} ({unit}) against {against or 'the unmodified model'}, margin {margin:g}")


def _show_comparisons(found: Sequence[Comparison], title: str) -> None:
    from lazyllm.ablation.tables import interval

    console = Console(width=None if Console().is_terminal else 200)
    table = Table("task", "cell", box=SIMPLE, title=title, caption=COMPARE_CAPTION)
    for column in ("n", "baseline", "mean", "difference", "p", "p, Holm", "shows from"):
        table.add_column(column, justify="right")
    table.add_column("worse?")
    for one in found:
        means = (f"{mean.estimate:.3f}" for mean in (one.baseline, one.mean))
        p_values = (f"{value:.3f}" for value in (one.p_value, one.adjusted_p_value))
        difference, shows = interval(one.difference, "{:+.3f}"), f"{one.detectable:.2g}"
        table.add_row(one.task, one.cell, str(one.pairs), *means, difference, *p_values, shows, one.decision)
    console.print(table)
    for warning in dict.fromkeys(f"{one.task}: {text}" for one in found for text in one.warnings):
        typer.echo(warning)


@app.command()
@errors_as_lines()
def figures(
    folder: FolderArgument,
    to: Annotated[Path | None, typer.Option("--to", help="Where they go; the same folder without it.")] = None,
    ending: Annotated[str, typer.Option(help="Their format: png, svg or pdf.")] = "png",
) -> None:
    """Draws the figures that the study names."""
    from lazyllm.ablation.drawing import save_figure

    results, study = _results(folder), Study.load(folder / STUDY)
    for number, figure in enumerate(study.figures, 1):
        path = (to or folder) / f"{study.name}-{number}-{figure.kind}.{ending}"
        typer.echo(f"written: {save_figure(results, figure, path)}")
    if not study.figures:
        typer.echo(f"the study {study.name!r} names no figures")


def _results(folder: Path) -> Results:
    needed("scipy", what="a study", extra="eval")
    from lazyllm.ablation.results import Results

    return Results.load(folder)


def _run(
    study: Study, out: Path | None, workers: int, ray: str | None, retry: bool, retime: bool, track: list[str]
) -> None:
    needed("scipy", what="a study", extra="eval")
    from lazyllm.ablation.engine import folder_of
    from lazyllm.ablation.progress import ProgressLine
    from lazyllm.ablation.trackers import tracker_named

    for notice in study.notices():
        typer.echo(notice, err=True)
    callbacks: list[StudyCallback] = [tracker_named(text) for text in track]
    with ExitStack() as stack:
        callbacks.append(stack.enter_context(ProgressLine(Console(stderr=True))))
        results = study.run(out, workers=workers, ray=ray, retry=retry, retime=retime, callbacks=callbacks)
    _show(results, folder_of(study, out))


def _show(results: Results, folder: Path) -> None:
    from lazyllm.ablation.tables import table as view

    console = Console(width=None if Console().is_terminal else 200)
    console.print(view(results.lines(), f"{results.plan.name}: {folder}"))
    _say(results)


def _say(results: Results) -> None:
    for reason, count in results.failures():
        typer.echo(f"{count} units failed: {reason}", err=True)
    for notice in results.notices:
        typer.echo(notice, err=True)


def _preview(study: Study, out: Path | None, retry: bool, retime: bool, device: str) -> None:
    needed("scipy", what="a study", extra="eval")
    from lazyllm.ablation.engine import prepare
    from lazyllm.ablation.forecast import forecast

    numbers = device_named(device)
    preview = prepare(study, out, retry=retry, retime=retime)
    lines = list(forecast(preview, numbers))
    table = Table("cell", box=SIMPLE, title=f"{study.name}, on {numbers.name}")
    for column in ("known", "to do", "TFLOP", "time"):
        table.add_column(column, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(line.cell, str(line.known), str(line.todo), *_costs(line.flops, line.seconds))
    flops, seconds = sum(line.flops or 0 for line in lines), sum(line.seconds or 0 for line in lines)
    table.add_section()
    known, todo = sum(line.known for line in lines), sum(line.todo for line in lines)
    table.add_row("all", str(known), str(todo), *_costs(flops, seconds))
    Console().print(table)
    for notice in preview.work.plan.notices:
        typer.echo(notice, err=True)


def _costs(flops: float | None, seconds: float | None) -> tuple[str, str]:
    if flops is None or seconds is None:
        return "-", "-"
    return f"{flops / 1e12:,.1f}", f"{seconds:.2f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
