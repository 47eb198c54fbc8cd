"""One line that says how far a study is, and how much time is left."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lazyllm.ablation.engine import StudyCallback
from lazyllm.ablation.plan import Plan
from lazyllm.ablation.units import Record


class ProgressLine(StudyCallback):
    """A bar over the units that are to be done, for as long as the context lasts."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console)
        self._task = self._bar.add_task("preparing", total=None)
        self._failed = 0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def on_start(self, plan: Plan, todo: int, known: int) -> None:
        """Says how much is known."""
        self._bar.reset(self._task, total=todo, description=f"{plan.name}: {known} units known, to do")

    def on_unit(self, record: Record) -> None:
        """Goes on by one."""
        self._failed += not record.is_done
        failed = f" ({self._failed} failed)" if self._failed else ""
        self._bar.update(self._task, advance=1, description=f"{record.task}: {record.cell}{failed}")
