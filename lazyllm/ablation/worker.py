"""Does one group after the other, in whatever process it lives."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from typing import Any

from lazyllm.ablation.cells import ModelRef
from lazyllm.ablation.models import Load, Loaded, Shelf
from lazyllm.ablation.units import Group, Record, Unit
from lazyllm.config import LazyConfig
from lazyllm.errors import InputError
from lazyllm.evaluation.digest import digest
from lazyllm.evaluation.quality import STOCK, Contender, DenseRun, Verdict, dense_run, judge, judge_and_run
from lazyllm.evaluation.tasks import Item
from lazyllm.pipeline import LazyPipeline


class Unloadable(InputError):
    """A worker could not load a model; another one may."""


@dataclass(frozen=True)
class Job:
    """What a worker is told once: the run it belongs to, its own name, and how models are loaded."""

    run: str
    name: str
    load: Load | None = None
    threads: int | None = None


class _Dense:
    """The unmodified model's run of an item, made once, for whoever is compared with it."""

    def __init__(self, stock: Contender, item: Item) -> None:
        self.stock, self.item = stock, item
        self._run: DenseRun | None = None
        self._failure: str | None = None

    def judged(self, reference: Sequence[int] | None) -> Verdict:
        """The verdict on it, given the tokens to force where they are not its own; its run is kept."""
        verdict, self._run = judge_and_run(self.stock, self.item, reference=reference)
        return verdict

    def run(self, *, is_needed: bool) -> DenseRun | None:
        """What others are compared with; None where the unmodified model fails and that does not stop them.

        Raises:
            InputError: when it fails and its reply is the reference.
        """
        if self._run is None and self._failure is None:
            try:
                self._run = dense_run(self.stock, self.item)
            except Exception as error:
                self._failure = _told(error)
        if self._run is None and is_needed:
            raise InputError(
                f"the unmodified model failed on this item, and its reply is the reference: {self._failure}"
            )
        return self._run


class Worker:
    """Judges every unit of a group and gives each record as soon as it is there."""

    def __init__(self, job: Job, shelf: Shelf | None = None) -> None:
        self.job = job
        self._shelf = shelf or Shelf(job.load)
        self._sequence = count()
        self._ref: ModelRef | None = None
        self._contenders: dict[str, Contender] = {}

    def work(self, group: Group) -> Iterator[Record]:
        """The records of a group. A unit that fails is one of them.

        Raises:
            Unloadable: when its model cannot be loaded here.
        """
        try:
            loaded = self._shelf.get(group.ref)
        except InputError as error:
            raise Unloadable(str(error)) from error
        if self._ref != group.ref:
            self._ref, self._contenders = group.ref, {}
        dense = _Dense(self._contender(loaded, None), group.item)
        if group.retimes and group.stock not in {unit.address for unit in group.units}:
            yield self._record(loaded, group, Unit(group.stock, STOCK, None), dense)
        for unit in group.units:
            yield self._record(loaded, group, unit, dense)

    def _record(self, loaded: Loaded, group: Group, unit: Unit, dense: _Dense) -> Record:
        begun = Record(
            unit.address, group.item.task, group.digest, unit.cell, self.job.run, self.job.name, platform.node(),
            next(self._sequence),
        )  # fmt: skip
        try:
            return replace(begun, verdict=self._judged(loaded, group, unit, dense))
        except Exception as error:  # a failing unit is a result, and the others go on
            return replace(begun, error=_told(error))

    def _judged(self, loaded: Loaded, group: Group, unit: Unit, dense: _Dense) -> dict[str, Any]:
        """The verdict as plain data."""
        item, reference = group.item, list(group.reply) or None
        if unit.config is None:
            verdict = asdict(dense.judged(reference))
        else:
            run = dense.run(is_needed=not (item.reference or reference))
            if run is not None and not item.reference:
                reference = reference or run.reply
            verdict = asdict(judge(self._contender(loaded, unit.config), item, reference=reference, dense=run))
        if not math.isfinite(verdict["loss"]):
            raise InputError(f"the loss of the reference is {verdict['loss']}")
        json.dumps(verdict, allow_nan=False)
        return verdict

    def _contender(self, loaded: Loaded, config: LazyConfig | None) -> Contender:
        """A pipeline is made once for each configuration, since it may compile layers or open other models."""
        key = STOCK if config is None else digest(config)
        if key not in self._contenders:
            own = LazyConfig.preset("dense") if config is None else config
            pipe = LazyPipeline.from_config(own, loaded.model, loaded.tokenizer)
            self._contenders[key] = Contender(pipe, key, is_stock=config is None)
        return self._contenders[key]


def _told(error: Exception) -> str:
    """The kind of an error and its first line."""
    reason = next(iter(str(error).strip().splitlines()), "")
    kind = type(error).__name__
    return f"{kind}: {reason}" if reason else kind
