"""Time to first token and time per output token of presets, beside the unmodified model.

Every round runs everything once, in shuffled order, so that a slow moment of the machine hits all of them alike;
figures are medians over the rounds. The unmodified model runs with each of its attention kernels and the faster one
counts as the baseline, prompt length by prompt length.
"""

from __future__ import annotations

import json
import platform
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel, StoppingCriteriaList

import lazyllm
from lazyllm.caches import AuxCache
from lazyllm.caches.row import PromptMarks
from lazyllm.config import LazyConfig, preset_names
from lazyllm.errors import EngineError, InputError, unknown
from lazyllm.evaluation.sections import Section, bold, conditions, in_rounds, length_range, times
from lazyllm.generation.clock import TokenClock
from lazyllm.generation.result import GenerationResult, GenerationStats
from lazyllm.pipeline import LazyPipeline
from lazyllm.policies.query import Query, TokenRange
from lazyllm.prompts import EncodedPrompt, pad_left

STOCK_KERNELS = ("sdpa", "eager")
PREFILL_ONLY = "prefill-only"
COMPILED = "compiled"
VARIANTS = (PREFILL_ONLY, COMPILED)
"""What may follow a preset's name; see `preset_config`."""


@dataclass(frozen=True)
class Workload:
    """What is timed: replies to a batch of prompts.

    Attributes:
        prompts: token ids, one list per row.
        new_tokens: length of every reply.
        questions: by row, the token range that asks something; empty = none is named.
    """

    prompts: Sequence[Sequence[int]]
    new_tokens: int
    questions: Sequence[TokenRange] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(map(len, self.prompts))

    @property
    def padded_over_real(self) -> float:
        """Tokens of the batch when it is padded to the longest prompt, over the tokens it has."""
        return len(self.prompts) * self.longest / sum(map(len, self.prompts))


@dataclass(frozen=True)
class Timing:
    """How long a reply took.

    Attributes:
        ttft_seconds: from the call to the first new token.
        step_seconds: from each new token to the next.
    """

    ttft_seconds: float
    step_seconds: tuple[float, ...] = ()

    @property
    def seconds_per_output_token(self) -> float | None:
        """Mean of `step_seconds`; None for a single token."""
        return sum(self.step_seconds) / len(self.step_seconds) if self.step_seconds else None

    @property
    def reply_seconds(self) -> float:
        """From the call to the last new token."""
        return self.ttft_seconds + sum(self.step_seconds)


@dataclass(frozen=True)
class Spread:
    """A sample in five numbers."""

    median: float
    minimum: float
    maximum: float
    lower_quartile: float
    upper_quartile: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The five numbers of a sample that is not empty."""
        low, quarter, middle, three_quarters, high = np.percentile(values, [0, 25, 50, 75, 100])
        return cls(float(middle), float(low), float(high), float(quarter), float(three_quarters))

    def show(self, digits: int, *, factor: float = 1.0) -> str:
        """Median and range as text, `2.31 (2.20 - 2.45)`."""
        middle, low, high = (f"{factor * value:.{digits}f}" for value in (self.median, self.minimum, self.maximum))
        return f"{middle} ({low} - {high})"


@dataclass(frozen=True)
class Measurement:
    """One run at one prompt length.

    Attributes:
        contender: its name, that of the preset, or of the unmodified model's kernel.
        prompt_tokens, new_tokens: lengths.
        ttft_seconds: from the call to the first new token, over the rounds.
        seconds_per_output_token: mean time from one new token to the next, over the rounds.
        ttft_speedup: median TTFT of the best unmodified run over this one's.
        decode_speedup: the same for the time per output token.
        predicted_ttft_speedup: dense over actual operations of the prefill; 1 for the unmodified model.
        realised_over_predicted: `ttft_speedup / predicted_ttft_speedup`.
        prefill_computed_fraction, computed_fraction: layer-tokens computed over those of a dense run.
        is_baseline: whether this is the best unmodified run.
        ttft_samples: by round.
    """

    contender: str
    prompt_tokens: int
    new_tokens: int
    ttft_seconds: Spread
    seconds_per_output_token: Spread | None
    ttft_speedup: float
    decode_speedup: float | None
    predicted_ttft_speedup: float
    realised_over_predicted: float
    prefill_computed_fraction: float
    computed_fraction: float
    is_baseline: bool
    ttft_samples: list[float]


@dataclass(frozen=True)
class BenchReport:
    """Measurements of one model in one dtype, where they were taken, and what was called."""

    model: str
    dtype: str
    rounds: int
    environment: dict[str, Any]
    measurements: list[Measurement]
    command: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class TimedRun:
    """Something that replies to prompts and can be timed.

    Attributes:
        name: what the report calls it.
        is_stock: whether it is the unmodified model.
        replies: token ids of the last replies, one list per row.
        kept_fraction: share of the prompts' K/V that was kept after the last prefill.
        stats: of the last replies, one per row; empty where lazyllm did not count.
    """

    def __init__(self, name: str, *, is_stock: bool) -> None:
        self.name, self.is_stock = name, is_stock
        self.replies: list[list[int]] = []
        self.kept_fraction = 1.0
        self.stats: list[GenerationStats] = []

    def run(self, work: Workload) -> Timing:
        """Generates replies of exactly `work.new_tokens` tokens and returns how long that took.

        Raises:
            EngineError: when another engine was to reply, and failed.
        """
        raise NotImplementedError

    def mean(self, figure: Callable[[GenerationStats], float]) -> float:
        """A figure of the last replies, mean over the prompts' tokens; 1 where lazyllm did not count."""
        if not self.stats:
            return 1.0
        tokens = [stats.prompt_tokens for stats in self.stats]
        return float(np.average([figure(stats) for stats in self.stats], weights=tokens))


class ModelRun(TimedRun):
    """A model in this process; `run` reads the same clock for all of them."""

    def __init__(self, name: str, model: PreTrainedModel, *, is_stock: bool) -> None:
        super().__init__(name, is_stock=is_stock)
        self.model = model

    def run(self, work: Workload) -> Timing:
        """Times `reply`, to the moments its tokens are there."""
        started = time.perf_counter()
        clock = TokenClock(self.model.device)
        self.reply(work, {**reply_options(work.new_tokens), "stopping_criteria": StoppingCriteriaList([clock])})
        steps = tuple(after - before for before, after in pairwise(clock.times))
        return Timing(clock.times[0] - started, steps)

    def reply(self, work: Workload, options: dict[str, Any]) -> None:
        """Generates with `options` of transformers' `generate`, and notes what came of it."""
        raise NotImplementedError


class StockRun(ModelRun):
    """The unmodified model with one of its attention kernels; a batch is padded on the left."""

    def __init__(self, model: PreTrainedModel, kernel: str) -> None:
        super().__init__(f"stock {kernel}", model, is_stock=True)
        self.kernel = kernel

    def run(self, work: Workload) -> Timing:
        """Switching the kernel takes no time."""
        with attention_kernel(self.model, self.kernel):
            return super().run(work)

    def reply(self, work: Workload, options: dict[str, Any]) -> None:
        """Plain `model.generate`."""
        rows = [EncodedPrompt(list(prompt), PromptMarks()) for prompt in work.prompts]
        ids, mask = pad_left(rows, options["pad_token_id"], self.model.device)
        output = self.model.generate(ids, attention_mask=mask, **options)
        self.replies = output[:, ids.shape[1] :].tolist()


class LazyRun(ModelRun):
    """A configuration."""

    def __init__(self, model: PreTrainedModel, name: str, config: LazyConfig) -> None:
        super().__init__(name, model, is_stock=False)
        self.pipeline = LazyPipeline.from_config(config, model)

    def reply(self, work: Workload, options: dict[str, Any]) -> None:
        """`pipeline.generate`, and what it says about the work."""
        prompts = [list(prompt) for prompt in work.prompts]
        questions: list[Query] = list(work.questions)
        results = cast(list[GenerationResult], self.pipeline.generate(prompts, query=questions or None, **options))
        self.replies = [result.token_ids for result in results]
        self.stats = [result.stats for result in results]
        self.kept_fraction = self.mean(lambda stats: stats.prefill_computed_fraction)


def reply_options(new_tokens: int) -> dict[str, Any]:
    """Greedy, and exactly `new_tokens` long."""
    return {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}


@contextmanager
def attention_kernel(model: PreTrainedModel, kernel: str) -> Iterator[None]:
    """Runs the model with another attention implementation for a while."""
    before = model.config._attn_implementation
    model.set_attn_implementation(kernel)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def preset_config(name: str) -> LazyConfig:
    """A preset's configuration, varied by what follows its name: `"paper prefill-only"`, `"dense compiled"`.

    *prefill-only*: with a cache that selects in prefill alone. *compiled*: decode steps run compiled layers.

    Raises:
        InputError: for an unknown variant, or a preset whose cache cannot select in prefill alone.
        ConfigError: for an unknown preset.
    """
    base, *variants = name.split(" ")
    config = LazyConfig.preset(base)
    for variant in variants:
        if variant not in VARIANTS:
            raise InputError(unknown("variant", variant, VARIANTS))
        if variant == COMPILED:
            config = config.model_copy(update={"compile": True})
        elif isinstance(config.cache, AuxCache):
            config = config.model_copy(update={"cache": AuxCache(attend=config.cache.attend, decode="reuse")})
        else:
            raise InputError(f"the preset {base!r} has no aux cache, so there is no {PREFILL_ONLY!r} variant of it")
    return config


def default_presets() -> list[str]:
    """Every shipped preset that needs no language model to read the prompt first, and the paper's without selection in
    decode.
    """
    names = [name for name in preset_names() if not LazyConfig.preset(name).scorer.reads_models]
    return [*names, f"paper {PREFILL_ONLY}"]


def timed_runs(model: PreTrainedModel, presets: Sequence[str]) -> list[TimedRun]:
    """The unmodified model with each kernel, and every preset."""
    stock: list[TimedRun] = [StockRun(model, kernel) for kernel in STOCK_KERNELS]
    return [*stock, *(LazyRun(model, name, preset_config(name)) for name in presets)]


def measure(
    model: PreTrainedModel,
    token_ids: Sequence[int],
    *,
    lengths: Sequence[int],
    presets: Sequence[str],
    rounds: int = 5,
    new_tokens: int = 8,
    seed: int = 0,
    model_name: str = "",
    command: str = "",
    on_round: Callable[[int, int], None] | None = None,
) -> BenchReport:
    """Times the unmodified model and every preset at every prompt length.

    Args:
        model: a causal LM, in the dtype to be measured.
        token_ids: a text at least as long as the longest prompt; prompts are its beginnings.
        lengths: prompt lengths in tokens.
        presets: names as `preset_config` takes them.
        rounds: how often each of them runs, after one time to warm up.
        new_tokens: length of the replies.
        seed: of the order within a round.
        model_name: what the report calls the model.
        command: what was called, for the report.
        on_round: told the prompt length and the number of each round that is done.

    Raises:
        InputError: when the text is too short, or there is nothing to do.
    """
    if not lengths or rounds < 1 or new_tokens < 1:
        raise InputError(f"nothing to measure: lengths {list(lengths)}, {rounds} rounds, {new_tokens} new tokens")
    if len(token_ids) < max(lengths):
        raise InputError(f"the text has {len(token_ids)} tokens, the longest prompt is to have {max(lengths)}")
    order = random.Random(seed)
    measurements: list[Measurement] = []
    for length in lengths:
        field = timed_runs(model, presets)
        work = Workload([token_ids[:length]], new_tokens)
        timings = run_rounds(field, work, rounds, order, on_round)
        measurements += compare(field, timings, length, new_tokens)
    dtype = str(model.dtype).removeprefix("torch.")
    return BenchReport(model_name, dtype, rounds, environment(model), measurements, command)


def run_rounds(
    field: Sequence[TimedRun],
    work: Workload,
    rounds: int,
    order: random.Random,
    on_round: Callable[[int, int], None] | None = None,
    on_error: Callable[[TimedRun, EngineError], None] | None = None,
) -> dict[str, list[Timing]]:
    """Timings by name, round by round; round 0 warms up and does not count.

    With `on_error`, which is told the reason, a run whose engine fails drops out; without it the error is raised.
    """
    timings: dict[str, list[Timing]] = {one.name: [] for one in field}
    running = list(field)
    for number in range(rounds + 1):
        for one in order.sample(running, len(running)):
            try:
                timing = one.run(work)
            except EngineError as error:
                if on_error is None:
                    raise
                on_error(one, error)
                running.remove(one)
                del timings[one.name]
                continue
            if number:
                timings[one.name].append(timing)
        if on_round is not None:
            on_round(work.longest, number)
    return timings


def compare(
    field: Sequence[TimedRun], timings: dict[str, list[Timing]], prompt_tokens: int, new_tokens: int
) -> list[Measurement]:
    """Medians of every run, and its speedup over the best unmodified run."""
    first = {name: Spread.of([timing.ttft_seconds for timing in runs]) for name, runs in timings.items()}
    further = {
        name: spread_of_known([timing.seconds_per_output_token for timing in runs]) for name, runs in timings.items()
    }
    stock = [run.name for run in field if run.is_stock]
    baseline = min(stock, key=lambda name: first[name].median)
    decode_times = [spread.median for name in stock if (spread := further[name]) is not None]
    fastest_decode = min(decode_times, default=None)

    def one(run: TimedRun) -> Measurement:
        name = run.name
        predicted = run.mean(lambda stats: stats.predicted_speedup)
        speedup = first[baseline].median / first[name].median
        per_token = further[name]
        return Measurement(
            contender=name,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            ttft_seconds=first[name],
            seconds_per_output_token=per_token,
            ttft_speedup=speedup,
            decode_speedup=fastest_decode / per_token.median if fastest_decode is not None and per_token else None,
            predicted_ttft_speedup=predicted,
            realised_over_predicted=speedup / predicted,
            prefill_computed_fraction=run.mean(lambda stats: stats.prefill_computed_fraction),
            computed_fraction=run.mean(lambda stats: stats.computed_fraction),
            is_baseline=name == baseline,
            ttft_samples=[timing.ttft_seconds for timing in timings[name]],
        )

    return [one(run) for run in field]


def section(report: BenchReport) -> Section:
    """The report as a table, the baselines bold."""
    lines = report.measurements
    configs = {name: preset_config(name) for line in lines if not (name := line.contender).startswith("stock ")}
    return Section(
        title=f"Time to first token: {report.model}, {report.dtype}",
        conditions=conditions(
            report.model,
            report.dtype,
            report.environment,
            configs,
            tokens=f"prompts of {length_range([line.prompt_tokens for line in lines])} tokens, replies of "
            f"{lines[0].new_tokens}",
            baseline="the faster unmodified run (bold)",
            measured=in_rounds(report.rounds),
            command=report.command,
        ),
        columns=[
            "prompt",
            "run",
            "TTFT, seconds",
            "speedup",
            "predicted",
            "realised / predicted",
            "ms per output token",
            "speedup",
            "computed",
        ],
        rows=[bold(_cells(line)) if line.is_baseline else _cells(line) for line in lines],
        notes=["*predicted*: the speedup by operations counted; *computed*: of the whole reply's layer-tokens."],
    )


def _cells(line: Measurement) -> list[str]:
    return [
        f"{line.prompt_tokens:,}",
        line.contender,
        line.ttft_seconds.show(2),
        times(line.ttft_speedup),
        times(line.predicted_ttft_speedup),
        f"{line.realised_over_predicted:.2f}",
        line.seconds_per_output_token.show(0, factor=1000) if line.seconds_per_output_token else "",
        times(line.decode_speedup),
        f"{line.computed_fraction:.0%}",
    ]


def environment(model: PreTrainedModel) -> dict[str, Any]:
    """Where the figures come from: parameters, device, threads, versions."""
    device = model.device
    return {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "layers": model.config.get_text_config(decoder=True).num_hidden_layers,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "lazyllm": lazyllm.__version__,
    }


def save_reports(reports: Sequence[BenchReport], path: str | Path) -> Path:
    """Writes reports as one JSON file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": 1, "reports": [report.to_dict() for report in reports]}, indent=2))
    return path


def spread_of_known(values: Sequence[float | None]) -> Spread | None:
    """Spread of the values that are there; None without any."""
    known = [value for value in values if value is not None]
    return Spread.of(known) if known else None
