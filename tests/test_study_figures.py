"""Figures of studies show the numbers of their lines, and refuse what a study does not have."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex

from lazyllm import ConfigError, InputError
from lazyllm.ablation import Study
from lazyllm.ablation.curves import front
from lazyllm.ablation.drawing import draw, save_figure, svg_of
from lazyllm.ablation.figures import Figure
from lazyllm.ablation.measures import MEASURES
from lazyllm.ablation.results import Results
from lazyllm.pages.drawing import page_style
from tests.studies import load, small

SWEEP = {"field": "schedule", "sweep": "Stages({LAYER: KEEP})", "layer": [0, 1], "keep": [0.2, 0.6]}
METHODS = [
    {"scorer": "SinkRecent", "labels": {"method": "recent"}, "axes": [SWEEP]},
    {"scorer": "Random", "labels": {"method": "ran<dom>"}, "axes": [SWEEP]},
]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    return small(cells=METHODS).run(tmp_path_factory.mktemp("study"), load=load)


def test_cells_may_have_axes_of_their_own_and_say_where_they_lie():
    made = small(cells=METHODS).all_cells()
    assert len(made) == 8
    assert {cell.labels["method"] for cell in made} == {"recent", "ran<dom>"}
    assert [(cell.labels["layer"], cell.labels["keep"]) for cell in made[:4]] == [
        ("0", "0.2"),
        ("0", "0.6"),
        ("1", "0.2"),
        ("1", "0.6"),
    ]
    assert str(made[1].config.schedule) == "Stages(stages={0: 0.6})"


def test_axes_of_a_cell_must_not_change_what_it_changes():
    with pytest.raises(ConfigError, match="two axes change 'schedule'"):
        small(cells=[{"schedule": "Constant(keep=0.5)", "axes": [SWEEP]}])


@pytest.mark.parametrize("measure", MEASURES)
def test_curves_hold_the_numbers_of_the_lines(results: Results, measure: str):
    figure = Figure(kind="curves", x="keep", y=measure, by="method")
    drawing = draw(results, figure)
    assert any(axes.containers for axes in drawing.axes) or measure in ("score", "recall")
    for axes in drawing.axes:
        lines = {line.cell: line for line in results.lines() if line.task == axes.get_title()}
        drawn = {container.get_label(): container.lines[0].get_xydata() for container in axes.containers}
        for method, points in drawn.items():
            wanted = sorted(
                (float(cell.labels["keep"]), effect.estimate)
                for cell in results.plan.cells.values()
                if cell.labels.get("method") == method
                and (effect := MEASURES[measure].read(lines[cell.name])) is not None
            )
            assert len(wanted) == 4
            assert np.allclose(sorted(points.tolist()), wanted)


def test_no_two_of_many_curves_look_alike(tmp_path):
    recent = {"field": "protect.recent", "name": "recent", "values": list(range(1, 13))}
    results = small(tasks={"records": 1}, axes=[recent]).run(tmp_path, load=load)
    with page_style():
        drawing = draw(results, Figure(kind="front", x="computed_fraction", y="loss", by="recent"))
        axes = drawing.axes[0]
        points = [container.lines[0] for container in axes.containers]
        looks = {(to_hex(point.get_color()), point.get_marker()) for point in points}
    assert len(looks) == len(points) == 12
    names = [text.get_text() for text in drawing.legends[0].get_texts()]
    assert set(map(str, range(1, 13))) <= set(names)
    assert axes.get_legend() is None


def test_few_curves_are_named_in_their_panel(results: Results):
    drawing = draw(results, Figure(kind="curves", x="keep", y="loss", by="method"))
    assert drawing.legends == []
    for axes in drawing.axes:
        names = {text.get_text() for text in axes.get_legend().get_texts()}
        assert names == {"recent", "ran<dom>", "unmodified"}


def test_a_map_has_a_field_for_every_pair_of_labels(results: Results):
    drawing = draw(results, Figure(kind="map", x="layer", y="keep", of="computed_fraction"))
    grid = drawing.axes[0].images[0].get_array()
    assert grid.shape == (2, 2)
    by_place: dict[tuple[str, str], list[float]] = {}
    for line in (line for line in results.lines() if line.task == drawing.axes[0].get_title()):
        labels = results.plan.cells[line.cell].labels
        if labels:
            by_place.setdefault((labels["keep"], labels["layer"]), []).append(line.computed_fraction)
    wanted = [[np.mean(by_place[keep, layer]) for layer in ("0", "1")] for keep in ("0.2", "0.6")]
    assert np.allclose(grid, wanted)
    assert wanted[0][0] < wanted[1][1]


@pytest.mark.parametrize("kind", ["curves", "front", "map"])
def test_a_task_without_the_measure_is_an_empty_panel(results: Results, kind):
    options = {"map": {"x": "layer", "y": "keep"}}.get(kind, {"x": "computed_fraction", "by": "method"})
    drawing = draw(results, Figure(kind=kind, **options))
    titles = [axes.get_title() for axes in drawing.axes]
    assert titles[:2] == ["records", "summary"]
    assert not drawing.axes[1].containers
    assert not drawing.axes[1].lines
    assert not drawing.axes[1].texts


def test_a_map_leaves_out_cells_that_lie_on_no_axis(results: Results):
    cells = {name: replace(cell, labels={}) for name, cell in results.plan.cells.items()}
    drawing = draw(Results(replace(results.plan, cells=cells), results.records, results.items), Figure(kind="map"))
    assert not any(axes.images for axes in drawing.axes)


def test_the_unmodified_model_is_a_line_only_where_there_is_one(results: Results, tmp_path):
    figure = Figure(kind="curves", x="tokens", y="loss")
    study = small(axes=[{"field": "tokens", "values": [300, 320]}], tasks={"records": 1})
    several = draw(study.run(tmp_path, load=load), figure)
    assert several.axes[0].get_lines()[0].get_label() != "unmodified"
    one = draw(results, figure.model_copy(update={"x": "keep"}))
    assert one.axes[0].get_lines()[0].get_label() == "unmodified"


def test_growth_begins_with_the_prefill_and_never_falls(results: Results):
    drawing = draw(results, Figure(kind="growth"))
    assert len(drawing.axes) == 8
    for axes in drawing.axes:
        bands = [line.get_ydata() for line in axes.lines]
        assert bands
        for shares in bands:
            assert all(before <= after + 1e-12 for before, after in pairwise(shares))
        assert bands[0][0] >= bands[-1][0], "later layers have computed fewer tokens"


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1), st.tuples(st.booleans(), st.booleans()))
def test_a_front_is_what_nothing_beats(points, high):
    def beats(one, other):
        better = [a >= b if up else a <= b for a, b, up in zip(one, other, high, strict=True)]
        return all(better) and one != other

    found = front(points, high)
    assert found == sorted(set(found))
    assert set(found) == {point for point in points if not any(beats(other, point) for other in points)}


def test_a_figure_is_the_same_text_every_time(results: Results, tmp_path):
    figure = Figure(kind="front", x="computed_fraction", y="loss_change", by="method", title="a <front> & more")
    assert svg_of(results, figure) == svg_of(results, figure)
    assert "ran&lt;dom&gt;" in svg_of(results, figure)
    assert "more" not in svg_of(results, figure), "a page has a heading of its own"
    assert save_figure(results, figure, tmp_path / "new" / "front.png").stat().st_size > 1000
    with pytest.raises(InputError, match="cannot write"):
        save_figure(results, figure, tmp_path / "front.strange")


@pytest.mark.parametrize(
    ("figure", "message"),
    [
        ({"kind": "curves", "y": "lost"}, "unknown measure 'lost'.*loss"),
        ({"kind": "map", "of": "beauty"}, "unknown measure 'beauty'"),
        ({"kind": "front", "x": "keep", "y": "loss"}, "a front is drawn over a measure"),
        ({"kind": "map", "x": "layre", "y": "keep"}, "unknown axis 'layre'. Did you mean 'layer'"),
        ({"kind": "curves", "x": "keep", "by": "methods"}, "unknown axis 'methods'. Did you mean 'method'"),
        ({"kind": "pie"}, "kind"),
    ],
)
def test_a_figure_of_what_a_study_lacks_is_refused_before_anything_runs(figure, message):
    with pytest.raises(ConfigError, match=message):
        small(cells=METHODS, figures=[figure])


def test_a_study_without_results_has_nothing_to_draw(results: Results):
    empty = Results(results.plan, [], results.items)
    for kind in ("curves", "growth"):
        with pytest.raises(InputError, match="no results to draw yet"):
            draw(empty, Figure(kind=kind, x="keep"))
    with pytest.raises(InputError, match=r"^the study has no results to draw yet"):
        save_figure(empty, Figure(x="keep"), "curves.png")


def test_figures_stand_in_the_file_of_a_study():
    study = small(cells=METHODS, figures=[{"kind": "curves", "x": "keep", "y": "loss", "by": "method"}])
    assert Study.from_text(study.to_yaml(), name=study.name).figures == study.figures
