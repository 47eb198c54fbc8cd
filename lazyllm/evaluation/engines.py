"""Engines side by side on the same prompts: what each took, and how much of the unmodified model's reply it gave."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lazyllm.errors import EngineError
from lazyllm.evaluation.bench import Spread, TimedRun, Timing, preset_config, spread_of_known
from lazyllm.evaluation.sections import Section, bold, conditions, in_rounds, length_range, times

IN_CONDITIONS = ("layers", "device", "threads")
"""What a section says of the environment by itself."""


@dataclass(frozen=True)
class Entrant:
    """Someone to be timed, and what it runs on.

    Attributes:
        timed: it, under a name of its own.
        engine: the program.
        run: what it does there, e.g. a preset or a file type.
        dtype: of the weights.
    """

    timed: TimedRun
    engine: str
    run: str
    dtype: str


@dataclass(frozen=True)
class EngineLine:
    """One entrant at one prompt length.

    Attributes:
        engine, run, dtype: as in `Entrant`.
        prompt_tokens, new_tokens: lengths.
        ttft_seconds, seconds_per_output_token: over the rounds; None when there is none.
        ttft_speedup, decode_speedup: the baseline's median over this one's.
        computed_fraction: share of the prompt's layer-tokens that prefill computes.
        kept_fraction: share of the prompt's K/V that is kept after prefill.
        same_tokens: how many tokens of its reply equal the baseline's, from the first on.
        is_baseline: whether this is the fastest unmodified run of transformers.
        ttft_samples: by round.
        error: why there is no figure.
    """

    engine: str
    run: str
    dtype: str
    prompt_tokens: int
    new_tokens: int
    ttft_seconds: Spread | None = None
    seconds_per_output_token: Spread | None = None
    ttft_speedup: float | None = None
    decode_speedup: float | None = None
    computed_fraction: float | None = None
    kept_fraction: float | None = None
    same_tokens: int | None = None
    is_baseline: bool = False
    ttft_samples: tuple[float, ...] = ()
    error: str | None = None

    @property
    def name(self) -> str:
        """Engine, run and dtype."""
        return f"{self.engine} {self.run}, {self.dtype}"


@dataclass(frozen=True)
class EngineReport:
    """Lines, and what they were taken on.

    Attributes:
        model: name of the weights.
        rounds: of every engine.
        command: what was called.
        environment: versions and the machine, as `bench.environment` tells them.
        lines: results.
    """

    model: str
    rounds: int
    command: str
    environment: Mapping[str, Any]
    lines: Sequence[EngineLine]

    def save(self, path: Path) -> Path:
        """Writes it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"version": 1, **asdict(self)}, indent=2))
        return path


def line_up(
    entrants: Sequence[Entrant],
    timings: Mapping[str, Sequence[Timing]],
    errors: Mapping[str, EngineError],
    prompt_tokens: int,
    new_tokens: int,
) -> list[EngineLine]:
    """One line per entrant; speedups are over the unmodified run with the shortest median TTFT, where one ran."""
    first = {name: Spread.of([timing.ttft_seconds for timing in runs]) for name, runs in timings.items()}
    further = {
        name: spread_of_known([timing.seconds_per_output_token for timing in runs]) for name, runs in timings.items()
    }
    stock = [entry.timed for entry in entrants if entry.timed.is_stock and entry.timed.name in first]
    base = min(stock, key=lambda timed: first[timed.name].median, default=None)

    def one(entry: Entrant) -> EngineLine:
        name = entry.timed.name
        same = (entry.engine, entry.run, entry.dtype, prompt_tokens, new_tokens)
        if name not in first:
            return EngineLine(*same, error=str(errors[name]))
        return EngineLine(
            *same,
            ttft_seconds=first[name],
            seconds_per_output_token=further[name],
            ttft_speedup=_ratio(first[base.name], first[name]) if base is not None else None,
            decode_speedup=_ratio(further[base.name], further[name]) if base is not None else None,
            computed_fraction=entry.timed.mean(lambda stats: stats.prefill_computed_fraction),
            kept_fraction=entry.timed.kept_fraction,
            same_tokens=_equal_from_start(base.replies[0], entry.timed.replies[0]) if base is not None else None,
            is_baseline=entry.timed is base,
            ttft_samples=tuple(timing.ttft_seconds for timing in timings[name]),
        )

    return [one(entry) for entry in entrants]


def section(report: EngineReport) -> Section:
    """The report as a table, the baselines bold."""
    lines = report.lines
    configs = {line.run: preset_config(line.run) for line in lines if line.engine == "lazyllm"}
    versions = [f"{name} {value}" for name, value in report.environment.items() if name not in IN_CONDITIONS]
    return Section(
        title=f"Engines side by side: {report.model}",
        conditions=conditions(
            report.model,
            ", ".join(dict.fromkeys(line.dtype for line in lines)),
            report.environment,
            configs,
            tokens=f"prompts of {length_range([line.prompt_tokens for line in lines])} tokens, replies of "
            f"{lines[0].new_tokens}",
            baseline="the fastest unmodified run of transformers at that length (bold)",
            measured=f"{in_rounds(report.rounds)}, one engine computing at a time",
            command=report.command,
        ),
        columns=[
            "prompt",
            "engine",
            "run",
            "dtype",
            "TTFT, seconds",
            "speedup",
            "ms per output token",
            "tokens per second",
            "speedup",
            "computed",
            "K/V kept",
            "same tokens",
        ],
        rows=[bold(_cells(line)) if line.is_baseline else _cells(line) for line in lines],
        notes=[
            "*computed*: of the prompt's layer-tokens; *same tokens*: how far a reply equals the baseline's. "
            f"{', '.join(versions)}.",
            *failures(report),
        ],
    )


def _cells(line: EngineLine) -> list[str]:
    what = [f"{line.prompt_tokens:,}", line.engine, line.run, line.dtype]
    if line.ttft_seconds is None:
        return [*what, "failed", *[""] * 7]
    per_token = line.seconds_per_output_token
    return [
        *what,
        line.ttft_seconds.show(2),
        times(line.ttft_speedup),
        per_token.show(0, factor=1000) if per_token else "",
        f"{1 / per_token.median:.1f}" if per_token else "",
        times(line.decode_speedup),
        f"{line.computed_fraction:.0%}",
        f"{line.kept_fraction:.0%}",
        "" if line.same_tokens is None else f"{line.same_tokens} of {line.new_tokens}",
    ]


def failures(report: EngineReport) -> list[str]:
    """Every reason why something has no figures, with those it holds for."""
    concerned: dict[str, list[str]] = {}
    for line in report.lines:
        if line.error is not None:
            concerned.setdefault(line.error, []).append(f"{line.name} at {line.prompt_tokens:,}")
    return [f"{'; '.join(lines)} failed: {error}" for error, lines in concerned.items()]


def _ratio(base: Spread | None, other: Spread | None) -> float | None:
    return base.median / other.median if base is not None and other is not None else None


def _equal_from_start(one: Sequence[int], other: Sequence[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
