"""What a study found: one row per unit, one line per cell and task."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazyllm.ablation.plan import CellFacts, Place, Plan
from lazyllm.ablation.store import look_into
from lazyllm.ablation.units import Record, best_of, results_of, timed_together
from lazyllm.errors import InputError
from lazyllm.evaluation.compare import Line, line_of
from lazyllm.evaluation.quality import Verdict
from lazyllm.extras import needed

if TYPE_CHECKING:
    import pandas

VERDICT = tuple(field.name for field in fields(Verdict))
WHERE = ("run", "worker", "host", "sequence")
"""Fields of a record that say where it ran."""
COLUMNS = {"cell", "task", "index", "state", "speedup", "error", "item", "address", *VERDICT, *WHERE}
"""What a row of units holds beside axes and settings; axes of these names are called `axis.NAME` there."""
Pair = tuple[Verdict, Verdict, bool]
"""A verdict, the unmodified model's on the same item, and whether their times may be compared."""


@dataclass(frozen=True)
class Status:
    """How far a cell is with a task: numbers of units."""

    cell: str
    task: str
    done: int
    failed: int
    missing: int


class Results:
    """A plan and what came of its units.

    Attributes:
        plan: cells and units.
        records: every result in the order it came, failures and repetitions among them.
        items: contents of the items, by digest.
        notices: what a reader should know: damaged lines, cells that are the same, times that cannot be compared.
    """

    def __init__(
        self,
        plan: Plan,
        records: Sequence[Record],
        items: Mapping[str, Mapping[str, Any]],
        notices: Sequence[str] = (),
    ) -> None:
        self.plan, self.records, self.items = plan, list(records), items
        self._best = best_of(self.records)
        self._all = results_of(self.records)
        self.notices = [*notices, *self._untimed()]

    @classmethod
    def load(cls, folder: str | Path) -> Results:
        """The results in a folder; it may still be growing.

        Raises:
            InputError: when it holds no study.
        """
        folder = Path(folder)
        kept = look_into(folder)
        if kept.plan is None:
            raise InputError(f"{str(folder)!r} holds no study")
        plan = Plan.of(kept.plan, repr(str(folder)))
        return cls(plan, kept.records, kept.items, [*kept.notices, *plan.notices])

    def record(self, place: Place) -> Record | None:
        """What came of a unit: its first result, its last failure where there is none, or nothing yet."""
        return self._best.get(place.address)

    def verdict(self, place: Place) -> Verdict | None:
        """The verdict on a unit, None where there is none."""
        record = self.record(place)
        return None if record is None or record.verdict is None else _verdict(record.verdict)

    def pair(self, place: Place) -> Pair | None:
        """A verdict, the unmodified model's on the same item, and whether their times may be compared.

        They may where both ran in one worker of one run. None where a verdict is missing.
        """
        own, stock = self._all[place.address], self._all[place.stock]
        if not (own and stock):
            return None
        one, other = timed_together(own, stock) or (own[0], stock[0])
        assert one.verdict is not None, "only results are paired"
        assert other.verdict is not None
        return _verdict(one.verdict), _verdict(other.verdict), one.place == other.place

    def pairs(self) -> Iterator[tuple[str, str, list[Pair]]]:
        """Task, cell and what is paired of it, for every cell with results, task by task."""
        for (task, cell), places in self._by_task_and_cell().items():
            found = [pair for place in places if (pair := self.pair(place)) is not None]
            if found:
                yield task, cell, found

    def lines(self) -> list[Line]:
        """Every cell with results against the unmodified model, task by task."""
        return list(self._lines)

    @cached_property
    def _lines(self) -> list[Line]:
        return [line_of(task, cell, *zip(*pairs, strict=True)) for task, cell, pairs in self.pairs()]

    def status(self) -> list[Status]:
        """How far each cell is with each task."""
        found = []
        for (task, cell), places in self._by_task_and_cell().items():
            records = [self.record(place) for place in places]
            done = sum(record is not None and record.is_done for record in records)
            missing = sum(record is None for record in records)
            found.append(Status(cell, task, done, len(records) - done - missing, missing))
        return found

    def failures(self) -> list[tuple[str, int]]:
        """Reasons for which units failed, and how many for each, the most frequent first."""
        failed = {place.address: self.record(place) for place in self.plan.places}
        return Counter(record.error for record in failed.values() if record and record.error).most_common()

    def rows(self) -> Iterator[dict[str, Any]]:
        """One mapping per unit: where it stands, what it ran under, what came of it."""
        axes = list(dict.fromkeys(axis for cell in self.plan.cells.values() for axis in cell.labels))
        for place in self.plan.places:
            cell, record = self.plan.cells[place.cell], self.record(place)
            verdict = dict(record.verdict or {}) if record else {}
            yield {
                "cell": place.cell,
                "task": place.task,
                "index": place.index,
                **{f"axis.{axis}" if axis in COLUMNS else axis: cell.labels.get(axis) for axis in axes},
                **{f"setting.{name}": value for name, value in cell.setting.items()},
                "state": "missing" if record is None else "done" if record.is_done else "failed",
                **dict.fromkeys(VERDICT),
                **verdict,
                "speedup": self._speedup(place, cell),
                "error": record.error if record else None,
                **{name: getattr(record, name, None) for name in WHERE},
                "item": place.item,
                "address": place.address,
            }

    def frame(self) -> pandas.DataFrame:
        """One row per unit.

        Raises:
            InputError: when pandas is not installed.
        """
        frame: pandas.DataFrame = needed("pandas", what="a frame", extra="eval").DataFrame(list(self.rows()))
        return frame

    def table(self) -> str:
        """The lines as Markdown."""
        from lazyllm.ablation.tables import markdown

        return markdown(self)

    def _by_task_and_cell(self) -> dict[tuple[str, str], list[Place]]:
        by_task: dict[str, dict[str, list[Place]]] = {}
        for place in self.plan.places:
            by_task.setdefault(place.task, {}).setdefault(place.cell, []).append(place)
        return {(task, cell): places for task, cells in by_task.items() for cell, places in cells.items()}

    def _speedup(self, place: Place, cell: CellFacts) -> float | None:
        pair = None if cell.is_stock else self.pair(place)
        if pair is None or not pair[2] or math.isclose(pair[0].ttft_seconds, 0):
            return None
        return pair[1].ttft_seconds / pair[0].ttft_seconds

    def _untimed(self) -> list[str]:
        pairs = [self.pair(place) for place in self.plan.places if not self.plan.cells[place.cell].is_stock]
        count = sum(pair is not None and not pair[2] for pair in pairs)
        if not count:
            return []
        return [
            f"{count} of {len(pairs)} units ran apart from the unmodified model, in another run or worker, so that "
            "their times are left out; --retime runs them once more beside it"
        ]


def _verdict(data: Mapping[str, Any]) -> Verdict:
    """The verdict with these fields; those it has never heard of are left out."""
    return Verdict(**{name: data[name] for name in VERDICT if name in data})
