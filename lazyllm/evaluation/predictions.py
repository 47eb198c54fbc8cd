"""Predicted times to the first token beside measured ones."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from transformers import PreTrainedModel

from lazyllm.caches import AuxCache
from lazyllm.config import PAPER_STAGES, LazyConfig
from lazyllm.costs import Device, ModelShape, predict
from lazyllm.evaluation.bench import LazyRun, Spread, StockRun, TimedRun, Workload, run_rounds
from lazyllm.evaluation.sections import Section, conditions, in_rounds, length_range
from lazyllm.policies.schedules import Constant, Stages
from lazyllm.policies.scorers import LastTokenAttention, LateInteraction

STOCK_KERNEL = "sdpa"
REUSE = AuxCache(decode="reuse")
RUNS = {
    "dense": LazyConfig.preset("dense"),
    "static-pruning": LazyConfig.preset("static-pruning"),
    "Stages": LazyConfig(scorer=LastTokenAttention(), schedule=Stages(stages=PAPER_STAGES), cache=REUSE),
    "Constant(0.3)": LazyConfig(scorer=LastTokenAttention(), schedule=Constant(keep=0.3), cache=REUSE),
    "Constant(0.3), late interaction": LazyConfig(scorer=LateInteraction(), schedule=Constant(keep=0.3), cache=REUSE),
}


@dataclass(frozen=True)
class Check:
    """One run at one length.

    Attributes:
        model, run: names.
        prompt_tokens: length.
        predicted_seconds, measured_seconds: to the first token.
    """

    model: str
    run: str
    prompt_tokens: int
    predicted_seconds: float
    measured_seconds: Spread

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted_seconds / self.measured_seconds.median - 1


def check(name: str, model: PreTrainedModel, device: Device, prompt_tokens: int, rounds: int, seed: int) -> list[Check]:
    """Every run on one random prompt, in shuffled order round by round, against what the device's numbers say."""
    shape = ModelShape.of(model.config)
    order = random.Random(seed)
    prompt = [order.randrange(3, shape.vocabulary) for _ in range(prompt_tokens)]
    stock = StockRun(model, STOCK_KERNEL)
    field: list[TimedRun] = [stock, *(LazyRun(model, run, config) for run, config in RUNS.items())]
    timings = run_rounds(field, Workload([prompt], new_tokens=1), rounds, order)
    found = {run: predict(shape, config, device, tokens=prompt_tokens, asked=False) for run, config in RUNS.items()}
    expected = {run: prediction.pruned.ttft_seconds for run, prediction in found.items()}
    expected[stock.name] = found["dense"].dense.ttft_seconds
    return [
        Check(name, run, prompt_tokens, expected[run], Spread.of([timing.ttft_seconds for timing in timings[run]]))
        for run in timings
    ]


def errors_in_words(checks: Sequence[Check]) -> str:
    """Median and worst error."""
    errors = [abs(one.error) for one in checks]
    return f"median error {median(errors):.1%}, worst {max(errors):.1%}, of {len(errors)}"


def section(checks: Sequence[Check], environment: Mapping[str, Any], rounds: int, command: str) -> Section:
    """The checks of one model as a table."""
    return Section(
        title=f"Predicted and measured time to first token: {checks[0].model}",
        conditions=conditions(
            checks[0].model,
            "float32",
            environment,
            RUNS,
            tokens=f"random prompts of {length_range([one.prompt_tokens for one in checks])} tokens",
            baseline="the measured time",
            measured=in_rounds(rounds),
            command=command,
        ),
        columns=["prompt", "run", "predicted, seconds", "measured, seconds", "error"],
        rows=[
            [
                f"{one.prompt_tokens:,}",
                one.run,
                f"{one.predicted_seconds:.3f}",
                one.measured_seconds.show(3),
                f"{one.error:+.1%}",
            ]
            for one in checks
        ],
        notes=[f"{errors_in_words(checks).capitalize()}."],
    )
