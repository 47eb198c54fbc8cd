"""The unit of a study is one item of one cell. Its address is made of all that determines its result."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any

import torch
import transformers

import lazyllm
from lazyllm.ablation.cells import ModelRef
from lazyllm.config import LazyConfig
from lazyllm.evaluation.digest import digest
from lazyllm.evaluation.tasks import Item

MEASUREMENT = 1
"""Of what a verdict means; a higher one computes everything anew."""
LETTERS = 24
"""Of an address."""


@cache
def versions() -> tuple[str, ...]:
    """Of everything that may change a result."""
    return str(MEASUREMENT), lazyllm.__version__, torch.__version__, transformers.__version__


def address(item: str, config: LazyConfig | None, identity: tuple[Any, ...]) -> str:
    """Where a unit's result is found.

    Args:
        item: digest of the item.
        config: what runs; None for the unmodified model.
        identity: of the model.
    """
    return digest([*versions(), *identity, item, "stock" if config is None else digest(config)], letters=LETTERS)


@dataclass(frozen=True)
class Unit:
    """One item of one cell: its address, the cell's name, and what runs; None for the unmodified model."""

    address: str
    cell: str
    config: LazyConfig | None


@dataclass(frozen=True)
class Record:
    """What came of a unit.

    Attributes:
        address, task, item, cell: of the unit.
        run, worker, host: where it ran; times are compared within one worker of one run only.
        sequence: the how many-th it was there, from 0.
        verdict: the fields of a `Verdict`; None when it failed.
        error: why it failed.
    """

    address: str
    task: str
    item: str
    cell: str
    run: str
    worker: str
    host: str
    sequence: int
    verdict: Mapping[str, Any] | None = None
    error: str | None = None

    @property
    def is_done(self) -> bool:
        """Whether there is a result."""
        return self.verdict is not None

    @property
    def place(self) -> tuple[str, str]:
        """Records of one place may be compared in time."""
        return self.run, self.worker


def best_of(records: Iterable[Record]) -> dict[str, Record]:
    """By address, the first result; the last failure where there is none."""
    found: dict[str, Record] = {}
    for record in records:
        if record.address not in found or not found[record.address].is_done:
            found[record.address] = record
    return found


def results_of(records: Iterable[Record]) -> defaultdict[str, list[Record]]:
    """By address, every result, repetitions included; nothing for what failed."""
    found: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record.is_done:
            found[record.address].append(record)
    return found


def timed_together(own: Iterable[Record], stock: Iterable[Record]) -> tuple[Record, Record] | None:
    """The first two results of one place, whose times may be compared; None where there are no such two."""
    return next(((one, other) for one, other in product(own, stock) if one.place == other.place), None)


@dataclass(frozen=True)
class Group:
    """What is to be done with one item, by one worker, in this order: the unmodified model, then the others.

    Attributes:
        ref: the model.
        item: what is judged.
        digest: of the item.
        units: what is missing.
        stock: address of the unmodified model's unit.
        retimes: whether the unmodified model runs again for its times, though its result is known.
        reply: what the unmodified model replied before, where that is the reference: another machine might say
            something else, and losses are compared along the same tokens.
    """

    ref: ModelRef
    item: Item
    digest: str
    units: tuple[Unit, ...]
    stock: str
    retimes: bool = False
    reply: tuple[int, ...] = ()

    def after(self, record: Record) -> Group:
        """What is left once a unit's result is there."""
        left = tuple(unit for unit in self.units if unit.address != record.address)
        is_stock, reply = record.address == self.stock, self.reply
        if is_stock and record.verdict is not None and not (reply or self.item.reference):
            reply = tuple(record.verdict["reply"])
        return replace(self, units=left, retimes=self.retimes and not is_stock, reply=reply)

    def failed(self, unit: Unit, reason: str, run: str, worker: str) -> Record:
        """The record of a unit that never ran."""
        return Record(unit.address, self.item.task, self.digest, unit.cell, run, worker, "", -1, error=reason)
