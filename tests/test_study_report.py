"""The report of a study says what its results say."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lazyllm.ablation import Study
from lazyllm.ablation.report import report_data
from lazyllm.ablation.results import Results
from lazyllm.ablation.store import STUDY
from lazyllm.cli.main import app
from lazyllm.pages.report import Estimate
from tests.studies import NotANumber, load, small

CELLS = [
    {"name": "swept", "axes": [{"field": "schedule", "sweep": "Constant(keep=KEEP, start=1)", "keep": [0.2, 0.6]}]},
    {"name": "broken", "scorer": NotANumber()},
]
FIGURES = [{"kind": "curves", "x": "keep", "y": "loss_change", "title": "Loss"}, {"kind": "growth"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("studies") / "sizes"
    small(name="sizes", cells=CELLS, figures=FIGURES, conclusions="More is better.").run(path, load=load)
    return path


def test_rows_are_the_lines_and_items_hold_what_every_cell_replied(folder):
    results, study = Results.load(folder), Study.load(folder / STUDY)
    data = report_data(results, study)
    assert data.axes["keep"] == ["0.2", "0.6"]
    assert (data.baseline, data.title, data.conclusions) == ("stock", "sizes", "More is better.")
    lines = results.lines()
    assert [(row.cell, row.task, row.items) for row in data.rows] == [
        (line.cell, line.task, line.items) for line in lines
    ]
    for row, line in zip(data.rows, lines, strict=True):
        effect = line.loss_change
        assert row.values["loss change"] in (Estimate(effect.estimate, effect.low, effect.high), effect.estimate)
        assert (row.values["won"], row.values["lost"]) == (line.won, line.lost)
    assert len(data.items) == 3
    for item in data.items:
        assert set(item.replies) == set(results.plan.cells)
        assert "not finite" in item.replies["broken"].error or "NaN" in item.replies["broken"].error
        assert item.prompt.startswith("user: ")
    places = [place for place in results.plan.places if place.task == "records" and place.index == 1]
    second = next(item for item in data.items if (item.task, item.index) == ("records", 1))
    for place in places:
        verdict = results.verdict(place)
        if verdict is not None:
            assert second.replies[place.cell].text == verdict.text
            assert second.replies[place.cell].loss == verdict.loss


def test_figures_are_drawn_with_the_ink_of_the_page_and_told_in_words(folder):
    first, second = report_data(Results.load(folder), Study.load(folder / STUDY)).figures
    assert first.title == "Loss"
    assert first.svg.startswith("<svg")
    assert "currentColor" in first.svg
    assert "records, swept, schedule=0.2 " in first.text
    assert "computed by the end" in second.text


def test_the_command_of_a_page_goes_on_with_its_results(folder):
    results, study = Results.load(folder), Study.load(folder / STUDY)
    assert report_data(results, study).command == f"lazyllm ablate out/sizes/{STUDY}"
    assert report_data(results, study, Path("out/sizes")).command == f"lazyllm ablate out/sizes/{STUDY}"
    elsewhere = shlex.split(report_data(results, study, Path("my results")).command)
    assert elsewhere == ["lazyllm", "ablate", f"my results/{STUDY}", "--out", "my results"]


def test_items_of_each_setting_stand_beside_its_own_unmodified_model(tmp_path):
    axes = [{"field": "model", "values": ["tiny", "tiny-2"]}]
    study = small(axes=axes, tasks={"records": 2})
    results = study.run(tmp_path, load=load)
    data = report_data(results, study)
    assert data.cells[0] == data.baseline == "stock"
    assert [item.index for item in data.items] == [0, 1, 2, 3]
    for name in ("tiny", "tiny-2"):
        own = [item for item in data.items if f"model={name}" in item.replies]
        assert [set(item.replies) for item in own] == [{"stock", f"stock, model={name}", f"model={name}"}] * 2
        assert all(item.replies["stock"] == item.replies[f"stock, model={name}"] for item in own)


def test_a_page_names_the_device_of_the_run_not_that_of_the_reader(folder):
    results, study = Results.load(folder), Study.load(folder / STUDY)
    cells = {
        name: replace(cell, setting={**cell.setting, "device": "cuda"}) for name, cell in results.plan.cells.items()
    }
    elsewhere = Results(replace(results.plan, cells=cells), results.records, results.items)
    assert report_data(elsewhere, study).conditions.startswith("tiny, float64, cuda, 300 tokens")


def test_a_page_names_all_lengths_and_tasks_it_has(tmp_path):
    lengths = {"field": "tokens", "values": [300, 350]}
    study = small(axes=[lengths, {"field": "tasks", "values": [{"records": 2}, {"code": 1}]}], tasks={"records": 1})
    told = report_data(study.run(tmp_path, load=load), study).conditions
    assert "300 and 350 tokens" in told
    assert "2 x records, 1 x code;" in told


def test_a_study_that_has_only_begun_has_a_page_without_figures(folder):
    results, study = Results.load(folder), Study.load(folder / STUDY)
    begun = Results(results.plan, [record for record in results.records if record.cell == "stock"], results.items)
    data = report_data(begun, study)
    assert {row.cell for row in data.rows} == {"stock"}
    assert data.figures == []


def test_the_command_writes_a_page_beside_the_folder(folder):
    done = CliRunner().invoke(app, ["report", str(folder)])
    assert done.exit_code == 0, done.output
    page = folder.with_name("sizes.html")
    assert "More is better." in page.read_text(encoding="utf-8")
    assert "replies-0" in page.read_text(encoding="utf-8")
    assert "prompts-0" in page.read_text(encoding="utf-8")
    assert CliRunner().invoke(app, ["report", str(folder), "--no-prompts"]).exit_code == 0
    assert "prompts-0" not in page.read_text(encoding="utf-8")
    assert CliRunner().invoke(app, ["report", str(folder), "--no-items"]).exit_code == 0
    assert "replies-0" not in page.read_text(encoding="utf-8")
    refused = CliRunner().invoke(app, ["report", str(folder.parent)])
    assert refused.exit_code == 2
    assert "holds no study" in refused.output


def test_the_folder_may_be_where_one_is(folder, monkeypatch):
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(app, ["report", "."])
    assert done.exit_code == 0, done.output
    assert folder.with_name("sizes.html").name in done.output


def test_figures_are_written_by_a_command_too(folder, tmp_path):
    done = CliRunner().invoke(app, ["study", "figures", str(folder), "--to", str(tmp_path), "--ending", "svg"])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sizes-1-curves.svg", "sizes-2-growth.svg"]
