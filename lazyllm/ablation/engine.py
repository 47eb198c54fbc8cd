"""Runs a study: plans, locks its folder, has the missing units done, and writes each result as it comes."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from lazyllm.ablation.dispatch import Dispatcher, Executor, Serial
from lazyllm.ablation.models import Load, Shelf
from lazyllm.ablation.plan import Plan, Work, make_work
from lazyllm.ablation.results import Results
from lazyllm.ablation.store import Store, look_into
from lazyllm.ablation.study import Study
from lazyllm.ablation.units import Group, Record
from lazyllm.errors import InputError

OUT = Path("out")
"""Where the folders of studies lie."""


class StudyCallback:
    """Told what happens in a run; every hook does nothing unless overridden."""

    def on_start(self, plan: Plan, todo: int, known: int) -> None:
        """Before the first unit: how many are to be done, and how many are known."""

    def on_unit(self, record: Record) -> None:
        """After each unit, once its result is on disk."""

    def on_finish(self, results: Results) -> None:
        """After the last one."""


@dataclass(frozen=True)
class Workforce:
    """Who does the work.

    Attributes:
        workers: processes that share it; 1 = this process.
        ray: address of a Ray cluster that does it instead.
        load: gives the models.

    Raises:
        InputError: for less than one worker.
    """

    workers: int = 1
    ray: str | None = None
    load: Load | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise InputError(f"a study needs at least 1 worker, got {self.workers}")

    def executor(self, run: str, groups: int, shelf: Shelf) -> Executor:
        """Somebody for so many groups; where others work than this process, it lets go of its model."""
        if self.ray is None and self.workers == 1:
            return Serial(run, shelf)
        shelf.clear()
        if self.ray is None:
            from lazyllm.ablation.processes import Processes

            return Dispatcher(Processes(run, self.workers, self.load), min(self.workers, groups))
        from lazyllm.ablation.cluster import RayCrew

        crew = RayCrew(run, self.ray, self.load)
        return Dispatcher(crew, min(crew.room if self.workers == 1 else self.workers, groups))


def run(
    study: Study, folder: Path, workforce: Workforce, callbacks: Sequence[StudyCallback], *, retry: bool, retime: bool
) -> Results:
    """Has what is missing done, and gives all results; see `Study.run`."""
    shelf = Shelf(workforce.load)
    with Store.opened(folder) as store:
        work = make_work(study, shelf)
        store.keep(study.to_yaml(), work.plan.to_dict(), work.contents())
        groups = work.groups(store.kept.records, retry=retry, retime=retime, seed=study.seed)
        _do(work, groups, workforce, shelf, store, callbacks)
        results = Results(work.plan, store.kept.records, work.contents(), [*store.kept.notices, *work.plan.notices])
    for callback in callbacks:
        callback.on_finish(results)
    return results


def folder_of(study: Study, out: str | Path | None) -> Path:
    """Where a study's results lie."""
    return OUT / study.name if out is None else Path(out)


@dataclass(frozen=True)
class Preview:
    """A run that has not begun: its work, what is known, what is to be done, and the models."""

    work: Work
    records: Sequence[Record]
    groups: Sequence[Group]
    shelf: Shelf


def prepare(
    study: Study, out: str | Path | None, *, retry: bool = False, retime: bool = False, load: Load | None = None
) -> Preview:
    """What a run would do; writes nothing."""
    folder, shelf = folder_of(study, out), Shelf(load)
    work = make_work(study, shelf)
    records = look_into(folder).records if folder.is_dir() else []
    return Preview(work, records, work.groups(records, retry=retry, retime=retime, seed=study.seed), shelf)


def _do(
    work: Work,
    groups: Sequence[Group],
    workforce: Workforce,
    shelf: Shelf,
    store: Store,
    callbacks: Iterable[StudyCallback],
) -> None:
    todo = sum(len(group.units) + group.retimes for group in groups)
    known = len({place.address for place in work.plan.places}) - sum(len(group.units) for group in groups)
    for callback in callbacks:
        callback.on_start(work.plan, todo, known)
    if not groups:
        return
    with closing(workforce.executor(secrets.token_hex(4), len(groups), shelf).run(groups)) as records:
        for record in records:
            store.add(record)
            for callback in callbacks:
                callback.on_unit(record)
