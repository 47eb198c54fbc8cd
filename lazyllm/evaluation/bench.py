"""Time to first token and time per output token of presets, beside the unmodified model.

Every round runs every contender once, in shuffled order, so that a slow moment of the machine hits all of them alike;
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
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel, StoppingCriteriaList

import lazyllm
from lazyllm.caches import AuxCache
from lazyllm.config import LazyConfig, preset_names
from lazyllm.errors import EngineError, InputError, unknown
from lazyllm.pipeline import LazyPipeline, TokenClock
from lazyllm.policies.query import Query
from lazyllm.result import GenerationResult

STOCK_KERNELS = ("sdpa", "eager")
PREFILL_ONLY = "prefill-only"
"""Suffix of a preset's name: the same preset, pruning in prefill alone."""

Timing = tuple[float, float | None]
"""Seconds to the first token, and mean seconds per further token (None for a single one)."""


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


@dataclass(frozen=True)
class Measurement:
    """One contender at one prompt length.

    Attributes:
        contender: name of the preset, or of the unmodified model's kernel.
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
    """Measurements of one model in one dtype, and where they were taken."""

    model: str
    dtype: str
    rounds: int
    environment: dict[str, Any]
    measurements: list[Measurement]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class Contender:
    """Something that replies to a prompt and can be timed.

    Attributes:
        name: what the report calls it.
        is_stock: whether it is the unmodified model.
        predicted_speedup, prefill_computed_fraction, computed_fraction: of the last run; 1 for the unmodified model.
        kept_fraction: share of the prompt's K/V in the cache after the last run's prefill.
        reply: token ids of the last run's reply.
    """

    def __init__(self, name: str, *, is_stock: bool) -> None:
        self.name = name
        self.is_stock = is_stock
        self.predicted_speedup = self.prefill_computed_fraction = self.computed_fraction = self.kept_fraction = 1.0
        self.reply: list[int] = []

    def run(self, token_ids: Sequence[int], new_tokens: int) -> Timing:
        """Generates exactly `new_tokens` tokens and returns how long it took.

        Raises:
            EngineError: when it runs in another process and that failed.
        """
        raise NotImplementedError


class StockContender(Contender):
    """The unmodified model with one of its attention kernels."""

    def __init__(self, model: PreTrainedModel, kernel: str) -> None:
        super().__init__(f"stock {kernel}", is_stock=True)
        self.model = model
        self.kernel = kernel

    def run(self, token_ids: Sequence[int], new_tokens: int) -> Timing:
        """Times plain `model.generate`, with the options and the clock a pipeline uses."""
        with attention_kernel(self.model, self.kernel):
            started = time.perf_counter()
            clock = TokenClock(self.model.device)
            ids = torch.tensor([token_ids], device=self.model.device)
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                stopping_criteria=StoppingCriteriaList([clock]),
                **reply_options(new_tokens),
            )
        self.reply = output[0, len(token_ids) :].tolist()
        return clock.times[0] - started, _per_token(clock.times)


class LazyContender(Contender):
    """A preset.

    Args:
        model: the model it prunes.
        name: what the report calls it.
        config: its policies.
        query: what every prompt asks, as `pipeline.generate` takes it.
    """

    def __init__(self, model: PreTrainedModel, name: str, config: LazyConfig, *, query: Query | None = None) -> None:
        super().__init__(name, is_stock=False)
        self.pipeline = LazyPipeline.from_config(config, model)
        self.query = query

    def run(self, token_ids: Sequence[int], new_tokens: int) -> Timing:
        """Times `pipeline.generate`, which reads the same clock."""
        output = self.pipeline.generate(list(token_ids), query=self.query, **reply_options(new_tokens))
        result = cast(GenerationResult, output)
        stats = result.stats
        self.reply = result.token_ids
        self.predicted_speedup = stats.predicted_speedup
        self.prefill_computed_fraction = self.kept_fraction = stats.prefill_computed_fraction
        self.computed_fraction = stats.computed_fraction
        return stats.ttft_seconds, stats.seconds_per_output_token


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
    """A preset's configuration; `"paper prefill-only"` is `paper` with a cache that selects in prefill alone.

    Raises:
        InputError: for a preset whose cache cannot do that.
        ConfigError: for an unknown preset.
    """
    base, _, suffix = name.partition(" ")
    config = LazyConfig.preset(base)
    if not suffix:
        return config
    if suffix != PREFILL_ONLY:
        raise InputError(unknown("variant", suffix, [PREFILL_ONLY]))
    if not isinstance(config.cache, AuxCache):
        raise InputError(f"the preset {base!r} has no aux cache, so there is no {PREFILL_ONLY!r} variant of it")
    return config.model_copy(update={"cache": AuxCache(attend=config.cache.attend, decode="reuse")})


def default_presets() -> list[str]:
    """Every shipped preset, and the paper's without selection in decode."""
    return [*preset_names(), f"paper {PREFILL_ONLY}"]


def contenders(model: PreTrainedModel, presets: Sequence[str]) -> list[Contender]:
    """The unmodified model with each kernel, and every preset."""
    stock: list[Contender] = [StockContender(model, kernel) for kernel in STOCK_KERNELS]
    return [*stock, *(LazyContender(model, name, preset_config(name)) for name in presets)]


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
    on_round: Callable[[int, int], None] | None = None,
) -> BenchReport:
    """Times every contender at every prompt length.

    Args:
        model: a causal LM, in the dtype to be measured.
        token_ids: a text at least as long as the longest prompt; prompts are its beginnings.
        lengths: prompt lengths in tokens.
        presets: names as `preset_config` takes them.
        rounds: how often each contender runs, after one run to warm up.
        new_tokens: length of the replies.
        seed: of the order within a round.
        model_name: what the report calls the model.
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
        field = contenders(model, presets)
        timings = run_rounds(field, token_ids[:length], rounds, new_tokens, order, on_round)
        measurements += compare(field, timings, length, new_tokens)
    dtype = str(model.dtype).removeprefix("torch.")
    return BenchReport(model_name, dtype, rounds, environment(model), measurements)


def run_rounds(
    field: Sequence[Contender],
    prompt: Sequence[int],
    rounds: int,
    new_tokens: int,
    order: random.Random,
    on_round: Callable[[int, int], None] | None = None,
    on_error: Callable[[Contender, EngineError], None] | None = None,
) -> dict[str, list[Timing]]:
    """Timings by contender; round 0 warms up and does not count.

    With `on_error`, which is told the reason, a contender whose engine fails drops out; without it the error is raised.
    """
    timings: dict[str, list[Timing]] = {contender.name: [] for contender in field}
    running = list(field)
    for number in range(rounds + 1):
        for contender in order.sample(running, len(running)):
            try:
                timing = contender.run(prompt, new_tokens)
            except EngineError as error:
                if on_error is None:
                    raise
                on_error(contender, error)
                running.remove(contender)
                del timings[contender.name]
                continue
            if number:
                timings[contender.name].append(timing)
        if on_round is not None:
            on_round(len(prompt), number)
    return timings


def compare(
    field: Sequence[Contender], timings: dict[str, list[Timing]], prompt_tokens: int, new_tokens: int
) -> list[Measurement]:
    """Medians of every contender, and its speedup over the best unmodified run."""
    first = {name: Spread.of([ttft for ttft, _ in runs]) for name, runs in timings.items()}
    further = {name: _spread_of_known([per_token for _, per_token in runs]) for name, runs in timings.items()}
    stock = [contender.name for contender in field if contender.is_stock]
    baseline = min(stock, key=lambda name: first[name].median)
    decode_times = [spread.median for name in stock if (spread := further[name]) is not None]
    fastest_decode = min(decode_times, default=None)

    def one(contender: Contender) -> Measurement:
        name = contender.name
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
            predicted_ttft_speedup=contender.predicted_speedup,
            realised_over_predicted=speedup / contender.predicted_speedup,
            prefill_computed_fraction=contender.prefill_computed_fraction,
            computed_fraction=contender.computed_fraction,
            is_baseline=name == baseline,
            ttft_samples=[ttft for ttft, _ in timings[name]],
        )

    return [one(contender) for contender in field]


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


def _per_token(times: Sequence[float]) -> float | None:
    gaps = len(times) - 1
    return (times[-1] - times[0]) / gaps if gaps else None


def _spread_of_known(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return Spread.of(known) if known else None
