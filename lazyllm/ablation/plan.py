"""What a study comes to: its items, the address of every unit, and the groups that are still to be done."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lazyllm.ablation.cells import LAYOUTS, Cell, stock_cells
from lazyllm.ablation.models import Loaded, Shelf, identity_of
from lazyllm.ablation.study import Study
from lazyllm.ablation.units import Group, Record, Unit, address, best_of, results_of, timed_together
from lazyllm.config import LazyConfig
from lazyllm.errors import ConfigError, InputError
from lazyllm.evaluation.digest import digest
from lazyllm.evaluation.tasks import Item, Maker, make_items
from lazyllm.pipeline import LazyPipeline

VERSION = 1
"""Of what a plan's file holds."""


@dataclass(frozen=True)
class Place:
    """Where a unit stands in the results.

    Attributes:
        cell: its name.
        task, index: the how many-th item of which task.
        item: digest of the item.
        address, stock: of the unit, and of the unmodified model's on the same item.
    """

    cell: str
    task: str
    index: int
    item: str
    address: str
    stock: str


@dataclass(frozen=True)
class CellFacts:
    """A cell as results tell of it: its name, axis labels, setting and configuration as plain data."""

    name: str
    labels: Mapping[str, str]
    setting: Mapping[str, Any]
    config: Mapping[str, Any] | None

    @property
    def is_stock(self) -> bool:
        """Whether it is the unmodified model."""
        return self.config is None


@dataclass(frozen=True)
class Plan:
    """What a study runs, as far as results need it; it can be written down.

    Attributes:
        name: of the study.
        cells: by name, the unmodified model's first.
        places: every unit of every cell.
        notices: what is odd.
    """

    name: str
    cells: Mapping[str, CellFacts]
    places: Sequence[Place]
    notices: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "version": VERSION,
            "name": self.name,
            "cells": [asdict(cell) for cell in self.cells.values()],
            "places": [list(vars(place).values()) for place in self.places],
            "notices": list(self.notices),
        }

    @classmethod
    def of(cls, data: Mapping[str, Any], source: str) -> Plan:
        """The plan that `to_dict` wrote.

        Raises:
            InputError: when it is none, or of another version.
        """
        try:
            if data["version"] != VERSION:
                raise InputError(f"the plan in {source} is of version {data['version']!r}, not {VERSION}")
            cells = {fields["name"]: CellFacts(**fields) for fields in data["cells"]}
            return cls(data["name"], cells, [Place(*values) for values in data["places"]], data["notices"])
        except (KeyError, TypeError) as error:
            raise InputError(f"{source} holds no plan of a study: {error}") from None


@dataclass(frozen=True)
class Work:
    """A plan with what is needed to do it.

    Attributes:
        plan: what results need.
        cells: the cells themselves, the unmodified model's first.
        items: by digest.
    """

    plan: Plan
    cells: Mapping[str, Cell]
    items: Mapping[str, Item]

    def contents(self) -> dict[str, dict[str, Any]]:
        """The items as plain data."""
        return {name: asdict(item) for name, item in self.items.items()}

    def groups(self, records: Iterable[Record], *, retry: bool, retime: bool, seed: int) -> list[Group]:
        """What is to be done, item by item, the models one after the other; the order within them goes by the seed.

        Args:
            records: what came of units so far.
            retry: whether what failed is done again.
            retime: whether what ran apart from the unmodified model is done again beside it.
            seed: of the order.
        """
        records = list(records)
        known, results = best_of(records), results_of(records)
        todo: dict[str, dict[str, Place]] = {}
        for place in self.plan.places:
            record, own, stock = known.get(place.address), results[place.address], results[place.stock]
            is_apart = retime and own and stock and timed_together(own, stock) is None
            if record is None or (retry and not record.is_done) or is_apart:
                todo.setdefault(place.stock, {}).setdefault(place.address, place)
        rng = random.Random(f"{seed} order")
        stocks = list(todo)
        rng.shuffle(stocks)
        groups = [self._group(stock, todo[stock], known.get(stock), retime, rng) for stock in stocks]
        order = list(dict.fromkeys(cell.setting.ref for cell in self.cells.values()))
        return sorted(groups, key=lambda group: order.index(group.ref))

    def _group(
        self, stock: str, places: Mapping[str, Place], known: Record | None, retime: bool, rng: random.Random
    ) -> Group:
        units = [Unit(name, place.cell, self.cells[place.cell].config) for name, place in sorted(places.items())]
        rng.shuffle(units)
        units.sort(key=lambda unit: unit.address != stock)
        one = next(iter(places.values()))
        item, verdict = self.items[one.item], None if known is None else known.verdict
        return Group(
            ref=self.cells[one.cell].setting.ref,
            item=item,
            digest=one.item,
            units=tuple(units),
            stock=stock,
            retimes=retime and verdict is not None,
            reply=() if verdict is None or item.reference else tuple(verdict["reference"]),
        )


def make_work(study: Study, shelf: Shelf) -> Work:
    """Loads each model once, makes the items, and checks that every configuration fits.

    Raises:
        ConfigError: when a configuration does not fit its model.
        InputError: when a model cannot be loaded, or a task has no data here.
    """
    own = study.all_cells()
    cells = [*stock_cells(own), *own]
    places: list[Place] = []
    items: dict[str, Item] = {}
    notices: dict[str, None] = dict.fromkeys(study.notices())
    for ref in dict.fromkeys(cell.setting.ref for cell in cells):
        maker = _Addresses(shelf.get(ref))
        for cell in (cell for cell in cells if cell.setting.ref == ref):
            places += maker.places(cell, items)
        notices |= maker.notices
    return Work(
        Plan(study.name, {cell.name: _facts(cell) for cell in cells}, places, list(notices)),
        {cell.name: cell for cell in cells},
        items,
    )


def _facts(cell: Cell) -> CellFacts:
    config = None if cell.config is None else cell.config.to_dict()
    return CellFacts(cell.name, dict(cell.labels), cell.setting.to_dict(), config)


class _Addresses:
    """The items of one model's settings, and the addresses of their units."""

    def __init__(self, loaded: Loaded) -> None:
        self._loaded, self._identity = loaded, loaded.identity
        self._made: dict[tuple[Any, ...], list[tuple[str, Item]]] = {}
        self.notices: dict[str, None] = {}

    def places(self, cell: Cell, items: dict[str, Item]) -> Iterator[Place]:
        """The units of a cell; their items are added to `items`."""
        identity = self._identity + (() if cell.config is None else self._drafts(cell.name, cell.config))
        for task, count in cell.setting.tasks:
            for index, (name, item) in enumerate(self._items(cell, task, count)):
                items[name] = item
                own = address(name, cell.config, identity)
                yield Place(cell.name, task, index, name, own, address(name, None, self._identity))

    def _drafts(self, name: str, config: LazyConfig) -> tuple[Any, ...]:
        """What identifies the other models that a cell's scorers ask.

        Raises:
            ConfigError: when the configuration does not fit the model.
        """
        try:
            pipe = LazyPipeline.from_config(config, self._loaded.model, self._loaded.tokenizer)
        except ConfigError as error:
            raise ConfigError(f"cell {name!r}: {error}") from None
        return tuple(identity_of(one.model, one.tokenizer) for path, one in pipe.readers.items() if path is not None)

    def _items(self, cell: Cell, task: str, count: int) -> list[tuple[str, Item]]:
        setting = cell.setting
        key = (task, count, setting.tokens, setting.question, setting.seed)
        if key not in self._made:
            maker = Maker(self._loaded.tokenizer, setting.tokens, LAYOUTS[setting.question])
            made = [
                replace(item, waits=setting.question == "later")
                for item in make_items(task, maker, count, seed=setting.seed)
            ]
            different = {digest(item, letters=16): item for item in made}
            if len(different) < count:
                told = f"{task} has {len(different)} different items for seed {setting.seed}, not {count}"
                self.notices[f"{told}: an item counts once"] = None
            self._made[key] = list(different.items())
        return self._made[key]
