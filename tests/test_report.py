"""The data of a report and its figures; no browser."""

from dataclasses import replace

import pytest

from lazyllm import InputError
from lazyllm.pages import Estimate, report
from tests.pages import CELLS, drawn, made_study


def test_the_same_study_gives_the_same_bytes(tmp_path):
    pages = [report(replace(made_study(), figures=[drawn("t")]), tmp_path / name).read_bytes() for name in ("a", "b")]
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


def test_drawings_are_the_same_each_time_and_take_the_pages_ink():
    first, second = (drawn("a <b> & c") for _ in range(2))
    assert first == second
    assert first.svg.startswith("<svg")
    assert "currentColor" in first.svg
    assert "#000000" not in first.svg
