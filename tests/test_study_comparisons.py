"""Cells are compared on the same items, as one family, and told whether they are worse by more than a margin."""

import pytest
from typer.testing import CliRunner

from lazyllm import InputError
from lazyllm.ablation.comparisons import comparisons
from lazyllm.ablation.results import Results
from lazyllm.cli.main import app
from lazyllm.evaluation.statistics import holm, paired_difference, paired_p_value
from tests.studies import load, small

CELLS = [{"name": "ten", "schedule": "Constant(keep=0.1, start=1)"}, {"name": "half"}, {"name": "short", "tokens": 320}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("study")
    small(cells=CELLS, tasks={"records": 3, "summary": 2}).run(path, load=load)
    return path


@pytest.fixture(scope="module")
def results(folder) -> Results:
    return Results.load(folder)


def losses(results: Results, cell: str, task: str) -> list[float]:
    own = [place for place in results.plan.places if (place.cell, place.task) == (cell, task)]
    return [results.verdict(place).loss for place in sorted(own, key=lambda place: place.index)]


def test_every_cell_is_compared_with_the_unmodified_model_of_its_own_setting(results):
    found = comparisons(results, by="loss")
    assert {(one.task, one.cell) for one in found} == {
        (f"{task}, tokens={tokens}", cell)
        for task in ("records", "summary")
        for cell, tokens in (("ten", 300), ("half", 300), ("short", 320))
    }
    for one in found:
        task, _, tokens = one.task.partition(", ")
        mine, base = losses(results, one.cell, task), losses(results, f"stock, {tokens}", task)
        assert one.pairs == len(mine) == {"records": 3, "summary": 2}[task]
        assert one.difference == paired_difference(mine, base)
        assert one.p_value == paired_p_value(mine, base)
    assert [one.adjusted_p_value for one in found] == holm([one.p_value for one in found])


def test_cells_with_tasks_of_their_own_are_told_by_the_task_alone(tmp_path):
    tasks = ["records(tokens=300)", "records(tokens=320)"]
    study = small(axes=[{"field": "tasks", "values": tasks}], tasks={"records": 2})
    found = comparisons(study.run(tmp_path, load=load), by="loss")
    assert [(one.task, one.cell) for one in found] == [(task, f"tasks={task}") for task in tasks]
    assert [one.excluded for one in found] == [0, 0]


def test_settings_with_more_items_than_others_leave_nothing_out(tmp_path):
    counts = {"few": {"records": 2}, "more": {"records": 4}}
    results = small(axes=[{"field": "tasks", "values": counts}], tasks={"records": 2}).run(tmp_path, load=load)
    few, more = comparisons(results, by="loss")
    assert [(one.cell, one.pairs, one.excluded) for one in (few, more)] == [("tasks=few", 2, 0), ("tasks=more", 4, 0)]
    assert not any("left out" in warning for one in (few, more) for warning in one.warnings)
    mine, base = losses(results, "tasks=few", "records"), losses(results, "stock, tasks=records:2", "records")
    assert few.difference == paired_difference(mine, base)


def test_an_item_that_is_still_missing_is_said(results):
    lost = next(place for place in results.plan.places if (place.cell, place.task) == ("half", "records"))
    records = [record for record in results.records if record.address != lost.address]
    found = comparisons(Results(results.plan, records, results.items), by="loss")
    (half,) = [one for one in found if one.cell == "half" and one.task.startswith("records")]
    assert (half.pairs, half.excluded) == (2, 1)
    assert half.warnings[0] == "1 of 3 pairs left out: a value is missing"


def test_tasks_without_a_score_are_no_part_of_the_family(results):
    found = comparisons(results)
    assert {one.task.partition(",")[0] for one in found} == {"records"}


def test_another_cell_can_be_the_baseline_where_both_have_the_same_items(results):
    found = comparisons(results, by="loss", against="ten")
    assert {one.cell for one in found} == {"half", "stock, tokens=300"}
    half = next(one for one in found if one.cell == "half" and one.task.startswith("records"))
    wanted = paired_difference(losses(results, "half", "records"), losses(results, "ten", "records"))
    assert half.difference == wanted


def test_what_cannot_be_compared_is_refused(results):
    with pytest.raises(InputError, match=r"unknown value 'scores'\. Did you mean 'score'"):
        comparisons(results, by="scores")
    with pytest.raises(InputError, match=r"unknown cell 'tenn'\. Did you mean 'ten'"):
        comparisons(results, against="tenn")
    with pytest.raises(InputError, match=r"margin is at least 0"):
        comparisons(results, margin=-1)
    with pytest.raises(InputError, match=r"nothing to compare yet"):
        comparisons(Results(results.plan, [], {}))


def test_the_command_shows_decisions_and_says_when_items_are_too_few(folder):
    shown = CliRunner().invoke(app, ["study", "compare", str(folder), "--by", "loss", "--margin", "100"])
    assert shown.exit_code == 0
    assert "loss (nats per answer token) against the unmodified model, margin 100" in shown.output
    assert shown.output.count("non-inferior") == 6
    assert "too few" in shown.output
    refused = CliRunner().invoke(app, ["study", "compare", str(folder), "--by", "beauty"])
    assert refused.exit_code == 2
    assert "unknown value 'beauty'" in refused.output
