"""What a generation returns: text, tokens, and what it cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lazyllm.callbacks import Callback, LayerEnd, PrefillStart, RowTrace, StepEnd
from lazyllm.models.flops import FlopModel, causal_pairs


class LayerTokens(NamedTuple):
    """Token counts of one layer in one step."""

    visible: int
    computed: int
    revived: int


@dataclass(frozen=True)
class GenerationStats:
    """Cost of one generation. Layer-tokens are (layer, token) pairs.

    Beams and several replies to one prompt are counted together. What they have in common is computed once, and counts
    once beside a dense run that computes it for each.

    Attributes:
        layers: number of layers.
        prompt_tokens, new_tokens: length of the prompt and of the reply.
        reused_tokens: how many of the prompt's tokens the cache held when the call began.
        ttft_seconds: from the call to the first new token, tokenisation included.
        seconds_per_output_token: mean time from one new token to the next; None for a single one.
        computed_fraction: layer-tokens computed / layer-tokens of a dense run over this call's new tokens; reviving
            tokens of an earlier call is this call's work, so a follow-up may exceed 1.
        prefill_computed_fraction: the same for the prefill steps alone.
        revived_tokens: layer-tokens computed after the first prefill step for tokens of earlier steps.
        tokens_per_layer: by step, by layer, counts of visible, computed and revived tokens.
        prefill_steps: how many of the steps were prefill.
        flops, dense_flops: operations done, and of a dense run over the same tokens.
        reading_flops: those of `flops` that language models did for a scorer; 0 for scorers that name none.
        predicted_speedup: dense over actual operations of the prefill steps.
        kv_bytes, aux_bytes: bytes of K/V and of frontier states held at the end, whole batch.
        peak_bytes: peak of the device's allocated memory on CUDA, else of the process's resident memory.
    """

    layers: int
    prompt_tokens: int
    new_tokens: int
    ttft_seconds: float
    seconds_per_output_token: float | None
    computed_fraction: float
    prefill_computed_fraction: float
    revived_tokens: int
    tokens_per_layer: list[list[LayerTokens]]
    prefill_steps: int
    flops: int
    reading_flops: int
    dense_flops: int
    predicted_speedup: float
    kv_bytes: int
    aux_bytes: int
    peak_bytes: int
    reused_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        data = asdict(self)
        data["tokens_per_layer"] = [[layer._asdict() for layer in step] for step in self.tokens_per_layer]
        return data

    def to_json(self) -> str:
        """The statistics as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def plot(self, path: str | Path) -> Path:
        """Draws the share of context tokens computed so far, per layer band over steps (the paper's Figure 7)."""
        from lazyllm.evaluation.plots import plot_computed_tokens

        return plot_computed_tokens(self, path)


@dataclass(frozen=True)
class GenerationResult:
    """One reply.

    Attributes:
        text: the new tokens as text; "" without a tokenizer.
        token_ids: the new tokens, the end token included, padding not.
        stats: what they cost.
        output: transformers' own output object when `return_dict_in_generate=True` was asked for.
    """

    text: str
    token_ids: list[int]
    stats: GenerationStats
    output: Any = None


class Clock(Protocol):
    """When new tokens came: the time of the first, and the mean from one to the next."""

    @property
    def times(self) -> Sequence[float]:
        """A reading whenever tokens came."""

    @property
    def seconds_per_token(self) -> float | None:
        """Mean time from one token to the next; None for a single one."""


@dataclass
class StepCount:
    """What one row did in one step, as numbers."""

    is_prefill: bool
    new_tokens: int = 0
    context_tokens: int = 0
    layers: list[LayerTokens] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)


class StepRecorder(Callback):
    """Counts what every row computes; the source of `GenerationStats`.

    Attributes:
        windows: sliding window of each layer in tokens; None = full attention.
        steps: by step, by row, what was counted.
        has_begun: whether the model has run.
        kv_bytes, aux_bytes: what the cache holds after the latest step.
        reading_flops: operations that language models did for scorers.
    """

    def __init__(self, windows: Sequence[int | None]) -> None:
        self.windows = windows
        self.steps: list[list[StepCount]] = []
        self.has_begun = False
        self.kv_bytes = self.aux_bytes = self.reading_flops = 0
        self._open: list[StepCount] = []

    @property
    def rows(self) -> int:
        """How many rows the batch has."""
        return len(self.steps[0]) if self.steps else 0

    def on_prefill_start(self, event: PrefillStart) -> None:
        """Forgets the layers of a step that failed."""
        self._open, self.has_begun = [], True

    def on_layer_end(self, event: LayerEnd) -> None:
        """Counts one layer."""
        if event.layer == 0:
            self._open = [StepCount(event.is_prefill) for _ in event.rows]
        for count, row in zip(self._open, event.rows, strict=True):
            revived = 0 if row.shared else row.revived.numel()
            count.layers.append(LayerTokens(row.visible.numel(), row.work, revived))
            count.pairs.append(0 if row.shared else _pairs(row, self.windows[event.layer]))

    def on_step_end(self, event: StepEnd) -> None:
        """Closes the step."""
        for count, new, context in zip(self._open, event.new_tokens, event.context_tokens, strict=True):
            count.new_tokens, count.context_tokens = new, context
        self.steps.append(self._open)
        self._open = []
        self.kv_bytes, self.aux_bytes = event.kv_bytes, event.aux_bytes


def _pairs(row: RowTrace, window: int | None) -> int:
    """(query, key) pairs the kernel works on: half a square without a mask, the whole rectangle with one."""
    queries, keys = row.computed.numel(), row.attended.numel()
    return causal_pairs(queries, window) if queries == keys else queries * keys


class Lengths(NamedTuple):
    """Tokens of a prompt, how many of them a cache held before, and tokens of the reply."""

    prompt: int
    reused: int
    new: int


def make_stats(
    steps: list[list[StepCount]],
    costs: FlopModel,
    recorder: StepRecorder,
    *,
    lengths: Lengths,
    clock: Clock,
    started: float,
    peak_bytes: int,
) -> GenerationStats:
    """Statistics of the rows in `steps` (by row, by step)."""
    layers = len(costs.per_token)
    prefill = [step for row in steps for step in row if step.is_prefill]
    done, dense = step_flops(prefill, costs, recorder.windows)
    everything = [step for row in steps for step in row]
    flops, dense_flops = step_flops(everything, costs, recorder.windows)
    merged = [_sum_rows(rows) for rows in zip(*steps, strict=True)]
    reading = recorder.reading_flops * len(steps) // recorder.rows if recorder.rows else 0
    return GenerationStats(
        layers=layers,
        prompt_tokens=lengths.prompt,
        reused_tokens=lengths.reused,
        new_tokens=lengths.new,
        ttft_seconds=clock.times[0] - started,
        seconds_per_output_token=clock.seconds_per_token,
        computed_fraction=_computed_fraction(everything, layers),
        prefill_computed_fraction=_computed_fraction(prefill, layers),
        revived_tokens=sum(layer.revived for step in everything for layer in step.layers),
        tokens_per_layer=merged,
        prefill_steps=sum(step.is_prefill for step in steps[0]),
        flops=flops + reading,
        reading_flops=reading,
        dense_flops=dense_flops,
        predicted_speedup=_ratio(dense, done + reading),
        kv_bytes=recorder.kv_bytes,
        aux_bytes=recorder.aux_bytes,
        peak_bytes=peak_bytes,
    )


def _sum_rows(rows: Sequence[StepCount]) -> list[LayerTokens]:
    return [
        LayerTokens(*map(sum, zip(*layer, strict=True))) for layer in zip(*(row.layers for row in rows), strict=True)
    ]


def _computed_fraction(steps: list[StepCount], layers: int) -> float:
    return _ratio(
        sum(layer.computed for step in steps for layer in step.layers), sum(step.new_tokens for step in steps) * layers
    )


def step_flops(steps: Sequence[StepCount], costs: FlopModel, windows: Sequence[int | None]) -> tuple[int, int]:
    """Operations that steps did, and those of dense steps over the same tokens."""
    return sum(_flops(step, costs) for step in steps), sum(_dense_flops(step, costs, windows) for step in steps)


def _flops(step: StepCount, costs: FlopModel) -> int:
    return costs.total([count.computed for count in step.layers], step.pairs) + costs.per_logits * bool(step.new_tokens)


def _dense_flops(step: StepCount, costs: FlopModel, windows: Sequence[int | None]) -> int:
    before = step.context_tokens - step.new_tokens
    pairs = [causal_pairs(step.context_tokens, window) - causal_pairs(before, window) for window in windows]
    return costs.total([step.new_tokens] * len(pairs), pairs) + costs.per_logits * bool(step.new_tokens)


def _ratio(above: float, below: float) -> float:
    return above / below if below else 1.0
