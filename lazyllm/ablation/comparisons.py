"""Is a cell worse than the unmodified model, or than another cell? One family of paired tests per study."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lazyllm.errors import InputError, unknown
from lazyllm.evaluation.quality import Verdict
from lazyllm.evaluation.statistics import MARGIN, Comparison, Paired, compare_pairs

if TYPE_CHECKING:
    from lazyllm.ablation.results import Results


@dataclass(frozen=True)
class Compared:
    """A value of a verdict that cells are compared by.

    Attributes:
        read: the value; None where the verdict has none.
        margin: by how much a cell may be worse and still count as no worse, unless another one is asked for.
        lower_is_better: whether less of it is better.
        unit: what it is counted in.
    """

    read: Callable[[Verdict], float | None]
    margin: float
    lower_is_better: bool = False
    unit: str = "score, 0 to 1"


VALUES: dict[str, Compared] = {
    "score": Compared(lambda verdict: verdict.score, MARGIN),
    "loss": Compared(lambda verdict: verdict.loss, 0.05, lower_is_better=True, unit="nats per answer token"),
}
"""By name, what cells can be compared by."""


def comparisons(
    results: Results, *, by: str = "score", margin: float | None = None, against: str | None = None
) -> list[Comparison]:
    """Every cell against the unmodified model, or another one, on every task, adjusted for their number.

    Cells are compared on the items that both have: where settings differ, each with the baseline under its own.

    Args:
        results: of a study.
        by: "score" or "loss".
        margin: by how much a cell may be worse; two points of a score, .05 nats of a loss unless given.
        against: name of a cell; the unmodified model without it.

    Raises:
        InputError: for an unknown value or cell, a negative margin, and where nothing can be compared yet.
    """
    if by not in VALUES:
        raise InputError(unknown("value", by, VALUES))
    if against is not None and against not in results.plan.cells:
        raise InputError(unknown("cell", against, results.plan.cells))
    value = VALUES[by]
    found = compare_pairs(_pairs(results, value, against), margin=value.margin if margin is None else margin)
    if not found:
        raise InputError(f"no two cells have a {by} on the same item, so there is nothing to compare yet")
    return found


Values = dict[str, float | None]
"""By item, a value; None where there is none yet."""


@dataclass
class _Shelf:
    """What is compared with each other: values of the baseline, and of every other cell."""

    baseline: Values = field(default_factory=dict)
    cells: dict[str, Values] = field(default_factory=dict)


def _pairs(results: Results, value: Compared, against: str | None) -> Iterator[Paired]:
    """Every cell beside the baseline, on the items of both; cells without a pair are left out."""
    for name, shelf in _shelves(results, value, against).items():
        for cell, own in shelf.cells.items():
            both = [(own[item], theirs) for item, theirs in shelf.baseline.items() if item in own]
            if any(None not in pair for pair in both):
                mine, theirs = zip(*both, strict=True)
                yield Paired(name, cell, mine, theirs, value.lower_is_better)


def _shelves(results: Results, value: Compared, against: str | None) -> dict[str, _Shelf]:
    """By task and setting, the values of all cells."""
    found: dict[str, _Shelf] = {}
    for place in results.plan.places:
        cell, verdict = results.plan.cells[place.cell], results.verdict(place)
        shelf = found.setdefault(_name(results, place.task, cell.setting), _Shelf())
        is_baseline = cell.is_stock if against is None else place.cell == against
        values = shelf.baseline if is_baseline else shelf.cells.setdefault(place.cell, {})
        values[place.item] = None if verdict is None else value.read(verdict)
    return found


def _name(results: Results, task: str, setting: Mapping[str, object]) -> str:
    """The task, with what tells its setting apart where there are several."""
    settings = [cell.setting for cell in results.plan.cells.values() if cell.is_stock]
    varied = [name for name, value in setting.items() if any(other[name] != value for other in settings)]
    return ", ".join([task, *(f"{name}={setting[name]}" for name in varied)])
