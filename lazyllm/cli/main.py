"""The command line: generate, list the policies, look into a configuration, predict what a prompt costs, tune."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast
from warnings import catch_warnings

import torch
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from transformers import AutoConfig

from lazyllm.caches import CACHES
from lazyllm.callbacks import ProgressBar, TokenTrace
from lazyllm.config import PRESET_FOLDER, LazyConfig, preset_names
from lazyllm.contexts.conversation import NEW_TOKENS
from lazyllm.costs import Cost, ModelShape, Prediction, full_below_break_even, predict
from lazyllm.costs.device import HERE
from lazyllm.errors import ConfigError, InputError
from lazyllm.evaluation.data import quiet_loading
from lazyllm.evaluation.harness_cli import run_lm_eval
from lazyllm.evaluation.options import names_in
from lazyllm.extras import installed_by, needed
from lazyllm.files.prompts import prompts_in
from lazyllm.generation.result import GenerationResult
from lazyllm.models.loading import DTYPES
from lazyllm.models.quantize import WEIGHTS
from lazyllm.pipeline import LazyPipeline
from lazyllm.policies import SCHEDULES, SCORERS
from lazyllm.policies.base import Keep, Phase, Policy, Registry
from lazyllm.policies.protect import Protect
from lazyllm.policies.select import Selector
from lazyllm.prompts import check_not_blank, decode_text

try:
    import typer
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
    from rich.table import Table
    from rich.text import Text

    from lazyllm.ablation import commands
    from lazyllm.cli.console import device_named, errors_as_lines, load_or_refuse
    from lazyllm.cli.serve import serve
except ImportError as missing:
    raise SystemExit(
        f"the lazyllm command needs {missing.name}, which is not installed: {installed_by('cli')}"
    ) from None

WARM_UP_TOKENS = 8

Numeric = TypeVar("Numeric", int, float)

app = typer.Typer(
    help="Long prompts made fast on any Hugging Face decoder.", no_args_is_help=True, add_completion=False
)


# -- generate --------------------------------------------------------------------------------------


ModelOption = Annotated[str, typer.Option(help="Hub id, folder or .gguf file, or packaged: SmolLM2.")]
PromptOption = Annotated[str | None, typer.Option(help="The prompt; without it and --prompt-file, stdin is read.")]
PromptFileOption = Annotated[str | None, typer.Option(help="A UTF-8 text file, - for stdin.")]
ChatOption = Annotated[bool, typer.Option("--chat", help="Wrap the prompt as one user message.")]
GgufFileOption = Annotated[str | None, typer.Option(help="GGUF file inside the folder or repository.")]
DtypeOption = Annotated[str, typer.Option(help=f"Dtype of the weights: {', '.join(['auto', *DTYPES])}.")]
WeightsOption = Annotated[str | None, typer.Option(help=f"Bits of the linear layers' weights: {', '.join(WEIGHTS)}.")]
PresetOption = Annotated[str, typer.Option(help="A preset's name, or the path of a configuration file.")]
ScorerOption = Annotated[str | None, typer.Option(help="Instead of the preset's: 'WindowAttention(window=16)'.")]
ScheduleOption = Annotated[str | None, typer.Option(help="Instead of the preset's: 'Stages({9: 0.7})'.")]
CacheOption = Annotated[str | None, typer.Option(help="Instead of the preset's: 'AuxCache(decode=\"reuse\")'.")]
SinksOption = Annotated[int | None, typer.Option(help="Tokens at the start that are never pruned.")]
RecentOption = Annotated[int | None, typer.Option(help="Tokens at the end that are never pruned.")]


@app.command()
@errors_as_lines()
def generate(
    model: ModelOption,
    prompt: PromptOption = None,
    prompt_file: PromptFileOption = None,
    chat: ChatOption = False,
    gguf_file: GgufFileOption = None,
    dtype: DtypeOption = "auto",
    weights: WeightsOption = None,
    preset: PresetOption = "recommended",
    scorer: ScorerOption = None,
    schedule: ScheduleOption = None,
    cache: CacheOption = None,
    sinks: SinksOption = None,
    recent: RecentOption = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Run decode steps on compiled layers.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of greedy decoding.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Temperature of --sample.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of --sample.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Run the dense model too and show both.")] = False,
    stats_json: Annotated[Path | None, typer.Option(help="Write the statistics as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the computed share of the context.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write who was computed where, .json or .npz.")] = None,
) -> None:
    """Generates a reply: text on stdout, one line of statistics on stderr."""
    config = _config(preset, scorer, schedule, cache, sinks, recent)
    if compiled:
        config = config.model_copy(update={"compile": True})
    text = _read_prompt(prompt, prompt_file)
    options = {"max_new_tokens": max_new_tokens, **_decoding(sample, temperature, seed)}
    _check_outputs(stats_json, plot, trace)
    loaded, tokenizer = load_or_refuse(model, gguf_file, dtype, weights)
    question: Any = [{"role": "user", "content": text}] if chat else text
    tracer = TokenTrace()
    pipe = LazyPipeline.from_config(config, loaded, tokenizer, callbacks=[tracer] if trace else [])
    dense = LazyPipeline.from_preset("dense", loaded, tokenizer)
    if compare:  # the first run of a process pays for things no later one does
        dense.generate([0] * WARM_UP_TOKENS, max_new_tokens=1, do_sample=False)
    result = _run(pipe, question, options, seed)
    if compare:
        Console().print(_comparison({"lazy": result, "dense": _run(dense, question, options, seed)}))
    else:
        typer.echo(result.text)
        typer.echo(_summary(result), err=True)
    _write(result, tracer, stats_json, plot, trace)


# -- map ---------------------------------------------------------------------------------------------


@app.command("map")
@errors_as_lines()
def map_prompts(
    model: ModelOption,
    prompts: Annotated[Path, typer.Option(help="A .jsonl file with fields 'prompt' and 'query', or a folder of .txt.")],
    out: Annotated[Path, typer.Option(help="Replies, one JSON line each; what stands there is not computed again.")],
    batch_tokens: Annotated[int, typer.Option(min=1, help="Most prompt tokens of a batch.")] = 8192,
    strict: Annotated[
        bool, typer.Option("--strict", help="End with the first prompt that cannot be answered.")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap each text as one user message.")] = False,
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file inside the folder or repository.")] = None,
    dtype: Annotated[str, typer.Option(help=f"Dtype of the weights: {', '.join(['auto', *DTYPES])}.")] = "auto",
    weights: Annotated[
        str | None, typer.Option(help=f"Bits of the linear layers' weights: {', '.join(WEIGHTS)}.")
    ] = None,
    preset: PresetOption = "recommended",
    scorer: ScorerOption = None,
    schedule: ScheduleOption = None,
    cache: CacheOption = None,
    sinks: SinksOption = None,
    recent: RecentOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 64,
) -> None:
    """Answers many prompts, greedily, into a file that the same command goes on from."""
    config = _config(preset, scorer, schedule, cache, sinks, recent)
    asked = prompts_in(prompts, chat=chat)
    _check_outputs(None, None, None, out)
    pipe = LazyPipeline.from_config(config, *load_or_refuse(model, gguf_file, dtype, weights))
    replies = pipe.map(
        [one.prompt for one in asked], query=[one.query for one in asked], batch_tokens=batch_tokens, out=out,
        progress=True, errors="raise" if strict else "return", max_new_tokens=max_new_tokens, do_sample=False,
    )  # fmt: skip
    with catch_warnings(record=True, action="always") as notices:
        failed = [(one, reply) for one, reply in zip(asked, replies, strict=True) if reply.error is not None]
    for notice in notices:
        typer.echo(f"lazyllm: {notice.message}", err=True)
    for one, reply in failed:
        typer.echo(f"lazyllm: {one.name}: {' '.join(str(reply.error).split())}", err=True)
    typer.echo(f"{len(asked) - len(failed)} of {len(asked)} prompts answered in {out}", err=True)
    if failed:
        raise typer.Exit(1)


def _config(
    preset: str, scorer: str | None, schedule: str | None, cache: str | None, sinks: int | None, recent: int | None
) -> LazyConfig:
    """The preset with what was given instead of its own policies."""
    base = LazyConfig.preset(preset)
    protect = {"sinks": sinks, "recent": recent}
    given = {"scorer": scorer, "schedule": schedule, "cache": cache}
    own = {name: value for name, value in given.items() if value is not None}
    protected = {**dict(base.protect), **{name: value for name, value in protect.items() if value is not None}}
    return LazyConfig(**{**dict(base), **own, "protect": Protect(**protected)})


def _read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt's text from the option, the file or stdin.

    Raises:
        InputError: when there is none, more than one, or it is not text.
    """
    if prompt is not None and prompt_file is not None:
        raise InputError("give --prompt or --prompt-file, not both")
    if prompt is None:
        return _read_file(prompt_file)
    return check_not_blank(prompt, "--prompt")


def _read_file(path: str | None) -> str:
    """Text of a file, or of stdin for None and `-`."""
    name = "stdin" if path is None or path == "-" else f"the prompt file {path!r}"
    if path is None and sys.stdin.isatty():
        raise InputError("there is no prompt: give --prompt, --prompt-file or a pipe")
    try:
        data = sys.stdin.buffer.read() if path is None or path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from None
    return decode_text(data, name)


def _decoding(sample: bool, temperature: float | None, seed: int | None) -> dict[str, Any]:
    """Greedy unless asked otherwise."""
    if not sample and (temperature is not None or seed is not None):
        raise InputError("--temperature and --seed are options of --sample; without it decoding is greedy")
    if temperature is not None and not temperature > 0:
        raise InputError(f"--temperature must be above 0, got {temperature}")
    return {"do_sample": sample} | ({"temperature": temperature} if temperature is not None else {})


def _check_outputs(stats_json: Path | None, plot: Path | None, trace: Path | None, *others: Path | None) -> None:
    """Refuses what could not be written before time is spent on a model."""
    for path in (stats_json, plot, trace, *others):
        if path is not None and not path.parent.is_dir():
            raise InputError(f"cannot write {str(path)!r}: there is no folder {str(path.parent)!r}")
    if trace is not None and trace.suffix not in (".json", ".npz"):
        raise InputError(f"a token trace is saved as .json or .npz, not {trace.name!r}")
    if plot is not None:
        needed("matplotlib", what="--plot", extra="plots")


def _run(pipe: LazyPipeline, prompt: Any, options: dict[str, Any], seed: int | None) -> GenerationResult:
    """One generation, with a progress bar on stderr while a long prefill runs."""
    if seed is not None:
        torch.manual_seed(seed)
    bar = ProgressBar(console=Console(stderr=True))
    shown = LazyPipeline.from_config(pipe.config, pipe.model, pipe.tokenizer, callbacks=[*pipe.callbacks, bar])
    try:
        return cast(GenerationResult, shown.generate(prompt, **options))
    finally:
        bar.close()


def _per_token(result: GenerationResult) -> str:
    seconds = result.stats.seconds_per_output_token
    return "-" if seconds is None else f"{seconds:.4f}"


def _summary(result: GenerationResult) -> str:
    stats = result.stats
    return (
        f"{stats.prompt_tokens:,} prompt tokens, {stats.new_tokens} new; TTFT {stats.ttft_seconds:.3f} s, "
        f"{_per_token(result)} s/token; computed {stats.computed_fraction:.1%} of the layer-tokens, "
        f"revived {stats.revived_tokens:,}"
    )


def _comparison(results: dict[str, GenerationResult]) -> Table:
    """Each run as one row."""
    table = Table("run", "TTFT (s)", "s/token", "computed", "revived", "text")
    for name, result in results.items():
        stats = result.stats
        numbers = (
            f"{stats.ttft_seconds:.3f}",
            _per_token(result),
            f"{stats.computed_fraction:.1%}",
            f"{stats.revived_tokens:,}",
        )
        table.add_row(name, *numbers, Text(result.text))
    return table


def _write(
    result: GenerationResult, tracer: TokenTrace, stats_json: Path | None, plot: Path | None, trace: Path | None
) -> None:
    """The files asked for.

    Raises:
        InputError: when one cannot be written.
    """
    try:
        if stats_json is not None:
            stats_json.write_text(result.stats.to_json(), encoding="utf-8")
        if plot is not None:
            result.stats.plot(plot)
        if trace is not None:
            tracer.save(trace)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write the results: {error}") from None


# -- chat ------------------------------------------------------------------------------------------


@app.command("chat")
@errors_as_lines()
def chat_with(
    model: ModelOption,
    document: Annotated[
        list[Path] | None, typer.Option(help="A text file or a folder of them; may be repeated.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    load: Annotated[Path | None, typer.Option(help="Go on with a conversation that /save wrote.")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file inside the folder or repository.")] = None,
    dtype: Annotated[str, typer.Option(help=f"Dtype of the weights: {', '.join(['auto', *DTYPES])}.")] = "auto",
    weights: Annotated[
        str | None, typer.Option(help=f"Bits of the linear layers' weights: {', '.join(WEIGHTS)}.")
    ] = None,
    preset: PresetOption = "recommended",
    scorer: ScorerOption = None,
    schedule: ScheduleOption = None,
    cache: CacheOption = None,
    sinks: SinksOption = None,
    recent: RecentOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = NEW_TOKENS,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of greedy decoding.")] = False,
    temperature: Annotated[float | None, typer.Option(help="Temperature of --sample.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of --sample.")] = None,
    slide: Annotated[bool, typer.Option(help="Let go of the oldest turns when the context is full.")] = True,
) -> None:
    """Talks about documents: questions from the keyboard or a pipe, replies on stdout as they come."""
    from lazyllm.cli.chat import Chat, loaded_documents, read_documents, run_chat

    config = _config(preset, scorer, schedule, cache, sinks, recent)
    options = {"max_new_tokens": max_new_tokens, **_decoding(sample, temperature, seed)}
    if load is not None and (document or system is not None):
        raise InputError("a conversation that is loaded has its documents and its system message; leave them out")
    texts = read_documents(document or [], left_out=lambda reason: typer.echo(f"left out: {reason}", err=True))
    with Console(stderr=True).status("loading the model"), quiet_loading():
        loaded, tokenizer = load_or_refuse(model, gguf_file, dtype, weights)
    pipe = LazyPipeline.from_config(config, loaded, tokenizer)
    if seed is not None:
        torch.manual_seed(seed)
    if load is not None:
        chat = pipe.load_conversation(load)
    else:
        with Console(stderr=True).status("reading the documents"):
            documents = loaded_documents(pipe, texts, system)
        chat = pipe.conversation(**documents, overflow="slide" if slide else "error")
    run_chat(Chat(chat, documents=texts, options=options))


# -- serve -----------------------------------------------------------------------------------------

app.command("serve")(serve)


# -- policies --------------------------------------------------------------------------------------


@app.command()
@errors_as_lines()
def policies(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, as on the page of policies.")] = False,
) -> None:
    """Lists every scorer, schedule, cache and preset."""
    if markdown:
        typer.echo("\n".join(_markdown(*listed) for listed in _listed()), nl=False)
        return
    console = Console()
    for columns, rows in _listed():
        table = _table(*columns)
        for name, *cells in rows:
            table.add_row(name, *map(Text, cells))
        console.print(table)


def _listed() -> Iterator[tuple[list[str], list[list[str]]]]:
    """Columns and rows: one table for each axis, and one of the presets."""
    registries: Sequence[Registry[Any]] = (SCORERS, SCHEDULES, CACHES)
    for registry in registries:
        rows = [[name, _fields(policy), policy.summary(), _source(policy)] for name, policy in registry.items()]
        yield [registry.kind, "fields", "summary", "source"], rows
    configs = {name: LazyConfig.preset(name) for name in preset_names()}
    yield (
        ["preset", "policies", "summary"],
        [
            [name, f"{config.scorer}, {config.schedule}, {config.cache}", _preset_summary(name)]
            for name, config in configs.items()
        ],
    )


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; names and code stand in backticks."""
    shown = [[f"`{name}`", *(cell.replace("|", "\\|") for cell in cells)] for name, *cells in rows]
    lines = [list(columns), ["---"] * len(columns), *shown]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _table(name: str, *columns: str) -> Table:
    table = Table(show_lines=True)
    table.add_column(name, no_wrap=True)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _fields(policy: type[Policy]) -> str:
    return ", ".join(f"{name}{_default(field)}" for name, field in policy.model_fields.items()) or "-"


def _default(field: FieldInfo) -> str:
    default = field.get_default(call_default_factory=True, validated_data={})
    return " (required)" if default is PydanticUndefined else f"={default!r}"


def _source(policy: type[Policy]) -> str:
    """What the docstring says behind `Source:`, up to the end of that paragraph."""
    found = re.search(r"Source:\s*(.+?)(?:\n\s*\n|\Z)", policy.__doc__ or "", flags=re.DOTALL)
    return " ".join(found[1].split()) if found else "-"


def _preset_summary(name: str) -> str:
    """The first sentence of what the preset's file says of itself."""
    lines = (PRESET_FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    said = " ".join(line.removeprefix("#").strip() for line in takewhile(lambda line: line.startswith("#"), lines))
    return re.split(r"(?<=\.) (?=From the source|What differs)", said)[0] or "-"


# -- inspect-config ----------------------------------------------------------------------------------


@app.command()
@errors_as_lines()
def inspect_config(
    config: Annotated[str, typer.Argument(help="A preset's name, or the path of a configuration file.")],
    layers: Annotated[int, typer.Option(min=1, help="Number of layers of the model.")] = 32,
    context_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 4096,
    asked: Annotated[bool, typer.Option("--asked", help="For a prompt that asks a question.")] = False,
) -> None:
    """Shows a configuration as YAML, and what it lets enter each layer in prefill."""
    policy = LazyConfig.preset(config)
    try:
        selector = Selector(policy.scorer, policy.schedule, policy.protect, layers)
    except ConfigError as error:
        raise ConfigError(f"{config} on {layers} layers: {error}") from None
    phase = Phase(is_prefill=True, context_tokens=context_tokens, asked=asked)
    cuts = selector.cuts(phase) if policy.cache.prunes else {}
    typer.echo(policy.to_yaml())
    table = Table("layers", "may enter, of the context")
    starts = sorted({0, *cuts})
    share, bound = 1.0, 0.0
    for start, stop in pairwise([*starts, layers]):
        keep = cuts.get(start, Keep(1.0))
        share = min(share, keep.fraction(context_tokens))
        bound += share * (stop - start)
        table.add_row(str(start) if stop - start == 1 else f"{start}-{stop - 1}", str(keep))
    Console().print(table)
    adapts = "at most " if any(cut.adapts for cut in cuts.values()) else ""
    typer.echo(f"linear work of a prefill: {adapts}{bound / layers:.1%} of dense, protected tokens not counted")
    if adapts:
        typer.echo("what the prompt itself leaves out is not known here; `lazyllm predict --kept` takes it as given")


# -- predict -----------------------------------------------------------------------------------------


@app.command("predict")
@errors_as_lines()
def predict_costs(
    model: Annotated[str, typer.Argument(help="A shape's name, or a folder with a config.json.")],
    preset: PresetOption = "recommended",
    scorer: ScorerOption = None,
    schedule: ScheduleOption = None,
    cache: CacheOption = None,
    sinks: SinksOption = None,
    recent: RecentOption = None,
    device: Annotated[
        str, typer.Option(help=f"A device's name, {HERE!r} to measure this machine, or a .json file.")
    ] = "h100-sxm",
    parallel: Annotated[int, typer.Option(help="Devices that share every layer.")] = 1,
    tokens: Annotated[str, typer.Option(help="Prompt lengths.")] = "8192,32768,131072",
    asked: Annotated[bool, typer.Option("--asked/--unasked", help="Whether the prompt asks a question.")] = True,
    kept: Annotated[
        str | None, typer.Option(help="Share of the context behind a cut that adapts: '0:0.48,1:0.22'.")
    ] = None,
    stats_json: Annotated[Path | None, typer.Option(help="Write the predictions as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw where the time to the first token goes.")] = None,
    save_device: Annotated[Path | None, typer.Option(help="Write the device's numbers as JSON.")] = None,
    save_config: Annotated[
        Path | None, typer.Option(help="Write the configuration, with prompts too short to pay run dense.")
    ] = None,
) -> None:
    """Predicts times and memory, dense and pruned; loads no weights."""
    config = _config(preset, scorer, schedule, cache, sinks, recent)
    lengths = [_read_as(int, text, "--tokens", "8192,32768") for text in tokens.split(",")]
    shares = _kept(kept)
    _check_outputs(stats_json, plot, None, save_device, save_config)
    shape, numbers = _shape(model), device_named(device)
    predictions = [
        predict(shape, config, numbers, tokens=length, parallel=parallel, asked=asked, kept=shares)
        for length in lengths
    ]
    spared = None if save_config is None else full_below_break_even(config, predictions[0])
    Console().print(_predictions(predictions))
    typer.echo("\n".join(_limits(predictions)))
    try:
        if save_device is not None:
            numbers.save(save_device)
        if spared is not None and save_config is not None:
            spared.save(save_config)
        if stats_json is not None:
            data = [prediction.to_dict() for prediction in predictions]
            stats_json.write_text(json.dumps(data, indent=2), encoding="utf-8")
        if plot is not None:
            from lazyllm.evaluation.plots import plot_prediction

            plot_prediction({model: predictions}, plot)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot write the results: {error}") from None


def _shape(model: str) -> ModelShape:
    """A named shape, or that of a folder's configuration; nothing is downloaded."""
    if not Path(model).is_dir():
        try:
            return ModelShape.named(model)
        except InputError as error:
            raise InputError(f"{error} A folder with a config.json will do too.") from None
    try:
        return ModelShape.of(AutoConfig.from_pretrained(model, local_files_only=True))
    except (OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"cannot read the configuration of the model {model!r}: {reason}") from None


def _read_as(kind: type[Numeric], text: str, option: str, example: str) -> Numeric:
    try:
        return kind(text)
    except ValueError:
        raise InputError(f"{option} is written like {example}, got {text!r}") from None


def _kept(text: str | None) -> dict[int, float]:
    """Layer and share from `0:0.48,1:0.22`."""
    pairs = [part.partition(":") for part in text.split(",")] if text else []
    example = "0:0.48,1:0.22"
    return {_read_as(int, at, "--kept", example): _read_as(float, share, "--kept", example) for at, _, share in pairs}


def _predictions(predictions: Sequence[Prediction]) -> Table:
    """Each length as two rows."""
    first = predictions[0]
    group = f"{first.parallel} x {first.device}" if first.parallel > 1 else first.device
    table = Table("prompt", "run", title=f"predicted on {group}", box=SIMPLE, collapse_padding=True)
    for column in ("TTFT s", "speedup", "ms/token", "K/V GB", "aux GB", "all GB", "fits"):
        table.add_column(column, justify="right", no_wrap=True)
    for prediction in predictions:
        table.add_row(f"{prediction.tokens:,}", "dense", *_costs(prediction.dense, 1.0))
        table.add_row("", "pruned", *_costs(prediction.pruned, prediction.speedup), end_section=True)
    return table


def _costs(cost: Cost, speedup: float) -> tuple[str, ...]:
    return (
        f"{cost.ttft_seconds:,.3f}",
        f"{speedup:.2f}x",
        f"{1000 * cost.seconds_per_output_token:.1f}",
        *(f"{size / 1e9:.1f}" for size in (cost.kv_bytes, cost.aux_bytes, cost.device_bytes)),
        "yes" if cost.fits else "no",
    )


def _limits(predictions: Sequence[Prediction]) -> Iterator[str]:
    """What bounds the longest prompt's speedup, and what the figures rest on."""
    last = max(predictions, key=lambda prediction: prediction.tokens)
    least = last.break_even_tokens
    yield "pruning pays " + (f"from {least:,} tokens on" if least else "at no length")
    yield f"limit at {last.tokens:,} tokens: {last.keep_limit:.2f}x by the mean share that enters a layer"
    if last.layer_limit is not None:
        yield f"limit however little is kept: {last.layer_limit:.2f}x by the layers that everything enters"
    for layer, share in last.kept.items():
        source = "assumed, as measured on HotpotQA prompts" if layer in last.assumed else "given"
        yield f"kept at layer {layer}: {share:.1%} of the context ({source})"
    yield from last.notes


# -- tune --------------------------------------------------------------------------------------------


@app.command("tune")
@errors_as_lines()
def tune_schedule(
    model: ModelOption,
    prompts: Annotated[Path, typer.Option(help="Folder of .txt files, or a .jsonl file with a field 'prompt'.")],
    speedup: Annotated[float | None, typer.Option(help="Reach this speedup with the least loss.")] = None,
    max_loss: Annotated[float | None, typer.Option(help="Lose at most this, KL in nats per token.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the search and of its result.")] = Path("tuned"),
    trials: Annotated[int, typer.Option(min=1, help="Configurations to measure.")] = 25,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each dense reply to compare.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the search and of the choice of validation prompts.")] = 0,
    rules: Annotated[str, typer.Option(help="How a cut may say what it keeps.")] = "share,ratio",
    chat: Annotated[bool, typer.Option("--chat", help="Wrap each text as one user message.")] = False,
    gguf_file: GgufFileOption = None,
    dtype: DtypeOption = "auto",
    weights: WeightsOption = None,
    preset: Annotated[str, typer.Option(help="Whose cache, protected tokens and scorer to take.")] = "recommended",
    scorer: Annotated[str | None, typer.Option(help="The scorer whose numbers to search, with a start.")] = None,
    cache: CacheOption = None,
    sinks: SinksOption = None,
    recent: RecentOption = None,
) -> None:
    """Finds a schedule that reaches a target on your prompts, and saves it for the model."""
    needed("optuna", what="the command tune", extra="tune")
    from lazyllm.tuning import report
    from lazyllm.tuning.prompts import read_prompts, split
    from lazyllm.tuning.space import RULES
    from lazyllm.tuning.study import Target, tune

    # what cannot be is refused before time is spent on a model
    target = Target(speedup, max_loss)
    config = _config(preset, scorer, None, cache, sinks, recent)
    tried = names_in(rules, known=RULES)
    texts = read_prompts(prompts, chat=chat)
    split(texts, seed)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out is a folder, {str(out)!r} is none")
    loaded, tokenizer = load_or_refuse(model, gguf_file, dtype, weights)
    with _tuning_progress() as on_progress:
        outcome = tune(
            loaded, tokenizer, texts, target, out=out, base=config, rules=tried, trials=trials, new_tokens=new_tokens,
            seed=seed, on_progress=on_progress,
        )  # fmt: skip
    Console().print(report.front_table(outcome))
    if outcome.chosen is None:
        raise InputError(report.missed(outcome))
    typer.echo("\n".join(report.chosen_lines(outcome, outcome.chosen)))
    if not outcome.validates:
        typer.echo(report.warning(outcome), err=True)


@contextmanager
def _tuning_progress() -> Iterator[Callable[[str, int, int], None]]:
    """One bar for each kind of work, with the time left, on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, TaskID] = {}

        def on_progress(work: str, done: int, total: int) -> None:
            if work not in tasks:
                tasks[work] = progress.add_task(work)
            progress.update(tasks[work], completed=done, total=total)

        yield on_progress


# -- pages -------------------------------------------------------------------------------------------


@app.command("inspect")
@errors_as_lines()
def inspect_prompt(
    model: ModelOption,
    prompt: PromptOption = None,
    prompt_file: PromptFileOption = None,
    chat: ChatOption = False,
    query: Annotated[str | None, typer.Option(help="What the prompt asks, as a part of its text.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file.")] = Path("inspect.html"),
    gguf_file: GgufFileOption = None,
    dtype: DtypeOption = "auto",
    weights: WeightsOption = None,
    preset: PresetOption = "recommended",
    scorer: ScorerOption = None,
    schedule: ScheduleOption = None,
    cache: CacheOption = None,
    sinks: SinksOption = None,
    recent: RecentOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest reply.")] = 24,
) -> None:
    """Writes a page that shows what was computed for a prompt, token by token and step by step."""
    from lazyllm.pages.inspection import record, save_inspection

    config = _config(preset, scorer, schedule, cache, sinks, recent)
    text = _read_prompt(prompt, prompt_file)
    _check_outputs(None, None, None, output)
    bar = ProgressBar(console=Console(stderr=True))
    pipe = LazyPipeline.from_config(config, *load_or_refuse(model, gguf_file, dtype, weights), callbacks=[bar])
    question: Any = [{"role": "user", "content": text}] if chat else text
    try:
        inspection = record(pipe, question, query=query, max_new_tokens=max_new_tokens, do_sample=False)
    finally:
        bar.close()
    title = f"{inspection.stats.prompt_tokens:,} prompt tokens through {Path(model).name}, {preset}"
    typer.echo(save_inspection(inspection, output, title=title))


# -- studies -----------------------------------------------------------------------------------------

app.command("ablate")(commands.ablate)
app.command("eval")(commands.evaluate)
app.command("report")(commands.report)
app.add_typer(commands.app, name="study")


@app.command(
    "lm-eval", add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True}
)
@errors_as_lines()
def lm_eval(context: typer.Context) -> None:
    """Runs lm-eval's own command line, where --model lazyllm is known."""
    run_lm_eval(context.args)


def main() -> None:
    """Runs the command line, which also finds policies in the current folder, after all that is installed."""
    sys.path.append(os.getcwd())
    app()


if __name__ == "__main__":
    main()
