"""The data of a report and its figures; no browser."""

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lazyllm import InputError
from lazyllm.pages import Estimate, ReportData, report
from lazyllm.pages.figures import Axis, Point, curve_figure, front, front_figure
from tests.pages import CELLS, made_study

MORE, LESS = Axis("speedup"), Axis("loss", more_is_better=False)
NUMBERS = st.integers(0, 5)
POINTS = st.lists(
    st.builds(lambda x, y: Point("", Estimate(x), Estimate(y)), NUMBERS, NUMBERS), min_size=1, max_size=12
)


def test_what_is_saved_is_loaded(tmp_path):
    study = made_study(3)
    assert study.save(tmp_path) == tmp_path / "report.json"
    assert ReportData.load(tmp_path) == study
    assert ReportData.load(tmp_path / "report.json") == study


@pytest.mark.parametrize(("text", "reason"), [("{", "not JSON"), ("{}", "title: "), ('{"title": 1}', "title: ")])
def test_other_files_are_refused(tmp_path, text, reason):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(InputError, match=f"no data of a report: .*{reason}"):
        ReportData.load(tmp_path)


def test_a_folder_without_a_report_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"report\.json.*No such file"):
        ReportData.load(tmp_path)


def test_the_same_study_gives_the_same_bytes(tmp_path):
    figure = front_figure({"a": [Point("p", Estimate(1, 0, 2), Estimate(3))]}, title="t", x=MORE, y=LESS)
    pages = [report(replace(made_study(), figures=[figure]), tmp_path / name).read_bytes() for name in ("a", "b")]
    assert pages[0] == pages[1]


def test_rows_must_fit_the_table(tmp_path):
    study = made_study(0)
    with pytest.raises(InputError, match=r"'dense' has a value for 'luck'; columns are score, speedup, note"):
        report(replace(study, rows=[replace(study.rows[0], values={"luck": 1.0})]), tmp_path / "page.html")
    with pytest.raises(InputError, match=r"'dense' has the axis 'luck'; axes are protect\.recent"):
        report(replace(study, rows=[replace(study.rows[0], axes={"luck": "1"})]), tmp_path / "page.html")


def test_numbers_that_are_none_are_left_out(tmp_path):
    study = made_study(1)
    row = replace(study.rows[0], values={"score": float("nan"), "speedup": Estimate(float("inf"))})
    item = study.items[0]
    replies = {"dense": replace(item.replies["dense"], loss=float("nan"))}
    page = report(replace(study, rows=[row], items=[replace(item, replies=replies)]), tmp_path / "page.html")
    assert '"values":[null,null,null]' in page.read_text(encoding="utf-8")


def test_the_baseline_is_the_first_cell():
    assert replace(made_study(1), baseline="recent=64").cells == ["recent=64", "dense", "recent=0", "recent=256"]
    assert made_study(1).cells == list(CELLS)


@pytest.mark.parametrize(("x", "y"), list(product([MORE, LESS], repeat=2)))
@given(points=POINTS)
def test_a_front_is_what_nothing_beats(x, y, points):
    best = front(points, x, y)
    assert best
    for point in points:
        beaten = any(
            x.better(other.x, point.x) >= 0
            and y.better(other.y, point.y) >= 0
            and (other.x, other.y) != (point.x, point.y)
            for other in points
        )
        assert beaten != (point in best)


@pytest.mark.parametrize("draw", [front_figure, curve_figure])
def test_figures_are_the_same_each_time_and_take_the_pages_ink(draw):
    points = {"a & b": [Point("<p>", Estimate(1, 0, 2), Estimate(3)), Point("q", Estimate(2), Estimate(4, 3, 5))]}
    first, second = (draw(points, title="t", x=MORE, y=LESS) for _ in range(2))
    assert first == second
    assert first.svg.startswith("<svg")
    assert "currentColor" in first.svg
    assert "#000000" not in first.svg
    assert "<p>" not in first.svg
    assert "Loss over speedup" in first.text


@pytest.mark.parametrize("draw", [front_figure, curve_figure])
def test_a_figure_of_nothing_is_refused(draw):
    with pytest.raises(InputError, match="'empty' has no points"):
        draw({"a": []}, title="empty", x=MORE, y=LESS)
