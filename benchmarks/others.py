"""lazyllm beside other engines: the same weights and prompts on the same machine, round by round.

    python benchmarks/others.py --lengths 1024,4096,8000 --rounds 7 --new-tokens 32 --threads 2
    python benchmarks/others.py --dtypes float32,int4/bfloat16 --file-types Q4_1 --without kvpress
    python benchmarks/others.py --quick --without kvpress

transformers and lazyllm run in this process. llama.cpp (the packaged GGUF file as it is, and its weights as F16 and
F32) and kvpress (SnapKV and KNorm, keeping as much K/V as a lazyllm run) run as workers, each in an environment of its
own that is made under out/venvs on first use. Everyone gets the same token ids: the beginning of State of the Union
addresses and a question. Only one engine computes at a time; the others wait without using the processor. Writes
out/others.json, out/others.md and out/others.png after every prompt length.

On a machine that other programs use too, call it with OMP_WAIT_POLICY=passive: threads that wait for each other then
sleep. It goes to every engine alike.
"""

from __future__ import annotations

import os
import random
import subprocess
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lazyllm.errors import EngineError, InputError, LazyLLMError
from lazyllm.evaluation.bench import (
    PREFILL_ONLY,
    LazyRun,
    StockRun,
    TimedRun,
    Workload,
    environment,
    preset_config,
    run_rounds,
)
from lazyllm.evaluation.data import packaged_model, packaged_text, quiet_loading
from lazyllm.evaluation.engines import EngineLine, EngineReport, Entrant, line_up, section
from lazyllm.evaluation.export import FILE_TYPES, FileType, write_checkpoint, write_dequantised
from lazyllm.evaluation.options import names_in, numbers_in
from lazyllm.evaluation.plots import plot_engines
from lazyllm.evaluation.sections import command_line, save_page
from lazyllm.evaluation.workers import FailedRun, Worker, WorkerRun
from lazyllm.models.loading import dtype_named, load_model
from lazyllm.models.quantize import Weights, weights_named

ENGINES = ("transformers", "lazyllm", "llama.cpp", "kvpress")
TORCH = torch.__version__.partition("+")[0]
INSTALLS = {
    "llama.cpp": [["--only-binary", ":all:", "xllamacpp==2026.10.11549"]],
    # torch comes first and alone, so that pip takes a CPU build where one is at hand
    "kvpress": [[f"torch=={TORCH}"], ["kvpress==0.5.5", "transformers==5.2.0"]],
}
"""What pip installs into a worker's environment, one call after the other."""
PRESSES = ("SnapKV", "KNorm")
PRESETS = (
    "recommended",
    f"recommended {PREFILL_ONLY}",
    "recommended-fast",
    f"recommended-fast {PREFILL_ONLY}",
    "static-pruning",
)
QUESTION = "\n\nWhat does the President ask the Congress to do?"
WORKERS = Path(__file__).parent / "workers"

console = Console(width=None if Console().is_terminal else 200)


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        source: GGUF file of the model.
        lengths, rounds, new_tokens, threads, seed: of every engine.
        dtypes: of transformers, lazyllm and kvpress.
        rounded: weights and dtype of more models of transformers and lazyllm, such as ("int4", "bfloat16").
        file_types: of llama.cpp.
        kernels: attention kernels of unmodified transformers.
        presets: of lazyllm; the first one says how much K/V kvpress keeps, unless `keep` does.
        keep: share of the K/V that kvpress keeps.
        engines: names from `ENGINES`.
        out: folder of everything written.
    """

    source: Path
    lengths: list[int]
    rounds: int
    new_tokens: int
    threads: int
    seed: int
    dtypes: list[str]
    rounded: list[tuple[Weights, str]]
    file_types: list[str]
    kernels: list[str]
    presets: list[str]
    keep: float | None
    engines: list[str]
    out: Path


def main(
    lengths: Annotated[str, typer.Option(help="Prompt lengths in tokens.")] = "1024,4096,8000",
    rounds: Annotated[int, typer.Option(min=1, help="Runs of everything, after one to warm up.")] = 7,
    new_tokens: Annotated[int, typer.Option(min=1, help="Length of the replies.")] = 32,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every engine.")] = 2,
    quick: Annotated[
        bool, typer.Option("--quick", help="1,024 tokens, float32, one round, 8 new tokens, no kvpress.")
    ] = False,
    only: Annotated[str, typer.Option(help="Engines to run: " + ", ".join(ENGINES))] = ",".join(ENGINES),
    without: Annotated[str, typer.Option(help="Engines to leave out.")] = "",
    dtypes: Annotated[
        str, typer.Option(help="Dtypes of transformers, lazyllm and kvpress; int4/bfloat16 with weights in 4 bits.")
    ] = "float32,bfloat16",
    file_types: Annotated[
        str, typer.Option("--file-types", help="Weights of llama.cpp: the file's own type, F16, F32; all without it.")
    ] = "",
    kernels: Annotated[str, typer.Option(help="Attention kernels of transformers: sdpa, eager.")] = "sdpa",
    presets: Annotated[str, typer.Option(help="As in ttft.py.")] = ",".join(PRESETS),
    keep: Annotated[
        float, typer.Option(min=0, max=1, help="Share of K/V kvpress keeps; 0: what the first preset keeps.")
    ] = 0,
    model: Annotated[str, typer.Option(help="GGUF file; the packaged SmolLM2 without it.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of the results, environments and converted weights.")] = Path("out"),
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Where the Markdown table goes.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order within a round.")] = 0,
) -> None:
    try:
        source = Path(model or packaged_model())
        kinds = [name.rpartition("/") for name in (["float32"] if quick else names_in(dtypes))]
        plan = Plan(
            source=source,
            lengths=[1024] if quick else numbers_in(lengths),
            rounds=1 if quick else rounds,
            new_tokens=8 if quick else new_tokens,
            threads=threads,
            seed=seed,
            dtypes=[dtype for weights, _, dtype in kinds if not weights],
            rounded=[(weights_named(weights), dtype) for weights, _, dtype in kinds if weights],
            file_types=names_in(file_types, known=all_file_types(source)) if file_types else all_file_types(source),
            kernels=names_in(kernels),
            presets=names_in(presets),
            keep=keep or None,
            engines=chosen(only, f"{without},kvpress" if quick else without),
            out=out,
        )
        check(plan)
        compare_engines(plan, markdown_file or out / "others.md")
    except LazyLLMError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from None


def chosen(only: str, without: str) -> list[str]:
    """Names of the engines to run.

    Raises:
        InputError: for an unknown one, or when none is left.
    """
    wanted = names_in(only, known=ENGINES)
    left_out = names_in(without, known=ENGINES) if without.strip(", ") else []
    engines = [name for name in ENGINES if name in wanted and name not in left_out]
    if not engines:
        raise InputError(f"no engine is left of {only!r} without {without!r}")
    return engines


def check(plan: Plan) -> None:
    """Refuses what cannot be compared, before anything is loaded.

    Raises:
        InputError: when the model is no GGUF file, kvpress does not know how much to keep, or waiting threads spin.
    """
    if plan.source.suffix != ".gguf":
        raise InputError(f"the engines share a GGUF file, and {str(plan.source)!r} is none")
    if "kvpress" in plan.engines and plan.keep is None and "lazyllm" not in plan.engines:
        raise InputError("kvpress keeps as much K/V as a lazyllm run does; let lazyllm run too, or give --keep")
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "active":
        raise InputError("with OMP_WAIT_POLICY=active an idle engine's threads take the processor from the others'")


def compare_engines(plan: Plan, markdown_file: Path) -> None:
    """Runs the plan and writes its results."""
    torch.set_num_threads(plan.threads)
    networks, tokenizer = load(plan)
    model = next(iter(networks.values()))
    context_tokens = max(plan.lengths) + plan.new_tokens
    if context_tokens > model.config.max_position_embeddings:
        raise InputError(
            f"a prompt of {max(plan.lengths)} tokens and a reply of {plan.new_tokens} do not fit into the model's "
            f"context of {model.config.max_position_embeddings}"
        )
    about = environment(model) | ({"torchao": version("torchao")} if plan.rounded else {})
    text = packaged_text(tokenizer, max(plan.lengths))
    question = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    order = random.Random(plan.seed)
    lines: list[EngineLine] = []
    with workers(plan, context_tokens) as running, progress() as bar:
        for name, worker in running.items():
            about |= told(name.partition(" ")[0], worker, about)
        task = bar.add_task("", total=len(plan.lengths) * (plan.rounds + 1))
        for length in plan.lengths:
            asked_from = length - len(question)
            work = Workload([[*text[:asked_from], *question]], plan.new_tokens, [(asked_from, length)])
            errors: dict[str, EngineError] = {}
            entrants = field(plan, networks, running, work)
            bar.update(task, description=f"{length:,} tokens")
            timings = run_rounds(
                [entry.timed for entry in entrants],
                work,
                plan.rounds,
                order,
                on_round=lambda *_: bar.advance(task),
                on_error=_note(errors),
            )
            lines += line_up(entrants, timings, errors, length, plan.new_tokens)
            report = EngineReport(plan.source.name, plan.rounds, command_line(), about, lines)
            written = save(report, plan.out, markdown_file)
    console.print(Markdown(section(report).markdown()))
    console.print("written:", *written)


def load(plan: Plan) -> tuple[dict[str, Any], Any]:
    """The model with every kind of weights, by what the table says of them, and its tokenizer."""
    networks = {}
    plain: list[tuple[Weights | None, str]] = [(None, dtype) for dtype in plan.dtypes]
    for weights, dtype in [*plain, *plan.rounded]:
        kind = f"{weights}/{dtype}" if weights else dtype
        with console.status(f"loading {plan.source.name} in {kind}"), quiet_loading():
            networks[kind], tokenizer = load_model(plan.source, dtype=dtype_named(dtype), weights=weights)
    return networks, tokenizer


def field(
    plan: Plan, networks: Mapping[str, Any], running: Mapping[str, Worker | EngineError], work: Workload
) -> list[Entrant]:
    """Everyone who takes part at one prompt length."""
    entrants: list[Entrant] = []
    for dtype, network in networks.items():
        if "transformers" in plan.engines:
            entrants += [entrant(StockRun(network, name), "transformers", name, dtype) for name in plan.kernels]
        if "lazyllm" in plan.engines:
            entrants += [
                entrant(LazyRun(network, name, preset_config(name)), "lazyllm", name, dtype) for name in plan.presets
            ]
    if "llama.cpp" in plan.engines:
        own = all_file_types(plan.source)[0]
        for kind in plan.file_types:
            run = "the file" if kind == own else "dequantised"
            entrants.append(entrant(away(running[f"llama.cpp {kind}"]), "llama.cpp", run, kind))
    if "kvpress" in plan.engines:
        kept = plan.keep or kept_by_lazyllm(entrants, work)
        for dtype in plan.dtypes:
            for press in PRESSES:
                request = {"press": press, "compression_ratio": 1 - kept}
                entrants.append(entrant(away(running[f"kvpress {dtype}"], request), "kvpress", press, dtype))
    return entrants


def kept_by_lazyllm(entrants: Sequence[Entrant], work: Workload) -> float:
    """Share of the prompt's K/V that the first of lazyllm's runs keeps."""
    timed = next(entry.timed for entry in entrants if entry.engine == "lazyllm")
    timed.run(replace(work, new_tokens=1))
    return timed.kept_fraction


def entrant(timed: TimedRun, engine: str, run: str, dtype: str) -> Entrant:
    timed.name = f"{engine} {run}, {dtype}"
    return Entrant(timed, engine, run, dtype)


def away(worker: Worker | EngineError, request: Mapping[str, Any] | None = None) -> TimedRun:
    """A worker's run, or one that says why there is none."""
    return FailedRun("", worker) if isinstance(worker, EngineError) else WorkerRun("", worker, request=request)


def all_file_types(source: Path) -> list[str]:
    """The GGUF file's own type, as its name tells, and those it is written in again."""
    own = source.stem.rpartition(".")[2]
    return [own, *(kind for kind in FILE_TYPES if kind != own)]


@contextmanager
def workers(plan: Plan, context_tokens: int) -> Iterator[dict[str, Worker | EngineError]]:
    """All workers by name, started; an error where one could not be."""
    running: dict[str, Worker | EngineError] = {}
    try:
        if "llama.cpp" in plan.engines:
            for kind in plan.file_types:
                arguments = [str(gguf_file(plan, kind)), str(context_tokens), str(plan.threads)]
                running[f"llama.cpp {kind}"] = start(plan, "llama.cpp", kind, "llama_cpp_worker.py", arguments)
        if "kvpress" in plan.engines:
            folder = plan.out / "weights" / plan.source.stem
            if not folder.exists():
                with console.status(f"writing {folder}"):
                    write_checkpoint(plan.source, folder)
            for dtype in plan.dtypes:
                arguments = [str(folder), dtype, str(plan.threads)]
                running[f"kvpress {dtype}"] = start(plan, "kvpress", dtype, "kvpress_worker.py", arguments)
        yield running
    finally:
        for worker in running.values():
            if isinstance(worker, Worker):
                worker.close()


def gguf_file(plan: Plan, kind: str) -> Path:
    """The GGUF file itself, or its weights in another type."""
    if kind == all_file_types(plan.source)[0]:
        return plan.source
    path = plan.out / "weights" / f"{plan.source.stem}-{kind}.gguf"
    if not path.exists():
        with console.status(f"writing {path}"):
            write_dequantised(plan.source, path, cast(FileType, kind))
    return path


def start(plan: Plan, engine: str, variant: str, script: str, arguments: Sequence[str]) -> Worker | EngineError:
    """A worker of an engine that has loaded, or why there is none."""
    name = f"{engine} {variant}"
    try:
        python = interpreter(plan.out / "venvs" / engine, INSTALLS[engine])
        command = [str(python), str(WORKERS / script), *arguments]
        worker = Worker(name, command, log=plan.out / "logs" / f"{name.replace(' ', '-')}.log")
        with console.status(f"loading {name}"):
            worker.start()
    except EngineError as error:
        console.print(f"[yellow]{error}[/yellow]")
        return error
    return worker


def interpreter(folder: Path, installs: Sequence[Sequence[str]]) -> Path:
    """Python of an environment that holds these packages; made when there is none.

    Raises:
        EngineError: when pip cannot install them.
    """
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join(" ".join(packages) for packages in installs)
    if stamp.is_file() and stamp.read_text() == wanted:
        return python.absolute()
    with console.status(f"making {folder}"):
        venv.create(folder, with_pip=True, clear=True)
        for packages in installs:
            call = [str(python), "-m", "pip", "install", "--quiet", *packages]
            done = subprocess.run(call, capture_output=True, text=True)
            if done.returncode:
                said = " | ".join(done.stderr.strip().splitlines()[-2:])
                raise EngineError(f"pip could not install {' '.join(packages)} into {folder}: {said}")
    stamp.write_text(wanted)
    return python.absolute()


def _note(errors: dict[str, EngineError]) -> Callable[[TimedRun, EngineError], None]:
    def note(timed: TimedRun, error: EngineError) -> None:
        errors[timed.name] = error

    return note


def told(engine: str, worker: Worker | EngineError, known: Mapping[str, Any]) -> dict[str, Any]:
    """What a worker said about itself, where it differs from what is known."""
    about = worker.about if isinstance(worker, Worker) else {}
    return {
        name if name not in known else f"{name} of {engine}": value
        for name, value in about.items()
        if known.get(name) != value
    }


def save(report: EngineReport, out: Path, markdown_file: Path) -> tuple[Path, Path, Path]:
    page = save_page([section(report)], markdown_file)
    return report.save(out / "others.json"), page, plot_engines(report, out / "others.png")


def progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


if __name__ == "__main__":
    typer.run(main)
