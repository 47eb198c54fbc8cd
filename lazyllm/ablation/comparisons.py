"""Is a cell worse than the unmodified model, or than another cell? One family of paired tests per study."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lazyllm.errors import InputError, unknown
from lazyllm.evaluation.quality import Verdict
from lazyllm.evaluation.statistics import MARGIN, Comparison, compare_family

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


BASELINE = ""
"""Stands for the cell that others are compared with; no cell is called so."""


def comparisons(
    results: Results, *, by: str = "score", margin: float | None = None, against: str | None = None
) -> list[Comparison]:
    """Every cell against the unmodified model, or another one, on every task, adjusted for their number.

    Cells are compared on the same items: where settings differ, each with the baseline under its own.

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
    found = compare_family(
        _values(results, value, against),
        baseline=BASELINE,
        margin=value.margin if margin is None else margin,
        lower_is_better=value.lower_is_better,
    )
    if not found:
        raise InputError(f"no two cells have a {by} on the same item, so there is nothing to compare yet")
    return found


def _values(results: Results, value: Compared, against: str | None) -> dict[str, dict[str, Sequence[float | None]]]:
    """By task and setting, and by cell, a value per item; `BASELINE` holds those compared with."""
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for place in results.plan.places:
        verdict = results.verdict(place)
        read = None if verdict is None else value.read(verdict)
        cell = results.plan.cells[place.cell]
        shelf = found.setdefault(_shelf(results, place.task, cell.setting), {})
        is_baseline = cell.is_stock if against is None else place.cell == against
        shelf.setdefault(BASELINE if is_baseline else place.cell, {})[place.item] = read
    return {shelf: _paired(cells) for shelf, cells in found.items() if BASELINE in cells}


def _paired(cells: dict[str, dict[str, float | None]]) -> dict[str, Sequence[float | None]]:
    """By cell, its values in the order of the baseline's items; a cell without a pair is left out."""
    base = cells[BASELINE]
    return {
        cell: [items.get(item) for item in base]
        for cell, items in cells.items()
        if any(value is not None and items.get(item) is not None for item, value in base.items()) or cell == BASELINE
    }


def _shelf(results: Results, task: str, setting: Mapping[str, object]) -> str:
    """The task, with what tells its setting apart where there are several."""
    settings = [cell.setting for cell in results.plan.cells.values() if cell.is_stock]
    varied = [name for name, value in setting.items() if any(other[name] != value for other in settings)]
    return ", ".join([task, *(f"{name}={setting[name]}" for name in varied)])
