"""Work shared by others: whoever dies or cannot load, every unit is recorded exactly once."""

import multiprocessing
import os
import signal
from collections import Counter, deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyllm import EngineError
from lazyllm.ablation.cells import ModelRef
from lazyllm.ablation.dispatch import ATTEMPTS, MOST_DEATHS, MOST_REFUSALS, CannotLoad, Died, Dispatcher, Finished
from lazyllm.ablation.engine import StudyCallback
from lazyllm.ablation.units import Group, Record, Unit
from lazyllm.evaluation.tasks import Item
from tests.studies import figures, load, load_but_in_the_first_worker, short_items, small


@pytest.fixture(autouse=True)
def replies_are_short(monkeypatch):
    monkeypatch.setattr("lazyllm.ablation.plan.make_items", short_items)


def group(index: int, units: int, model: str = "tiny") -> Group:
    """A group with a unit of the unmodified model and others."""
    names = [f"{index}.{unit}" for unit in range(units)]
    ref = ModelRef(model, "float64", None, "cpu")
    return Group(ref, Item("made", "w", ""), str(index), tuple(Unit(name, name, None) for name in names), names[0])


class FakeHand:
    """Says what a script makes of its group: so many units, then an end."""

    def __init__(self, crew, name: str) -> None:
        self.crew, self.name, self.dismissed = crew, name, False
        self.saying: deque = deque()
        self.given: list[Group] = []

    def give(self, given: Group) -> None:
        self.given.append(given)
        assert not self.dismissed
        assert not self.saying, "it was busy"
        if (given.ref.model, self.name) in self.crew.unloadable or given.ref.model == "nowhere":
            self.saying.append(CannotLoad("no room"))
            return
        later = given.stock not in {unit.address for unit in given.units}
        assert later or given.units[0].address == given.stock, "the unmodified model goes first"
        lives = self.crew.lives.popleft() if self.crew.lives else len(given.units)
        fatal = next((at for at, unit in enumerate(given.units) if unit.address in self.crew.fatal), len(given.units))
        done = min(lives, fatal)
        for unit in given.units[:done]:
            verdict = {"reply": [1]}
            self.saying.append(Record(unit.address, "", "", "", "run", self.name, "", 0, verdict=verdict))
        if done == len(given.units):
            self.saying.append(Finished())
        else:
            self.crew.deaths[given.units[done].address] += 1
            self.saying.append(Died("signal 9"))

    def dismiss(self) -> None:
        self.dismissed = True


class FakeCrew:
    run = "run"

    def __init__(self, lives=(), unloadable=(), fatal=()) -> None:
        self.lives, self.unloadable, self.fatal = deque(lives), set(unloadable), set(fatal)
        self.hands: list[FakeHand] = []
        self.deaths: Counter = Counter()

    def hire(self, name: str) -> FakeHand:
        self.hands.append(FakeHand(self, name))
        return self.hands[-1]

    def hear(self, hands):
        assert hands
        assert len([hand for hand in self.hands if not hand.dismissed]) >= len(hands)
        speaking = hands[len(self.hands) % len(hands)]
        yield speaking, speaking.saying.popleft()


@given(
    sizes=st.lists(st.integers(1, 4), max_size=6),
    workers=st.integers(1, 4),
    lives=st.lists(st.integers(0, 3), max_size=8),
)
def test_every_unit_is_recorded_once_whoever_dies(sizes, workers, lives):
    groups = [group(index, size) for index, size in enumerate(sizes)]
    crew = FakeCrew(lives)
    records = list(Dispatcher(crew, workers).run(groups))
    assert Counter(record.address for record in records) == Counter(
        unit.address for one in groups for unit in one.units
    )
    assert all(hand.dismissed for hand in crew.hands)


@given(workers=st.integers(1, 3), bad=st.sets(st.integers(1, 6)), count=st.integers(1, 5))
def test_a_group_goes_to_a_worker_that_can_load_its_model(workers, bad, count):
    groups = [group(index, 2, "tiny" if index % 2 else "other") for index in range(count)]
    crew = FakeCrew(unloadable=[("tiny", f"worker-{index}") for index in bad])
    records = list(Dispatcher(crew, workers).run(groups))
    assert Counter(record.address for record in records) == Counter(
        unit.address for one in groups for unit in one.units
    )
    failed = {record.address.partition(".")[0] for record in records if not record.is_done}
    assert failed in (set(), {one.digest for one in groups if one.ref.model == "tiny"})
    if len(bad) < ATTEMPTS:
        assert not failed


def test_a_model_that_nobody_can_load_fails_with_its_reason_and_the_others_go_on():
    groups = [group(0, 2, "nowhere"), group(1, 2, "nowhere"), group(2, 2)]
    crew = FakeCrew()
    records = list(Dispatcher(crew, 2).run(groups))
    assert {record.address: record.error for record in records} == {
        "0.0": "no room", "0.1": "no room", "1.0": "no room", "1.1": "no room", "2.0": None, "2.1": None
    }  # fmt: skip
    assert len(crew.hands) <= 2 * ATTEMPTS


def test_a_model_that_can_be_loaded_no_more_fails_in_the_end():
    crew = FakeCrew(lives=[1], unloadable=[("tiny", f"worker-{number}") for number in range(2, 100)])
    records = list(Dispatcher(crew, 2).run([group(0, 3), group(1, 2, "other")]))
    assert {record.address: record.error for record in records} == {
        "0.0": None, "0.1": "no room", "0.2": "no room", "1.0": None, "1.1": None
    }  # fmt: skip
    assert len(crew.hands) <= 2 + MOST_REFUSALS
    assert all(hand.dismissed for hand in crew.hands)


def test_a_unit_that_kills_is_left_out_and_its_group_goes_on():
    records = list(Dispatcher(FakeCrew(fatal=["0.1"]), 1).run([group(0, 4), group(1, 2)]))
    errors = {record.address: record.error for record in records}
    assert errors.pop("0.1") == f"signal 9, {ATTEMPTS} times"
    assert len(records) == 6
    assert set(errors.values()) == {None}


def test_a_group_that_is_given_out_again_knows_the_reply_that_it_is_compared_with():
    crew = FakeCrew(lives=[2])
    list(Dispatcher(crew, 1).run([group(0, 3)]))
    assert [given.reply for hand in crew.hands for given in hand.given] == [(), (1,)]


def test_workers_that_die_of_everything_end_the_run():
    groups = [group(index, 3) for index in range(40)]
    crew = FakeCrew(lives=[0] * 1000)
    with pytest.raises(EngineError, match=f"{MOST_DEATHS} workers died"):
        list(Dispatcher(crew, 2).run(groups))
    assert all(hand.dismissed for hand in crew.hands)


class Killer(StudyCallback):
    """Kills a worker process once the second result is there."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.killed: str = ""

    def on_unit(self, record):
        self.records.append(record)
        if len(self.records) == 2:
            (victim,) = [one for one in multiprocessing.active_children() if one.name == f"lazyllm-{record.worker}"]
            os.kill(victim.pid, signal.SIGKILL)
            self.killed = record.worker


def test_processes_share_the_work_and_one_that_dies_or_cannot_load_is_replaced(tmp_path):
    study = small(axes=[{"field": "protect.recent", "values": [4, 8, 16, 32]}], tasks={"records": 3, "summary": 2})
    expected = figures(study.run(tmp_path / "alone", load=load))
    killer = Killer()
    results = study.run(tmp_path / "shared", workers=2, load=load_but_in_the_first_worker, callbacks=[killer])
    assert figures(results) == expected
    assert Counter(record.address for record in results.records).most_common(1)[0][1] == 1
    names = {record.worker for record in results.records}
    assert killer.killed in names
    assert "worker-1" not in names
    assert len(names) >= 2
    assert not multiprocessing.active_children()
