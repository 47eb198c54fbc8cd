"""Schedules in a file: read once, bound to a model, refused when the file is not what it should be."""

import json

import pytest
import torch

from lazyllm import (
    AttentionMass,
    AuxCache,
    ConfigError,
    Constant,
    Funnel,
    LateInteraction,
    LazyConfig,
    LazyPipeline,
    PerPhase,
    Random,
    Stages,
    TokenBudget,
    Tuned,
)
from lazyllm.evaluation.digest import digest
from lazyllm.models.fingerprint import fingerprint
from lazyllm.policies.base import Phase
from lazyllm.policies.schedules.tuned import Measured, TunedFile
from tests.histories import new_history
from tests.tiny import random_ids, tiny_model

SCHEDULE = Funnel((AttentionMass(share=0.9, start=0), Stages({2: 0.3})))


def tuned_file(**fields) -> TunedFile:
    """A file for the tiny model; fields may be replaced."""
    known = {
        "fingerprint": fingerprint(tiny_model()),
        "schedule": SCHEDULE,
        "scorer": LateInteraction(query=3, pool=5),
        "target": {"speedup": 3.0},
        "new_tokens": 16,
        "training": Measured(prompts=4, divergence=0.02, speedup=3.1),
        "validation": Measured(prompts=2, divergence=0.05, speedup=2.9),
    }
    return TunedFile(**{**known, **fields})


def test_a_file_comes_back_as_it_was_written(tmp_path):
    file = tuned_file()
    assert TunedFile.load(file.save(tmp_path / "tuned.json")) == file


def test_the_schedule_in_the_file_is_the_one_that_runs(tmp_path):
    path = str(tuned_file().save(tmp_path / "tuned.json"))
    for phase in (Phase(True, 100), Phase(False, 1000)):
        assert Tuned(path).cuts(4, phase) == SCHEDULE.cuts(4, phase)
    runs = []
    for schedule in (Tuned(path), SCHEDULE):
        history = new_history(tiny_model(), scorer=LateInteraction(query=3, pool=5), schedule=schedule)
        history.step(random_ids(1, 24))
        history.step(random_ids(1, 1))
        runs.append([[event.rows[0].visible.tolist() for event in step] for step in history.steps])
    assert runs[0] == runs[1]


def test_the_path_is_what_a_configuration_keeps(tmp_path):
    path = str(tuned_file().save(tmp_path / "tuned.json"))
    config = LazyConfig(scorer=Random(), schedule=Tuned(path))
    pipe = LazyPipeline.from_preset(config.save(tmp_path / "tuned.yaml"), tiny_model())
    assert pipe.config == config
    assert pipe.config.to_dict()["schedule"] == {"name": "Tuned", "path": path}
    assert LazyConfig.from_text(pipe.config.to_json()) == config  # after the file was read, too


def test_results_of_another_search_under_the_same_path_are_told_apart(tmp_path):
    def found() -> str:
        return digest(LazyConfig(scorer=Random(), schedule=PerPhase(Tuned(str(path)), Constant(1.0))))

    path = tuned_file().save(tmp_path / "tuned.json")
    before = found()
    assert found() == before
    tuned_file(schedule=Stages({2: 0.4})).save(path)
    assert found() != before


def test_a_file_is_read_when_it_is_needed_and_once(tmp_path):
    path = tmp_path / "tuned.json"
    schedule = Tuned(str(path))  # nothing there yet
    tuned_file().save(path)
    before = schedule.cuts(4, Phase(True, 100))
    path.unlink()
    assert schedule.cuts(4, Phase(True, 100)) == before
    with pytest.raises(ConfigError, match="No such file"):
        Tuned(str(path)).cuts(4, Phase(True, 100))


@pytest.mark.parametrize("wrap", [lambda tuned: tuned, lambda tuned: PerPhase(tuned, Constant())])
def test_another_model_is_refused_with_both_fingerprints(tmp_path, wrap):
    schedule = wrap(Tuned(str(tuned_file().save(tmp_path / "tuned.json"))))
    other = tiny_model(seed=1)
    with pytest.raises(ConfigError) as error:
        LazyPipeline(other, scorer=Random(), schedule=schedule)
    for part in (fingerprint(tiny_model()), fingerprint(other), "tuned.json"):
        assert part in str(error.value)
    recipe = LazyPipeline(scorer=Random(), schedule=schedule)
    assert recipe.bind(tiny_model()).config == recipe.config
    with pytest.raises(ConfigError, match="fingerprint"):
        recipe.bind(tiny_model("qwen2"))


def test_a_model_that_changes_is_looked_at_again(tmp_path):
    model = tiny_model(layers=5, seed=3)
    path = tuned_file(fingerprint=fingerprint(model), schedule=Constant(0.5)).save(tmp_path / "tuned.json")
    pipe = LazyPipeline(model, scorer=Random(), schedule=Tuned(str(path)), cache=AuxCache())
    layers = model.get_decoder().layers
    model.get_decoder().layers = torch.nn.ModuleList(list(layers)[:4])
    try:
        with pytest.raises(ConfigError, match="fingerprint"):
            pipe.generate(random_ids(1, 9)[0], max_new_tokens=1)
    finally:
        model.get_decoder().layers = layers


WRITTEN = tuned_file().model_dump_json()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["broken or is no JSON"]),
        (WRITTEN[: len(WRITTEN) // 2], ["broken or is no JSON"]),
        ("schedule: {name: Constant}", ["broken or is no JSON"]),
        ("[]", ["not a file that `lazyllm tune` wrote"]),
        ("{}", ["not a file that `lazyllm tune` wrote"]),
        (LazyConfig().to_json(), ["not a file that `lazyllm tune` wrote"]),
        (json.dumps(json.loads(WRITTEN) | {"version": 2}), ["version 2", "reads version 1"]),
        (json.dumps(json.loads(WRITTEN) | {"schedule": {"name": "Stage"}}), ["Did you mean 'Stages'?"]),
        (json.dumps(json.loads(WRITTEN) | {"extra": 1}), ["unknown field 'extra'"]),
        (json.dumps({key: value for key, value in json.loads(WRITTEN).items() if key != "scorer"}), ["scorer"]),
        (json.dumps(json.loads(WRITTEN) | {"fingerprint": ""}), ["fingerprint"]),
        (json.dumps(json.loads(WRITTEN) | {"target": {"speed": 3}}), ["target"]),
        (json.dumps(json.loads(WRITTEN) | {"schedule": {"name": "Tuned", "path": "x"}}), ["another file"]),
        (
            json.dumps(
                json.loads(WRITTEN)
                | {"schedule": {"name": "Funnel", "schedules": [{"name": "Tuned", "path": "x"}, "Constant"]}}
            ),
            ["another file"],
        ),
        ("\x89PNG\r\n".encode("latin-1"), ["broken or is no JSON"]),
    ],
)  # fmt: skip
def test_a_file_that_is_not_what_it_should_be_is_refused_by_its_path(tmp_path, text: str | bytes, parts: list[str]):
    path = tmp_path / "own.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as error:
        LazyPipeline(tiny_model(), scorer=Random(), schedule=Tuned(str(path)))
    for part in (repr(str(path)), *parts):
        assert part in str(error.value)


def test_a_file_that_cannot_be_read_is_refused_by_its_path(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ConfigError) as error:
            LazyPipeline(tiny_model(), scorer=Random(), schedule=Tuned(str(path)))
        assert repr(str(path)) in str(error.value)


def test_a_schedule_in_a_file_is_held_to_the_model_and_the_scorer(tmp_path):
    path = str(tuned_file(schedule=TokenBudget({9: 5})).save(tmp_path / "tuned.json"))
    with pytest.raises(ConfigError, match="layer 9 does not exist"):
        LazyPipeline(tiny_model(), scorer=Random(), schedule=Tuned(path))
    path = str(tuned_file().save(tmp_path / "tuned.json"))
    with pytest.raises(ConfigError, match="before layer 0"):
        LazyPipeline(tiny_model(), scorer="LastTokenAttention", schedule=Tuned(path))
