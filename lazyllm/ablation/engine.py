"""Runs a study: plans, locks its folder, has the missing units done, and writes each result as it comes."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
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

Recruit = Callable[[str, int], Executor]
"""Gives an executor for the name of a run and a number of groups."""


class StudyCallback:
    """Told what happens in a run; every hook does nothing unless overridden."""

    def on_start(self, plan: Plan, todo: int, known: int) -> None:
        """Before the first unit: how many are to be done, and how many are known."""

    def on_unit(self, record: Record) -> None:
        """After each unit, once its result is on disk."""

    def on_finish(self, results: Results) -> None:
        """After the last one."""


def run(
    study: Study,
    out: str | Path | None = None,
    *,
    workers: int = 1,
    ray: str | None = None,
    retry: bool = False,
    retime: bool = False,
    load: Load | None = None,
    callbacks: Sequence[StudyCallback] = (),
    recruit: Recruit | None = None,
) -> Results:
    """Runs what is missing; the arguments are those of `Study.run`, and `recruit` gives another executor."""
    if workers < 1:
        raise InputError(f"a study needs at least 1 worker, got {workers}")
    folder = folder_of(study, out)
    shelf = Shelf(load)
    with Store.opened(folder) as store:
        work = make_work(study, shelf)
        store.keep(study.to_yaml(), work.plan.to_dict(), work.contents())
        groups = work.groups(store.kept.records, retry=retry, retime=retime, seed=study.seed)
        recruit = recruit or _recruiter(workers, ray, load, shelf)
        _do(work, groups, recruit, store, callbacks)
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


def prepare(study: Study, out: str | Path | None, *, retry: bool = False, load: Load | None = None) -> Preview:
    """What a run would do; writes nothing."""
    folder, shelf = folder_of(study, out), Shelf(load)
    work = make_work(study, shelf)
    records = look_into(folder).records if folder.is_dir() else []
    return Preview(work, records, work.groups(records, retry=retry, retime=False, seed=study.seed), shelf)


def _do(
    work: Work, groups: Sequence[Group], recruit: Recruit, store: Store, callbacks: Iterable[StudyCallback]
) -> None:
    todo = sum(len(group.units) + group.retimes for group in groups)
    known = len({place.address for place in work.plan.places}) - sum(len(group.units) for group in groups)
    for callback in callbacks:
        callback.on_start(work.plan, todo, known)
    if not groups:
        return
    with closing(recruit(secrets.token_hex(4), len(groups)).run(groups)) as records:
        for record in records:
            store.add(record)
            for callback in callbacks:
                callback.on_unit(record)


def _recruiter(workers: int, ray: str | None, load: Load | None, shelf: Shelf) -> Recruit:
    """This process, others of this machine, or a cluster; where others work the driver lets go of its model."""

    def recruit(run: str, groups: int) -> Executor:
        if ray is None and workers == 1:
            return Serial(run, shelf)
        shelf.clear()
        if ray is None:
            from lazyllm.ablation.processes import Processes

            return Dispatcher(Processes(run, workers, load), min(workers, groups))
        from lazyllm.ablation.cluster import RayCrew

        crew = RayCrew(run, ray, load)
        return Dispatcher(crew, min(crew.room if workers == 1 else workers, groups))

    return recruit
