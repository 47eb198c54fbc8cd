"""Where pruning ends to pay, and what it must not cost: long prompts, ragged batches, memory, and reviving everything.

Each part gives a section or two. Times are ratios of runs of the same round, so that a slow moment of the machine hits
both.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from lazyllm.caches import AuxCache, DropCache
from lazyllm.config import LazyConfig
from lazyllm.errors import InputError
from lazyllm.evaluation.bench import (
    LazyRun,
    Spread,
    StockRun,
    TimedRun,
    Timing,
    Workload,
    environment,
    run_rounds,
)
from lazyllm.evaluation.memory import Footprint, ReplySize, reply_sizes, trace_reply
from lazyllm.evaluation.sections import Section, conditions, in_rounds, length_range, save_page
from lazyllm.generation.result import GenerationStats
from lazyllm.policies.query import TokenRange
from lazyllm.policies.schedules import Constant, PerPhase, Stages

KERNEL = "sdpa"
STOCK = f"stock {KERNEL}"
"""What times are compared with, unless a section says otherwise."""
GROWTH_PRESETS = ("dense", "static-pruning", "recommended")
BATCH_PRESETS = ("dense", "recommended")
EVERYTHING_REVIVED = "all pruned, all revived"
KEEP_FROM_2 = LazyConfig(schedule=Constant(keep=0.3, start=2), cache=AuxCache())
MEMORY_CASES: Mapping[str, LazyConfig] = {
    "dense": LazyConfig.preset("dense"),
    "keep .3 from layer 2, AuxCache": KEEP_FROM_2,
    "keep .3 from layer 2, DropCache": KEEP_FROM_2.model_copy(update={"cache": DropCache()}),
    "paper": LazyConfig.preset("paper"),
    "recommended": LazyConfig.preset("recommended"),
}
KEEP_CASE = "keep .3 from layer 2, AuxCache"
BATCH_GOAL, MEMORY_GOAL, REVIVAL_GOAL = 0.95, 0.45, 1.15

OnRound = Callable[[int, int], None]


@dataclass(frozen=True)
class Setup:
    """A model, texts for it, and how it is measured.

    Attributes:
        model: a causal LM, in the dtype to be measured.
        name: what the report calls it.
        text: token ids to make prompts of.
        question: token ids that stand at the end of every prompt.
        rounds: how often everything runs, after one time to warm up.
        command: what was called.
        seed: of the order within a round, and of the lengths of a batch.
        on_round: told the prompt length and the number of each round that is done.
    """

    model: PreTrainedModel
    name: str
    text: Sequence[int]
    question: Sequence[int]
    rounds: int
    command: str
    seed: int = 0
    on_round: OnRound | None = None

    @property
    def dtype(self) -> str:
        """Name of the weights' dtype."""
        return str(self.model.dtype).removeprefix("torch.")

    def prompt(self, tokens: int, *, start: int = 0) -> tuple[list[int], TokenRange]:
        """A prompt of so many tokens, a piece of the text with the question behind it, and where the question stands.

        Raises:
            InputError: when that cannot be.
        """
        piece = tokens - len(self.question)
        if piece < 1 or start + piece > len(self.text):
            raise InputError(
                f"a prompt has {len(self.question) + 1} to {len(self.text) - start + len(self.question)} tokens here "
                f"(the question and a piece of the text), not {tokens}"
            )
        return [*self.text[start : start + piece], *self.question], (piece, tokens)

    def workload(self, tokens: int, new_tokens: int) -> Workload:
        """One prompt."""
        prompt, question = self.prompt(tokens)
        return Workload([prompt], new_tokens, [question])

    def conditions(self, tokens: str, configs: Mapping[str, LazyConfig], baseline: str, measured: str) -> str:
        """The line that says what was measured, and how."""
        return conditions(
            self.name,
            self.dtype,
            environment(self.model),
            configs,
            tokens=tokens,
            baseline=baseline,
            measured=measured,
            command=self.command,
        )


@dataclass(frozen=True)
class Entry:
    """One run on one workload, over the rounds.

    Attributes:
        run: its name.
        dtype: of the weights.
        prompt_tokens: of all prompts, padding not counted.
        padded_over_real: tokens of the padded batch over `prompt_tokens`; 1 for one prompt.
        ttft_seconds, reply_seconds: from the call to the first and to the last token.
        second_token_seconds: from the first token to the second; None for a reply of one.
        speedup: the baseline's TTFT over this one's, round by round.
        reply_ratio: this one's time for the reply over the baseline's, round by round.
        prefill_computed_fraction, computed_fraction: layer-tokens computed over those of a dense run.
        once: whether every layer computed each token once; None for the unmodified model, which nothing counts.
    """

    run: str
    dtype: str
    prompt_tokens: int
    padded_over_real: float
    ttft_seconds: Spread
    reply_seconds: Spread
    second_token_seconds: Spread | None
    speedup: Spread
    reply_ratio: Spread
    prefill_computed_fraction: float
    computed_fraction: float
    once: bool | None

    @property
    def milliseconds_per_prompt_token(self) -> Spread:
        """Time to the first token, by the prompt's length."""
        return Spread(*(1000 * value / self.prompt_tokens for value in asdict(self.ttft_seconds).values()))


@dataclass(frozen=True)
class Part(Section):
    """A section of this benchmark.

    Attributes:
        part: which part of the benchmark it belongs to.
        records: the figures behind the table.
    """

    part: str = field(kw_only=True)
    records: Sequence[dict[str, Any]] = field(kw_only=True)


def time_runs(setup: Setup, runs: Sequence[TimedRun], work: Workload, *, baseline: str) -> list[Entry]:
    """Times runs on one workload; ratios are over the run of that name."""
    timings = run_rounds(runs, work, setup.rounds, random.Random(setup.seed), setup.on_round)
    return [_entry(run, setup.dtype, work, timings[run.name], timings[baseline]) for run in runs]


def _entry(run: TimedRun, dtype: str, work: Workload, own: Sequence[Timing], base: Sequence[Timing]) -> Entry:
    pairs = list(zip(own, base, strict=True))
    second = [timing.step_seconds[0] for timing in own if timing.step_seconds]
    return Entry(
        run=run.name,
        dtype=dtype,
        prompt_tokens=sum(map(len, work.prompts)),
        padded_over_real=work.padded_over_real,
        ttft_seconds=Spread.of([timing.ttft_seconds for timing in own]),
        reply_seconds=Spread.of([timing.reply_seconds for timing in own]),
        second_token_seconds=Spread.of(second) if second else None,
        speedup=Spread.of([other.ttft_seconds / one.ttft_seconds for one, other in pairs]),
        reply_ratio=Spread.of([one.reply_seconds / other.reply_seconds for one, other in pairs]),
        prefill_computed_fraction=run.mean(lambda stats: stats.prefill_computed_fraction),
        computed_fraction=run.mean(lambda stats: stats.computed_fraction),
        once=all(map(computed_once, run.stats)) if run.stats else None,
    )


def computed_once(stats: GenerationStats) -> bool:
    """Whether every layer computed as many tokens as it was shown, the last new token being shown to none.

    No layer computes a token twice (law 1), so it then computed each of them once.
    """
    shown = stats.prompt_tokens + stats.new_tokens - 1
    return all(sum(layer.computed for layer in steps) == shown for steps in zip(*stats.tokens_per_layer, strict=True))


# -- growth ------------------------------------------------------------------------------------------


def growth(setup: Setup, lengths: Sequence[int]) -> tuple[Part, list[Entry]]:
    """Time per prompt token as prompts grow."""
    longest = setup.model.config.get_text_config(decoder=True).max_position_embeddings
    fitting = [length for length in lengths if length <= longest]
    if not fitting:
        raise InputError(f"the model has positions for {longest} tokens, every prompt is longer: {list(lengths)}")
    configs = {name: LazyConfig.preset(name) for name in GROWTH_PRESETS}
    entries: list[Entry] = []
    for length in fitting:
        entries += time_runs(setup, _field(setup, configs), setup.workload(length, 1), baseline=STOCK)
    rows = [
        [
            f"{entry.prompt_tokens:,}",
            entry.run,
            entry.milliseconds_per_prompt_token.show(3),
            entry.ttft_seconds.show(2),
            entry.speedup.show(2),
            f"{entry.prefill_computed_fraction:.0%}",
        ]
        for entry in entries
    ]
    left_out = [length for length in lengths if length > longest]
    section = Part(
        part="growth",
        title="Time per prompt token",
        conditions=setup.conditions(
            f"prompts of {length_range(fitting)} tokens", configs, STOCK, in_rounds(setup.rounds)
        ),
        columns=["prompt", "run", "ms per prompt token", "TTFT, seconds", "speedup", "computed"],
        rows=rows,
        records=[asdict(entry) for entry in entries],
        notes=[f"Left out: {length:,} tokens, the model has positions for {longest:,}." for length in left_out],
    )
    return section, entries


# -- batch -------------------------------------------------------------------------------------------


def ragged_lengths(rows: int, shortest: int, longest: int, *, seed: int) -> list[int]:
    """Lengths of a batch, drawn one from each of `rows` equal parts of the range, in shuffled order.

    Raises:
        InputError: when the range has not a length for every row.
    """
    if not 1 <= shortest <= longest or not 1 <= rows <= longest - shortest + 1:
        raise InputError(f"{rows} rows of different lengths do not fit between {shortest} and {longest} tokens")
    draw, span = random.Random(seed), longest + 1 - shortest
    edges = [shortest + span * row // rows for row in range(rows + 1)]
    lengths = [draw.randrange(low, high) for low, high in pairwise(edges)]
    draw.shuffle(lengths)
    return lengths


def ragged_batch(setup: Setup, lengths: Sequence[int]) -> Workload:
    """Prompts of these lengths, from different places of the text, each with the question at its end."""
    room = len(setup.text) - max(lengths) + len(setup.question)
    asked = [setup.prompt(length, start=room * row // len(lengths)) for row, length in enumerate(lengths)]
    return Workload([prompt for prompt, _ in asked], 1, [question for _, question in asked])


def batch(setup: Setup, rows: int, shortest: int, longest: int) -> Part:
    """A ragged batch against the padded one of the unmodified model."""
    lengths = ragged_lengths(rows, shortest, longest, seed=setup.seed)
    configs = {name: LazyConfig.preset(name) for name in BATCH_PRESETS}
    entries = time_runs(setup, _field(setup, configs), ragged_batch(setup, lengths), baseline=STOCK)
    cells = [
        [
            entry.run,
            entry.ttft_seconds.show(2),
            entry.speedup.show(2),
            "" if entry.run == STOCK else entry.speedup.show(2, factor=1 / entry.padded_over_real),
            f"{entry.prefill_computed_fraction:.0%}",
        ]
        for entry in entries
    ]
    dense, ratio = next(entry for entry in entries if entry.run == "dense"), entries[0].padded_over_real
    real = entries[0].prompt_tokens
    sizes = ", ".join(f"{length:,}" for length in lengths)
    return Part(
        part="batch",
        title="A ragged batch",
        conditions=setup.conditions(
            f"{rows} prompts of {sizes} tokens, {real:,} in all, {ratio * real:,.0f} padded ({ratio:.2f}x)",
            configs,
            f"{STOCK}, padded on the left",
            in_rounds(setup.rounds),
        ),
        columns=["run", "all first tokens, seconds", "speedup", "speedup / padding", "computed"],
        rows=cells,
        records=[{**asdict(entry), "lengths": lengths} for entry in entries],
        notes=[_goal("speedup of dense / padding", dense.speedup.median / ratio, least=BATCH_GOAL)],
    )


# -- memory ------------------------------------------------------------------------------------------


def memory(setup: Setup, tokens: int, measure: Callable[[LazyConfig, list[int], TokenRange], Footprint]) -> Part:
    """Bytes of the cache, counted and seen from outside; `measure` takes a configuration, a prompt and its question."""
    prompt, question = setup.prompt(tokens)
    found = {name: measure(config, prompt, question) for name, config in MEMORY_CASES.items()}
    dense = found["dense"]
    whole = dense.reply_kv_bytes
    rows = [
        [
            name,
            _mb(one.kv_bytes),
            _mb(one.aux_bytes),
            f"{one.total_bytes / dense.kv_bytes:.3f}",
            "-" if one.held_bytes is None else _mb(one.held_bytes),
            "-" if one.held_bytes is None else f"{one.held_bytes / one.total_bytes:.2f}",
            "-" if one.peak_bytes is None else _mb(one.peak_bytes),
            _mb(one.reply_kv_bytes),
            _mb(one.reply_aux_bytes),
            f"{(one.reply_kv_bytes + one.reply_aux_bytes) / whole:.3f}",
        ]
        for name, one in found.items()
    ]
    seen = "allocated on the device" if setup.model.device.type == "cuda" else "resident"
    share = found[KEEP_CASE].total_bytes / dense.kv_bytes
    return Part(
        part="memory",
        title="Bytes held",
        conditions=setup.conditions(
            f"a prompt of {tokens:,} tokens and {dense.reply_tokens} tokens of reply",
            MEMORY_CASES,
            "the K/V of dense",
            f"counted once, and the growth of the {seen} memory of a fresh process over the prefill, after one to "
            "warm up",
        ),
        columns=[
            "run",
            "K/V, MB",
            "Aux, MB",
            "of dense",
            "process grew, MB",
            "grew / counted",
            "peak, MB",
            "after reply: K/V, MB",
            "Aux, MB",
            "of dense",
        ],
        rows=rows,
        records=[{"run": name, "dtype": setup.dtype, **asdict(one)} for name, one in found.items()],
        notes=[_goal(f"{KEEP_CASE}: K/V and Aux over the K/V of dense", share, most=MEMORY_GOAL)],
    )


def long_reply(setup: Setup, tokens: int, reply_tokens: int, *, every: int = 100) -> tuple[Part, list[ReplySize]]:
    """How the cache of `recommended` grows with the reply."""
    prompt, question = setup.prompt(tokens)
    config = LazyConfig.preset("recommended")
    sizes = reply_sizes(trace_reply(setup.model, config, prompt, question, reply_tokens), every=every)
    rows = [
        [
            f"{size.reply_tokens:,}",
            _mb(size.kv_bytes),
            _mb(size.aux_bytes),
            _mb(size.grown_bytes),
            _mb(size.new_bytes),
            _mb(size.revived_bytes),
            _yes(size.adds_up),
        ]
        for size in sizes
    ]
    section = Part(
        part="memory",
        title="Bytes held during a long reply",
        conditions=setup.conditions(
            f"a prompt of {tokens:,} tokens and {reply_tokens:,} tokens of reply",
            {"recommended": config},
            "the cache after the prefill",
            "counted once",
        ),
        columns=["reply tokens", "K/V, MB", "Aux, MB", "K/V grew, MB", "new tokens, MB", "revived, MB", "adds up"],
        rows=rows,
        records=[{"dtype": setup.dtype, **asdict(size)} for size in sizes],
    )
    return section, sizes


# -- revival -----------------------------------------------------------------------------------------


def everything_revived() -> LazyConfig:
    """The worst case: all but the last token pruned after the first layer, and all taken up by the next step."""
    return LazyConfig(
        schedule=PerPhase(prefill=Stages(stages={1: 1e-9}), decode=Constant(keep=1.0)),
        cache=AuxCache(attend="cached", decode="select"),
    )


def revival(setup: Setup, tokens: int, reply_tokens: int) -> Part:
    """The whole reply when pruning was for nothing."""
    configs = {"dense": LazyConfig.preset("dense"), EVERYTHING_REVIVED: everything_revived()}
    entries = time_runs(setup, _field(setup, configs), setup.workload(tokens, reply_tokens), baseline="dense")
    rows = [
        [
            entry.run,
            entry.reply_seconds.show(2),
            entry.reply_ratio.show(2),
            entry.ttft_seconds.show(2),
            entry.second_token_seconds.show(2) if entry.second_token_seconds else "-",
            f"{entry.prefill_computed_fraction:.1%}",
            f"{entry.computed_fraction:.1%}",
            "-" if entry.once is None else _yes(entry.once),
        ]
        for entry in entries
    ]
    worst = entries[-1]
    return Part(
        part="revival",
        title="Everything pruned, everything revived",
        conditions=setup.conditions(
            f"a prompt of {tokens:,} tokens and {reply_tokens} new tokens", configs, "dense", in_rounds(setup.rounds)
        ),
        columns=[
            "run",
            "whole reply, seconds",
            "over dense",
            "first token, seconds",
            "second token, seconds",
            "computed in prefill",
            "computed, whole reply",
            "each once",
        ],
        rows=rows,
        records=[asdict(entry) for entry in entries],
        notes=[_goal(f"{EVERYTHING_REVIVED}: whole reply over dense", worst.reply_ratio.median, most=REVIVAL_GOAL)],
    )


# -- writing -----------------------------------------------------------------------------------------


def save_sections(sections: Sequence[Part], folder: Path, *, environment: Mapping[str, Any]) -> tuple[Path, Path]:
    """Writes `limits.json` and `limits.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "limits.json"
    content = {"version": 1, "environment": dict(environment), "sections": [asdict(section) for section in sections]}
    data.write_text(json.dumps(content, indent=2))
    return data, save_page(sections, folder / "limits.md")


def _field(setup: Setup, configs: Mapping[str, LazyConfig]) -> list[TimedRun]:
    return [
        StockRun(setup.model, KERNEL),
        *(LazyRun(setup.model, name, config) for name, config in configs.items()),
    ]


def _goal(what: str, value: float, *, least: float | None = None, most: float | None = None) -> str:
    met = (least is None or value >= least) and (most is None or value <= most)
    bound = f"at least {least}" if least is not None else f"at most {most}"
    return f"Goal, {bound}: {what} is {value:.3f}, {'met' if met else 'missed'}."


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f}"
