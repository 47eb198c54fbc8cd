"""Hooks into a run: a base class whose methods do nothing, and two callbacks to use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from lazyllm.errors import InputError
from lazyllm.extras import needed

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from lazyllm.generation.result import GenerationResult


@dataclass(frozen=True)
class PrefillStart:
    """A forward call with many new tokens begins: how many per row, and the number of layers."""

    new_tokens: tuple[int, ...]
    layers: int


@dataclass(frozen=True)
class Choice:
    """What the tokens that enter a layer were chosen from.

    Attributes:
        candidates: [v] tokens that might have entered, ascending.
        scores: [v] what the scorer gave them, higher = keep.
        protected: [v] which of them are never left out.
    """

    candidates: Tensor
    scores: Tensor
    protected: Tensor


@dataclass(frozen=True)
class RowTrace:
    """One row at one layer, as token indices.

    Attributes:
        visible: [v] tokens selected to take part.
        computed: [q] tokens the layer computed.
        attended: [k] tokens whose K/V were attended, in storage order.
        first_new: index of the step's first new token.
        choice: how `visible` was chosen; None where no scorer was asked.
        shared: whether the row is still the same as one before it in the batch, where all this was done for both.
    """

    visible: Tensor
    computed: Tensor
    attended: Tensor
    first_new: int
    choice: Choice | None = None
    shared: bool = False

    @property
    def work(self) -> int:
        """How many tokens the layer computed for this row and no other."""
        return 0 if self.shared else self.computed.numel()

    @property
    def revived(self) -> Tensor:
        """[r] computed tokens that an earlier step had left behind."""
        return self.computed[self.computed < self.first_new]


@dataclass(frozen=True)
class PieceEnd:
    """A layer has computed some of its tokens: all of them, or `chunk` where there are more.

    Attributes:
        layer, layers: which layer, of how many.
        is_prefill: whether the step brings tokens of a prompt.
        tokens: how many tokens it has computed.
    """

    layer: int
    layers: int
    is_prefill: bool
    tokens: int


@dataclass(frozen=True)
class LayerEnd:
    """A layer has run."""

    layer: int
    layers: int
    is_prefill: bool
    rows: tuple[RowTrace, ...]


@dataclass(frozen=True)
class StepEnd:
    """A forward call is complete: tokens seen and brought per row, bytes the cache holds."""

    is_prefill: bool
    context_tokens: tuple[int, ...]
    new_tokens: tuple[int, ...]
    kv_bytes: int
    aux_bytes: int


@dataclass(frozen=True)
class GenerateEnd:
    """A call of `generate` is complete."""

    results: tuple[GenerationResult, ...]


class Callback:
    """Base of callbacks: override what you need.

    An exception raised in a hook ends the run; model and cache stay usable, and a step that was not
    complete leaves no trace.
    """

    def on_prefill_start(self, event: PrefillStart) -> None:
        """Called before the first layer of a prefill step."""

    def on_piece_end(self, event: PieceEnd) -> None:
        """Called whenever a layer has computed some of its tokens.

        The model may be used here for steps of other caches: attach it with `attached(inside=True)`.
        """

    def on_layer_end(self, event: LayerEnd) -> None:
        """Called after every layer of every step."""

    def on_step_end(self, event: StepEnd) -> None:
        """Called after every step, once the cache is final."""

    def on_generate_end(self, event: GenerateEnd) -> None:
        """Called once when `generate` or `stream` is done."""


class ProgressBar(Callback):
    """Shows how far a long prefill is, and the time left.

    Args:
        min_tokens: shorter prefills show nothing.
        console: where to draw; rich's shared console when none is given.

    Raises:
        MissingExtra: without rich.
    """

    def __init__(self, *, min_tokens: int = 512, console: Console | None = None) -> None:
        needed("rich", what="a progress bar", extra="cli")
        self.min_tokens = min_tokens
        self._console = console
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def on_prefill_start(self, event: PrefillStart) -> None:
        """Opens the bar."""
        tokens = sum(event.new_tokens)
        self.close()
        if tokens < self.min_tokens:
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("layer {task.completed}/{task.total}"),
            TimeRemainingColumn(), console=self._console,
        )  # fmt: skip
        self._progress.start()
        self._task = self._progress.add_task(f"prefill of {tokens:,} tokens", total=event.layers)

    def on_layer_end(self, event: LayerEnd) -> None:
        """Moves the bar by one layer."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task)

    def on_step_end(self, event: StepEnd) -> None:
        """Closes the bar."""
        self.close()

    def on_generate_end(self, event: GenerateEnd) -> None:
        """Closes the bar."""
        self.close()

    def close(self) -> None:
        """Takes the bar away; for a run that was interrupted, where no hook does it."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None


class TokenTrace(Callback):
    """Remembers who was visible, computed, attended and revived, at every layer of every step.

    Attributes:
        steps: by step, by layer, what every row did.
    """

    def __init__(self) -> None:
        self.steps: list[list[LayerEnd]] = []
        self._open: list[LayerEnd] = []

    def on_prefill_start(self, event: PrefillStart) -> None:
        """Forgets the layers of a step that failed."""
        self._open = []

    def on_layer_end(self, event: LayerEnd) -> None:
        """Notes one layer."""
        if event.layer == 0:
            self._open = []
        self._open.append(event)

    def on_step_end(self, event: StepEnd) -> None:
        """Closes the step."""
        self.steps.append(self._open)
        self._open = []

    def rows(self) -> Sequence[dict[str, Any]]:
        """One flat record per step, layer and row."""
        return [
            {
                "step": step,
                "layer": event.layer,
                "row": row,
                "prefill": event.is_prefill,
                "shared": trace.shared,
                "visible": trace.visible.tolist(),
                "computed": trace.computed.tolist(),
                "attended": trace.attended.tolist(),
                "revived": trace.revived.tolist(),
            }
            for step, events in enumerate(self.steps)
            for event in events
            for row, trace in enumerate(event.rows)
        ]

    def save(self, path: str | Path) -> Path:
        """Writes the trace as `.json` (records) or `.npz` (one array per step, layer, row and kind).

        Raises:
            InputError: for any other ending.
        """
        path = Path(path)
        records = self.rows()
        if path.suffix == ".json":
            path.write_text(json.dumps({"version": 1, "records": records}))
        elif path.suffix == ".npz":
            kinds = ("visible", "computed", "attended", "revived")
            arrays: dict[str, Any] = {
                f"step{record['step']}/layer{record['layer']}/row{record['row']}/{kind}": np.asarray(
                    record[kind], np.int64
                )
                for record in records
                for kind in kinds
            }
            np.savez_compressed(path, **arrays)
        else:
            raise InputError(f"a token trace is saved as .json or .npz, not {path.name!r}")
        return path


class PrefillShare(Callback):
    """Counts the layer-tokens that prefills compute, and those they would without pruning."""

    def __init__(self) -> None:
        self.computed = self.dense = 0

    def on_prefill_start(self, event: PrefillStart) -> None:
        """Counts what there is."""
        self.dense += event.layers * sum(event.new_tokens)

    def on_layer_end(self, event: LayerEnd) -> None:
        """Counts what is computed."""
        if event.is_prefill:
            self.computed += sum(row.work for row in event.rows)

    @property
    def fraction(self) -> float:
        """Computed of dense; 1 before the first prefill."""
        return self.computed / self.dense if self.dense else 1.0
