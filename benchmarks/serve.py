"""The server under load: everything at once, gaps beside a long prompt, and beside other servers.

    python benchmarks/serve.py
    python benchmarks/serve.py --parts load --requests 200 --clients 8
    python benchmarks/serve.py --parts gaps --prompt 6000 --rounds 3
    python benchmarks/serve.py --parts others --rounds 3 --only lazyllm,transformers
    python benchmarks/serve.py --quick

Servers run as processes of their own and listen to this machine alone. *load*: chats of every kind, some of whose
clients go away and some malformed, by several clients at once; what was answered is asked again, one request at a time,
of a server that keeps nothing of earlier prompts. *gaps*: how long running replies wait for a token while a long prompt
is computed, with pieces of several sizes. *others*: the same greedy streams to lazyllm, to `transformers serve` and to
llama.cpp's server, one server computing at a time while the others stand still. Every request has a deadline. Writes
out/serve.md; ends with exit code 1 when anything was wrong under load.
"""

from __future__ import annotations

import asyncio
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Annotated, Any, TypeAlias, TypeVar, cast

import typer
from load.gaps import Gaps, Scene, measure
from load.gaps import table as gaps_table
from load.plan import MAX_BODY_BYTES, Planner, Texts
from load.rivals import Record, Rival, prompt_lengths, run_round
from load.rivals import table as rivals_table
from load.servers import ServerProcess, alone, free_port, models_of
from load.stress import one_at_a_time, put_under_load, tables
from others import INSTALLS, WORKERS, interpreter
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track
from transformers import AutoConfig, AutoTokenizer

from lazyllm.errors import EngineError, InputError, LazyLLMError
from lazyllm.evaluation.bench import preset_config
from lazyllm.evaluation.data import packaged_model, packaged_text, quiet_loading
from lazyllm.evaluation.export import FILE_TYPES, FileType, write_checkpoint, write_dequantised
from lazyllm.evaluation.options import names_in, numbers_in
from lazyllm.evaluation.sections import Section, command_line, conditions, in_rounds, length_range, save_page

PARTS = ("load", "gaps", "others")
ENGINES = ("lazyllm", "transformers", "llama.cpp")
TEXT_TOKENS = 100_000
SLOT_TOKENS = 2048
"""Positions of one request where an engine wants to know that beforehand; prompts and replies are shorter."""
TRANSFORMERS_RUNS: dict[str, list[str]] = {
    "one by one": [],
    "continuous batching": ["--continuous-batching", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "512"],
}
"""Ways of `transformers serve` on a processor; a cache sized by itself would take most of the memory."""
STOCK = "transformers one by one"
Starter: TypeAlias = Callable[[], list[Rival]]
"""Starts a server, and gives the ways in which it can be asked."""

Entrant = TypeVar("Entrant")

console = Console(width=None if Console().is_terminal else 200)


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        source: GGUF file of the model.
        dtype: of the weights of lazyllm and transformers.
        presets: of lazyllm.
        requests, clients: of the load, and clients of the other servers.
        lengths: fewest and most tokens of a prompt.
        prompt, replies, pieces: of the gaps.
        round_requests, engines, file_type: of the servers side by side.
        rounds, threads, seed: of everything.
        deadline: seconds that a request may take.
        out: folder of everything written.
    """

    source: Path
    dtype: str
    presets: list[str]
    requests: int
    clients: int
    lengths: tuple[int, int]
    prompt: int
    replies: int
    pieces: list[int]
    round_requests: int
    engines: list[str]
    file_type: str
    rounds: int
    threads: int
    seed: int
    deadline: float
    out: Path


def main(
    parts: Annotated[str, typer.Option(help="What to run: " + ", ".join(PARTS))] = ",".join(PARTS),
    requests: Annotated[int, typer.Option(min=1, help="Requests of the load.")] = 200,
    clients: Annotated[int, typer.Option(min=1, help="Clients at once.")] = 8,
    lengths: Annotated[str, typer.Option(help="Fewest and most tokens of a prompt.")] = "64,1536",
    presets: Annotated[str, typer.Option(help="Presets of lazyllm.")] = "recommended,dense",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt beside which gaps are measured.")] = 6000,
    replies: Annotated[int, typer.Option(min=1, help="Replies that run beside it.")] = 4,
    pieces: Annotated[str, typer.Option(help="Sizes of the pieces it is computed in.")] = "512,8192",
    round_requests: Annotated[int, typer.Option(min=1, help="Requests to every server in a round.")] = 24,
    only: Annotated[str, typer.Option(help="Servers side by side: " + ", ".join(ENGINES))] = ",".join(ENGINES),
    file_type: Annotated[str, typer.Option(help="Weights of llama.cpp: F16 or F32.")] = "F16",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of gaps and servers, after one to warm up.")] = 3,
    quick: Annotated[
        bool, typer.Option("--quick", help="40 requests, one round, lazyllm alone, shorter prompts.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of every server.")] = 2,
    deadline: Annotated[float, typer.Option(min=1, help="Seconds that a request may take.")] = 300,
    model: Annotated[str, typer.Option(help="GGUF file; the packaged SmolLM2 without it.")] = "",
    dtype: Annotated[str, typer.Option(help="Dtype of the weights of lazyllm and transformers.")] = "float32",
    out: Annotated[Path, typer.Option(help="Folder of the results, logs and converted weights.")] = Path("out"),
    seed: Annotated[int, typer.Option(help="Seed of everything that is drawn.")] = 0,
) -> None:
    try:
        plan = Plan(
            source=Path(model or packaged_model()),
            dtype=dtype,
            presets=names_in(presets),
            requests=40 if quick else requests,
            clients=clients,
            lengths=span("64,700" if quick else lengths),
            prompt=1500 if quick else prompt,
            replies=replies,
            pieces=numbers_in(pieces),
            round_requests=8 if quick else round_requests,
            engines=["lazyllm"] if quick else names_in(only, known=ENGINES),
            file_type=names_in(file_type, known=FILE_TYPES)[0],
            rounds=1 if quick else rounds,
            threads=threads,
            seed=seed,
            deadline=deadline,
            out=out,
        )
        faults = run(plan, names_in(parts, known=PARTS))
    except LazyLLMError as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from None
    if faults:
        raise typer.Exit(1)


def span(text: str) -> tuple[int, int]:
    """Two numbers, the smaller one first.

    Raises:
        InputError: for anything else.
    """
    numbers = numbers_in(text)
    if len(numbers) != 2 or numbers[0] > numbers[1]:
        raise InputError(f"lengths are the fewest and the most tokens of a prompt, such as 64,1536, not {text!r}")
    return numbers[0], numbers[1]


def run(plan: Plan, parts: Sequence[str]) -> list[str]:
    """Runs the parts and writes what came of them; gives what was wrong under load."""
    if plan.source.suffix != ".gguf":
        raise InputError(f"the servers share a GGUF file, and {str(plan.source)!r} is none")
    with quiet_loading():
        tokenizer = AutoTokenizer.from_pretrained(plan.source.parent, gguf_file=plan.source.name)
    texts = Texts(tokenizer, packaged_text(tokenizer, TEXT_TOKENS))
    sections: list[Section] = []
    faults: list[str] = []
    runs: dict[str, Callable[[], list[Section]]] = {
        "load": partial(under_load, plan, texts, faults),
        "gaps": partial(beside_a_prompt, plan, texts, tokenizer),
        "others": partial(beside_others, plan, texts, tokenizer),
    }
    for part in parts:
        sections += runs[part]()
        page = save_page(sections, plan.out / "serve.md")
    console.print(Markdown(page.read_text(encoding="utf-8")), f"written: {page}")
    return faults


def under_load(plan: Plan, texts: Texts, faults: list[str]) -> list[Section]:
    """Everything at once, then one request at a time."""
    presets = [option for preset in plan.presets for option in ("--preset", preset)]
    options = [*presets, "--max-body", str(MAX_BODY_BYTES)]
    with (
        lazyllm_server(plan, "load", *options) as server,
        console.status(f"{plan.requests} requests by {plan.clients} clients"),
    ):
        models = models_of(server.url)
        warm_up = Planner(texts, models, plan.lengths, seed=plan.seed + 1).greedy(2 * plan.clients)
        talks = Planner(texts, models, plan.lengths, seed=plan.seed).mixed(plan.requests)
        stress = asyncio.run(
            put_under_load(server.url, server.pid, warm_up, talks, plan.clients, deadline_seconds=plan.deadline)
        )
    faults += stress.faults()
    with (
        lazyllm_server(plan, "alone", *options, "--prefix-bytes", "0") as server,
        console.status("the same requests, one at a time"),
    ):
        comparisons = asyncio.run(one_at_a_time(server.url, stress, deadline_seconds=plan.deadline))
    said = told(
        plan,
        tokens=f"prompts of about {length_range(plan.lengths)} tokens, replies of 8 to 48",
        baseline="the same requests one at a time",
        measured=f"{plan.clients} clients at once after a warm-up",
    )
    return tables(stress, comparisons, said)


def beside_a_prompt(plan: Plan, texts: Texts, tokenizer: Any) -> list[Section]:
    """Gaps between tokens, by preset and size of piece."""
    scene = Scene(plan.prompt, plan.replies, {str(tokenizer.eos_token_id): -100}, plan.deadline)
    kinds = [(preset, piece) for preset in plan.presets for piece in plan.pieces]
    found = {kind: Gaps() for kind in kinds}
    with ExitStack() as stack:
        servers = {kind: stack.enter_context(gaps_server(plan, *kind)) for kind in kinds}
        for kind, number in shuffled_rounds(plan, kinds, "gaps"):
            server, noted = servers[kind], found[kind] if number else Gaps()
            with alone(server, list(servers.values())):
                (model,) = models_of(server.url)
                asyncio.run(measure(server.url, model, texts, scene, Random(plan.seed + number), noted))
    said = told(
        plan,
        tokens=f"{plan.replies} running replies to short prompts, beside which one prompt is asked",
        baseline="the same replies while nothing else is asked (*calm*)",
        measured=f"{in_rounds(plan.rounds).partition(',')[0]}, gaps of all rounds and replies",
    )
    return [gaps_table(found, plan.prompt, said)]


def gaps_server(plan: Plan, preset: str, piece: int) -> ServerProcess:
    options = ["--preset", preset, "--piece", str(piece), "--prefix-bytes", "0"]
    return lazyllm_server(plan, f"gaps-{preset}-{piece}", *options)


def beside_others(plan: Plan, texts: Texts, tokenizer: Any) -> list[Section]:
    """The same requests to every server."""
    failures: list[str] = []
    with ExitStack() as stack:
        rivals = started_rivals(plan, tokenizer, stack, failures)
        servers = list({rival.server.pid: rival.server for rival in rivals}.values())
        records = {rival.name: Record() for rival in rivals}
        for rival, number in shuffled_rounds(plan, rivals, "servers side by side"):
            talks = Planner(texts, [""], plan.lengths, seed=plan.seed + number).greedy(plan.round_requests)
            noted = records[rival.name] if number else Record()
            with alone(rival.server, servers):
                asyncio.run(
                    run_round(rival.server.url, rival.model, talks, plan.clients, noted, deadline_seconds=plan.deadline)
                )
    said = told(
        plan,
        tokens=f"prompts of {length_range(prompt_lengths(records))} tokens, replies of at most 8 to 48",
        baseline="the transformers run that answers most requests (bold)",
        measured=f"{plan.round_requests} greedy streams by {plan.clients} clients in each of {in_rounds(plan.rounds)}; "
        "TTFT and time per token over all requests; one server computing at a time",
    )
    return [rivals_table(rivals, records, STOCK, said, [versions(), *failures])]


def started_rivals(plan: Plan, tokenizer: Any, stack: ExitStack, failures: list[str]) -> list[Rival]:
    """Those of the engines that started; why others did not is noted.

    Raises:
        EngineError: when none did.
    """
    starters = {"lazyllm": lazyllm_rivals, "transformers": transformers_rivals, "llama.cpp": llama_cpp_rivals}
    rivals: list[Rival] = []
    for engine in plan.engines:
        for start in starters[engine](plan, tokenizer):
            try:
                entered = start()
            except EngineError as error:
                console.print(f"[yellow]{error}[/yellow]")
                failures.append(f"{error}.")
                continue
            rivals += entered
            stack.enter_context(entered[0].server)
    if not rivals:
        raise EngineError("; ".join(failures))
    return rivals


def shuffled_rounds(plan: Plan, entrants: Sequence[Entrant], title: str) -> Iterable[tuple[Entrant, int]]:
    """Everyone once in each round, in an order drawn anew; round 0 warms up."""
    order = Random(plan.seed)
    turns = [(one, number) for number in range(plan.rounds + 1) for one in order.sample(entrants, len(entrants))]
    return track(turns, description=title, console=console)


def lazyllm_server(plan: Plan, name: str, *options: str) -> ServerProcess:
    """`lazyllm serve`."""
    port = free_port()
    command = [sys.executable, "-m", "lazyllm", "serve", "--model", str(plan.source), "--dtype", plan.dtype]
    return started(plan, f"lazyllm-{name}", [*command, "--port", str(port), *options], port, ready="/ready")


def lazyllm_rivals(plan: Plan, tokenizer: Any) -> list[Starter]:
    """One server with all presets."""

    def start() -> list[Rival]:
        presets = [option for preset in plan.presets for option in ("--preset", preset)]
        server = lazyllm_server(plan, "others", *presets, "--max-running", str(max(16, plan.clients)))
        models = zip(plan.presets, models_of(server.url), strict=True)
        return [Rival("lazyllm", preset, server, model) for preset, model in models]

    return [start]


def transformers_rivals(plan: Plan, tokenizer: Any) -> list[Starter]:
    """`transformers serve`, in each of its ways."""
    folder = (plan.out / "weights" / plan.source.stem).absolute()
    if not folder.exists():
        with console.status(f"writing {folder}"):
            write_checkpoint(plan.source, folder)
    tokenizer.save_pretrained(folder)

    def start(run: str, options: Sequence[str]) -> list[Rival]:
        port, program = free_port(), Path(sys.executable).with_name("transformers")
        command = [str(program), "serve", str(folder), "--device", "cpu", "--dtype", plan.dtype, "--port", str(port)]
        command += ["--host", "127.0.0.1", "--model-timeout", "-1", *options]
        server = started(plan, f"transformers-{run.replace(' ', '-')}", command, port)
        return [Rival("transformers", run, server, str(folder))]

    return [partial(start, run, options) for run, options in TRANSFORMERS_RUNS.items()]


def llama_cpp_rivals(plan: Plan, tokenizer: Any) -> list[Starter]:
    """llama.cpp's own server, in an environment of its own."""
    path = plan.out / "weights" / f"{plan.source.stem}-{plan.file_type}.gguf"
    if not path.exists():
        with console.status(f"writing {path}"):
            write_dequantised(plan.source, path, cast(FileType, plan.file_type))

    def start() -> list[Rival]:
        python, port = interpreter(plan.out / "venvs" / "llama.cpp", INSTALLS["llama.cpp"]), free_port()
        sizes = [port, plan.clients, SLOT_TOKENS, plan.threads]
        command = [str(python), str(WORKERS / "llama_cpp_server.py"), str(path), *map(str, sizes)]
        return [Rival("llama.cpp", plan.file_type, started(plan, "llama.cpp", command, port), plan.source.stem)]

    return [start]


def versions() -> str:
    """Of all engines."""
    named = [f"{name} {version(name)}" for name in ("lazyllm-torch", "transformers", "torch")]
    return f"{', '.join([*named, INSTALLS['llama.cpp'][0][-1]])}."


def started(plan: Plan, name: str, command: Sequence[str], port: int, *, ready: str = "/health") -> ServerProcess:
    """A server that takes requests."""
    with console.status(f"starting {name}"):
        return ServerProcess(
            name, command, port, log=plan.out / "logs" / f"{name}.log", threads=plan.threads, ready=ready
        )


def told(plan: Plan, *, tokens: str, baseline: str, measured: str) -> str:
    """The line that says how something was measured."""
    layers = AutoConfig.from_pretrained(plan.source.parent, gguf_file=plan.source.name).num_hidden_layers
    environment: Mapping[str, Any] = {
        "layers": layers,
        "device": platform.processor() or platform.machine(),
        "threads": plan.threads,
    }
    return conditions(
        plan.source.stem,
        plan.dtype,
        environment,
        {preset: preset_config(preset) for preset in plan.presets},
        tokens=tokens,
        baseline=baseline,
        measured=measured,
        command=command_line(),
    )


if __name__ == "__main__":
    typer.run(main)
