"""Configurations: what a person may write, what comes back from JSON and YAML, and what is refused how."""

import contextlib
import json
import math
from typing import Annotated, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from lazyllm import (
    CACHES,
    SCHEDULES,
    SCORERS,
    AttentionMass,
    AuxCache,
    Blockwise,
    ByQuestion,
    CachePolicy,
    Combined,
    ConfigError,
    Constant,
    Cosine,
    DropCache,
    FullBelow,
    Funnel,
    LastTokenAttention,
    LateInteraction,
    LazyConfig,
    LazyLLMError,
    LazyPipeline,
    LexicalOverlap,
    Linear,
    OffloadedAux,
    PerPhase,
    Pooled,
    Power,
    Protect,
    Pyramid,
    QuantizedAux,
    QuantizedKV,
    Random,
    Schedule,
    ScoreContext,
    ScoreGap,
    Scorer,
    Stages,
    TokenBudget,
    Tuned,
    TwoHop,
    WindowAttention,
    preset_names,
)
from lazyllm.policies.base import Phase, parse_call

REGISTRIES = {"scorer": (SCORERS, Scorer), "schedule": (SCHEDULES, Schedule), "cache": (CACHES, CachePolicy)}
POLICIES = [(axis, name) for axis, (registry, _) in REGISTRIES.items() for name in registry]
REQUIRED = {
    "Stages": {"stages": {0: 1.0, 2: 0.5}},
    "TwoHop": {"scorer": {"name": "LateInteraction", "pool": 3}},
    "Pooled": {"scorer": "Random(seed=3)"},
    "Blockwise": {"scorer": "WindowAttention(window=4)", "size": 3},
    "Combined": {"scorers": [("Random", 1.0), ({"name": "Pooled", "scorer": "SinkRecent"}, 0.5)]},
    "Oracle": {"answer": (5, 7)},
    "Funnel": {"schedules": ["AttentionMass(start=1)", {"name": "Constant", "keep": 0.5, "start": 2}]},
    "FullBelow": {"length": 30, "schedule": {"name": "Stages", "stages": {1: 0.5}}},
    "ByQuestion": {"asked": "Constant(keep=0.5)", "unasked": "Constant()"},
    "PerPhase": {"prefill": "Constant(keep=0.5)", "decode": "Constant()"},
    "TokenBudget": {"tokens": {1: 64, 2: 32}},
    "Tuned": {"path": "tuned.json"},
}


class OwnScorer(Scorer):
    """Newer is better, by a factor."""

    factor: Annotated[float, Field(gt=0)] = 1.0

    def score(self, context: ScoreContext) -> torch.Tensor:
        return context.positions.double() * self.factor


class OwnSchedule(Schedule):
    """Gives what it is told to."""

    ratios: tuple[float, ...]
    fixed: ClassVar[int] = 3

    def keep_ratios(self, layers: int) -> list[float]:
        return list(self.ratios)


class OwnCache(AuxCache):
    """A cache that no registry knows."""


# -- writing and reading -----------------------------------------------------------------------------

ratios = st.floats(1e-6, 1)
depths = st.one_of(st.integers(0, 200), st.floats(0, 1, exclude_min=True, exclude_max=True))
spans = st.lists(
    st.one_of(
        st.text(min_size=1), st.integers(0, 50).flatmap(lambda at: st.tuples(st.just(at), st.integers(at + 1, 99)))
    ),
    max_size=3,
)
odd = st.integers(0, 50).map(lambda half: 2 * half + 1)
queries = st.one_of(
    st.just("auto"),
    st.integers(1, 99),
    st.text(min_size=1),
    st.integers(0, 50).flatmap(lambda at: st.tuples(st.just(at), st.integers(at + 1, 99))),
)
plain_scorers = st.one_of(
    st.just(LastTokenAttention()),
    st.builds(Random, seed=st.integers(0, 2**32 - 1)),
    st.builds(
        WindowAttention,
        window=st.integers(1, 999),
        heads=st.sampled_from(["mean", "max"]),
        pool=odd,
    ),
    st.builds(OwnScorer, factor=st.floats(1e-300, 1e300)),
    st.builds(LateInteraction, query=queries, pool=odd, temperature=st.floats(1e-3, 1e3)),
    st.builds(LexicalOverlap, query=queries, pool=odd),
)
scorers = st.recursive(
    plain_scorers,
    lambda inner: st.one_of(
        st.builds(TwoHop, scorer=inner, tokens=st.integers(1, 999), weight=st.floats(0, 9)),
        st.builds(Pooled, scorer=inner, width=odd, by=st.sampled_from(["max", "mean"])),
        st.builds(Blockwise, scorer=inner, size=st.integers(1, 99), by=st.sampled_from(["max", "mean"])),
        st.lists(st.tuples(inner, st.floats(1e-9, 1e9)), min_size=1, max_size=3).map(Combined),
    ),
    max_leaves=4,
)
plain_schedules = st.one_of(
    st.builds(Constant, keep=ratios, start=depths),
    st.builds(Linear, first=ratios, last=ratios, start=depths),
    st.builds(Cosine, first=ratios, last=ratios, start=depths),
    st.builds(Power, first=ratios, last=ratios, start=depths, exponent=st.floats(1e-3, 1e3)),
    st.builds(Pyramid, stages=st.integers(2, 9), keep=ratios, start=st.none() | depths),
    st.dictionaries(depths, ratios, min_size=1, max_size=5).map(Stages),
    st.builds(OwnSchedule, ratios=st.lists(ratios, max_size=4).map(tuple)),
)
schedules = st.recursive(
    st.one_of(
        plain_schedules,
        st.builds(AttentionMass, share=ratios, floor=st.floats(0, 0.5), ceiling=st.floats(0.5, 1), start=depths),
        st.builds(ScoreGap, floor=st.floats(0, 0.5), ceiling=st.floats(0.5, 1), start=depths),
        st.dictionaries(depths, st.integers(1, 9999), min_size=1, max_size=4).map(TokenBudget),
        st.builds(Tuned, path=st.text(min_size=1)),
    ),
    lambda inner: st.one_of(
        st.builds(FullBelow, length=st.integers(0, 9999), schedule=inner),
        st.builds(PerPhase, prefill=inner, decode=inner),
        st.builds(ByQuestion, asked=inner, unasked=inner),
        st.builds(Funnel, schedules=st.lists(inner, min_size=1, max_size=3).map(tuple)),
    ),
    max_leaves=4,
)
aux_fields = {
    "attend": st.sampled_from(["visible", "cached"]),
    "decode": st.sampled_from(["select", "reuse"]),
    "max_revived": st.none() | st.integers(0, 999),
    "revive_every": st.integers(1, 99),
}
caches = st.one_of(
    st.builds(AuxCache, **aux_fields),
    st.builds(OffloadedAux, **aux_fields),
    st.builds(OffloadedAux, where=st.just("disk"), folder=st.none() | st.text(min_size=1), **aux_fields),
    st.builds(QuantizedAux, bits=st.sampled_from([8, 4]), **aux_fields),
    st.builds(QuantizedKV, bits=st.sampled_from([8, 4]), **aux_fields),
    st.builds(DropCache, attend=st.sampled_from(["visible", "cached"])),
    st.just(OwnCache(decode="reuse")),
)
protects = st.builds(
    Protect,
    sinks=st.integers(0, 99),
    recent=st.integers(0, 99),
    generated=st.booleans(),
    system=st.booleans(),
    spans=spans.map(tuple),
)


@given(scorers, schedules, caches, protects)
def test_a_configuration_survives_json_and_yaml(scorer, schedule, cache, protect):
    config = LazyConfig(scorer=scorer, schedule=schedule, cache=cache, protect=protect)
    through_json = LazyConfig.from_text(config.to_json())
    through_both = LazyConfig.from_text(through_json.to_yaml())
    assert through_json == config
    assert through_both == config
    assert LazyConfig(**config.to_dict()) == config
    for axis in REGISTRIES:
        assert type(getattr(through_both, axis)) is type(getattr(config, axis))


@pytest.mark.parametrize("ending", ["json", "yaml", "yml"])
def test_a_configuration_survives_a_file(tmp_path, ending: str):
    config = LazyConfig(
        scorer=WindowAttention(window=7), schedule=Stages({1: 0.5, 0.75: 0.2}), protect=Protect(spans=((1, 3), "ä"))
    )
    path = config.save(tmp_path / f"config.{ending}")
    assert LazyConfig.load(path) == config
    assert LazyConfig.preset(path) == config
    assert LazyPipeline.from_preset(path).config == config


@pytest.mark.parametrize(("axis", "name"), POLICIES)
def test_every_registered_policy_is_a_name_a_call_and_a_mapping(axis: str, name: str):
    registry, base = REGISTRIES[axis]
    fields = REQUIRED.get(name, {})
    policy = registry[name](**fields)
    call = f"{name}({', '.join(f'{key}={value!r}' for key, value in fields.items())})"
    assert isinstance(policy, base)
    assert registry.build(policy) is policy
    assert registry.build(call) == registry.build({"name": name, **fields}) == policy
    if not fields:
        assert registry.build(name) == policy
    config = LazyConfig(**{axis: policy})
    assert LazyConfig.from_text(LazyConfig.from_text(config.to_json()).to_yaml()) == config
    assert config.to_dict()[axis]["name"] == name
    assert policy.summary()[-1] in ".:"


@pytest.mark.parametrize(("axis", "name"), POLICIES)
def test_every_registered_policy_is_frozen_and_knows_its_fields(axis: str, name: str):
    policy = REGISTRIES[axis][0][name](**REQUIRED.get(name, {}))
    with pytest.raises(ConfigError, match="unknown field 'nonsense'"):
        type(policy)(**REQUIRED.get(name, {}), nonsense=1)
    for field in type(policy).model_fields:
        with pytest.raises(ValueError, match="frozen"):
            setattr(policy, field, getattr(policy, field))


def test_a_mapping_of_a_registry_lists_its_names():
    assert {name: SCORERS[name] for name in SCORERS} == dict(SCORERS)
    assert "Random" in SCORERS
    assert "Randy" not in SCORERS
    assert len(SCORERS) == len(list(SCORERS)) > 0


def test_positional_values_follow_the_order_of_the_fields():
    assert WindowAttention(16, "max") == WindowAttention(window=16, heads="max")
    assert Constant(0.5, start=3) == Constant(keep=0.5, start=3)
    assert SCORERS.build("WindowAttention(16, heads='max')") == WindowAttention(window=16, heads="max")
    with pytest.raises(ConfigError, match="'keep' twice"):
        Constant(0.5, keep=0.4)
    with pytest.raises(ConfigError, match="at most 2 values, got 3"):
        Constant(0.5, 1, 2)
    with pytest.raises(ConfigError, match="at most 0 values, got 1"):
        LastTokenAttention(3)


@pytest.mark.parametrize("own", [OwnScorer(factor=2.0), OwnSchedule(ratios=(1.0, 0.5)), OwnCache(attend="cached")])
def test_a_policy_outside_the_registries_is_named_by_its_import_path(own):
    axis, registry = next((axis, registry) for axis, (registry, base) in REGISTRIES.items() if isinstance(own, base))
    described = registry.describe(own)
    assert described["name"] == f"{__name__}:{type(own).__name__}"
    assert registry.build(described) == own
    config = LazyConfig(**{axis: own})
    assert LazyConfig.from_text(config.to_yaml()) == config
    assert registry.build(f"{__name__}:OwnScorer(factor=3)" if axis == "scorer" else own) is not None


def test_a_call_with_an_import_path_takes_fields():
    assert SCORERS.build(f"{__name__}:OwnScorer(factor=3)") == OwnScorer(factor=3.0)


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("no_such_module:Own", "No module named 'no_such_module'"),
        (f"{__name__}:Missing", "Missing"),
        (f"{__name__}:REQUIRED", "not a Scorer class"),
        (f"{__name__}:OwnCache", "not a Scorer class"),
        (":Own", ":Own"),
        ("json:", "json:"),
    ],
)
def test_a_wrong_import_path_is_refused(path: str, part: str):
    with pytest.raises(ConfigError) as error:
        LazyConfig(scorer=path)
    assert part in str(error.value)
    assert path in str(error.value)


# -- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        (
            {"scorer": "WindowAtention"},
            ["unknown scorer 'WindowAtention'", "Did you mean 'WindowAttention'?", "Random"],
        ),
        ({"schedule": "Stage"}, ["unknown schedule 'Stage'", "Did you mean 'Stages'?", "Linear"]),
        ({"cache": "auxcache"}, ["unknown cache 'auxcache'", "Did you mean 'AuxCache'?", "DropCache"]),
        ({"scorer": "Xyzzy"}, ["unknown scorer 'Xyzzy'. Known:"]),
        (
            {"scorer": {"name": "WindowAttention", "windo": 3}},
            ["unknown field 'windo'", "Did you mean 'window'?", "Known: heads, pool, window. Got {"],
        ),
        ({"scorrer": "Random"}, ["unknown field 'scorrer'", "Did you mean 'scorer'?", "protect"]),
        ({"protect": {"sink": 4}}, ["protect", "sink"]),
        ({"scorer": {"window": 3}}, ["needs a 'name'", "'window': 3", "WindowAttention"]),
        ({"scorer": {"name": 3}}, ["needs a 'name'", "3"]),
        ({"scorer": 3}, ["must be a Scorer", "3"]),
        ({"scorer": None}, ["must be a Scorer", "None"]),
        ({"scorer": Random}, ["the class Random", "Random(...)"]),
        ({"scorer": AuxCache()}, ["must be a Scorer", "AuxCache"]),
        ({"scorer": "Random(seed=-1)"}, ["Random.seed", "-1"]),
        ({"scorer": "Random(seed=2.5)"}, ["Random.seed", "2.5"]),
        ({"cache": "AuxCache(attend='all')"}, ["AuxCache.attend", "'visible' or 'cached'", "'all'"]),
        ({"scorer": "WindowAttention(pool=4)"}, ["WindowAttention.pool", "odd", "4"]),
        ({"scorer": "WindowAttention(window=0)"}, ["WindowAttention.window", "0"]),
        ({"scorer": "LateInteraction(query='')"}, ["LateInteraction.query", "must not be empty"]),
        ({"scorer": "LateInteraction(query=0)"}, ["LateInteraction.query", "at least one", "0"]),
        ({"scorer": "LateInteraction(query=(4, 4))"}, ["start < stop", "(4, 4)"]),
        ({"scorer": "LateInteraction(pool=4)"}, ["LateInteraction.pool", "odd"]),
        ({"scorer": "LateInteraction(temperature=0)"}, ["LateInteraction.temperature", "0"]),
        ({"scorer": "LexicalOverlap(pool=2)"}, ["LexicalOverlap.pool", "odd"]),
        ({"scorer": "Pooled(scorer='Randon')"}, ["unknown scorer 'Randon'", "Did you mean 'Random'?"]),
        ({"scorer": "Pooled(scorer='Random(sed=1)')"}, ["unknown field 'sed'", "Did you mean 'seed'?"]),
        ({"scorer": "Pooled(scorer='Random', width=2)"}, ["Pooled.width", "odd"]),
        ({"scorer": "Blockwise(scorer='Random', size=0)"}, ["Blockwise.size", "0"]),
        ({"scorer": "Combined(scorers=[])"}, ["Combined.scorers", "at least 1"]),
        ({"scorer": "Combined(scorers={'Random': 0})"}, ["greater than 0", "0"]),
        ({"scorer": "TwoHop"}, ["TwoHop.scorer", "required"]),
        ({"schedule": "AttentionMass(share=0)"}, ["AttentionMass.share", "0"]),
        ({"schedule": "AttentionMass(share=1.01)"}, ["AttentionMass.share", "1.01"]),
        ({"schedule": "AttentionMass(floor=0.6, ceiling=0.5)"}, ["floor 0.6 is above the ceiling 0.5"]),
        ({"schedule": "AttentionMass(start=1.5)"}, ["AttentionMass.start", "fraction", "1.5"]),
        ({"schedule": "ScoreGap(floor=0.6, ceiling=0.5)"}, ["floor 0.6 is above the ceiling 0.5"]),
        ({"schedule": "ScoreGap(floor=-0.1)"}, ["ScoreGap.floor", "-0.1"]),
        ({"schedule": "Power(exponent=0)"}, ["Power.exponent", "0"]),
        ({"schedule": "Pyramid(stages=1)"}, ["Pyramid.stages", "1"]),
        ({"schedule": "Pyramid(start=1.5)"}, ["Pyramid.start", "fraction", "1.5"]),
        ({"schedule": "TokenBudget"}, ["TokenBudget.tokens", "required"]),
        ({"schedule": "TokenBudget({1: 0})"}, ["TokenBudget.tokens", "0"]),
        ({"schedule": "TokenBudget({-1: 9})"}, ["TokenBudget.tokens", "-1"]),
        ({"schedule": "TokenBudget(1024)"}, ["TokenBudget.tokens", "1024"]),
        ({"schedule": "Tuned(path='')"}, ["Tuned.path", "at least 1"]),
        ({"schedule": "Funnel(schedules=[])"}, ["Funnel.schedules", "at least 1"]),
        ({"schedule": "FullBelow(length=-1, schedule='Constant')"}, ["FullBelow.length", "-1"]),
        ({"schedule": "PerPhase(prefill='Constant')"}, ["PerPhase.decode", "required"]),
        ({"cache": "AuxCache(max_revived=-1)"}, ["max_revived", "-1"]),
        ({"cache": "AuxCache(revive_every=0)"}, ["revive_every", "0"]),
        ({"cache": "OffloadedAux(where='gpu')"}, ["OffloadedAux.where", "'cpu' or 'disk'", "'gpu'"]),
        ({"cache": "OffloadedAux(where='disk', folder='')"}, ["OffloadedAux.folder", "at least 1"]),
        ({"cache": "OffloadedAux(folder='x')"}, ["a folder is for where='disk', not for where='cpu'"]),
        ({"cache": "QuantizedAux(bits=3)"}, ["QuantizedAux.bits", "8 or 4", "3"]),
        ({"cache": "QuantizedKV(bits=16)"}, ["QuantizedKV.bits", "8 or 4", "16"]),
        ({"protect": {"sinks": -1}}, ["sinks", "-1"]),
        ({"protect": {"spans": [(3, 3)]}}, ["start < stop", "(3, 3)"]),
        ({"protect": {"spans": [""]}}, ["must not be empty"]),
    ],
    ids=str,
)
def test_a_wrong_configuration_is_refused_with_the_value_and_what_exists(fields, parts):
    with pytest.raises(ConfigError) as error:
        LazyConfig(**fields)
    for part in parts:
        assert part in str(error.value)


def test_a_configuration_error_is_a_value_error_and_of_our_base():
    with pytest.raises(ValueError, match="Xyzzy"):
        LazyConfig(scorer="Xyzzy")
    assert issubclass(ConfigError, LazyLLMError)


@pytest.mark.parametrize(
    "text",
    [
        "Random(",
        "Random)(",
        "Random(seed)",
        "Random(seed=print(1))",
        "Random(seed=__import__('os'))",
        "Random()()",
        "Random(**{'seed': 1})",
        "Random({[]: 1})",
        "Random(seed=1); x",
    ],
)
def test_a_call_that_holds_no_plain_values_is_refused_and_not_run(text: str):
    with pytest.raises(ConfigError) as error:
        LazyConfig(scorer=text)
    assert text in str(error.value)


@given(st.text(max_size=40))
def test_no_text_makes_the_parser_raise_anything_else(text: str):
    with contextlib.suppress(ConfigError):
        parse_call(text)


@pytest.mark.parametrize("value", [0, -0.1, 1.0001, math.nan, math.inf, -math.inf, "much", None])
@pytest.mark.parametrize(
    "build",
    [
        Constant,
        lambda keep: Linear(last=keep),
        lambda keep: Cosine(first=keep),
        lambda keep: Power(last=keep),
        lambda keep: Pyramid(keep=keep),
        lambda keep: Stages({1: keep}),
    ],
)
def test_a_keep_ratio_outside_0_1_is_refused(build, value):
    with pytest.raises(ConfigError) as error:
        build(value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("layer", [1.0, 1.5, 9.0, 0.0, -0.5, -1, math.nan, math.inf])
@pytest.mark.parametrize("build", [lambda layer: Stages({layer: 0.5}), lambda layer: Constant(0.5, start=layer)])
def test_a_layer_that_is_neither_a_number_nor_a_fraction_of_the_depth_is_refused(build, layer):
    with pytest.raises(ConfigError) as error:
        build(layer)
    assert repr(layer) in str(error.value)


def test_a_whole_number_given_as_a_float_is_told_what_a_fraction_is():
    with pytest.raises(ConfigError, match=r"fraction of the depth, in \(0, 1\), not 9.0; give a whole number"):
        Stages({9.0: 0.7})


@pytest.mark.parametrize(
    "schedule",
    [
        Stages({4: 0.5}),
        Constant(0.5, start=4),
        Linear(start=4),
        Cosine(start=4),
        Power(start=4),
        Pyramid(stages=2, start=4),
    ],
)
def test_a_layer_beyond_the_last_is_refused(schedule):
    assert schedule.resolve(5)[:4] == [1.0] * 4
    with pytest.raises(ConfigError, match="layer 4 does not exist; the model has layers 0 to 3"):
        schedule.resolve(4)


@pytest.mark.parametrize(
    ("schedule", "part"),
    [
        (Stages({1: 0.5, 2: 0.6}), "rises from 0.5 to 0.6 at layer 2"),
        (Linear(first=0.3, last=0.9), "rises from 0.3"),
        (Cosine(first=0.3, last=0.9), "rises from 0.3"),
        (Power(first=0.3, last=0.9), "rises from 0.3"),
        (Pyramid(stages=5), "4 layers are too few for 5 parts"),
        (Pyramid(stages=4, start=2), "4 layers are too few for 4 parts"),
        (Stages({1: 0.5, 0.25: 0.4}), "two stages fall on layer 1 of 4"),
        (OwnSchedule(ratios=(1.0, 0.5)), "gives 2 keep ratios for 4 layers"),
        (OwnSchedule(ratios=(1.0, 0.5, 0.0, 0.0)), "keep ratio 0.0 at layer 2"),
        (OwnSchedule(ratios=(1.5, 0.5, 0.5, 0.5)), "keep ratio 1.5 at layer 0"),
    ],
)
def test_ratios_that_do_not_fit_the_model_are_refused(schedule, part: str):
    with pytest.raises(ConfigError) as error:
        schedule.resolve(4)
    assert part in str(error.value)
    assert str(schedule) in str(error.value)


@given(plain_schedules, st.integers(2, 48))
def test_what_resolves_is_one_falling_ratio_per_layer(schedule, layers: int):
    try:
        keep = schedule.resolve(layers)
    except ConfigError:
        return
    assert len(keep) == layers
    assert all(0 < ratio <= 1 for ratio in keep)
    assert keep == sorted(keep, reverse=True)


@given(st.integers(1, 200), st.integers(1, 200))
def test_a_fraction_means_the_layer_that_many_layers_have(numerator: int, layers: int):
    """k/n of n layers is layer k, whatever the rounding of floats makes of it."""
    if numerator < layers:
        keep = Stages({numerator / layers: 0.5}).resolve(layers)
        assert keep == [1.0] * numerator + [0.5] * (layers - numerator)


# -- files and presets ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"", "holds nothing"),
        (b"# only a comment\n", "holds nothing"),
        (b"- a\n- b\n", "['a', 'b'], not a mapping"),
        (b"just text", "'just text', not a mapping"),
        (b"scorer: [unclosed", "not plain YAML or JSON"),
        (b"{1: 2}", "unknown field 1"),
        (b"scorer: !!python/object/apply:os.getcwd []", "not plain YAML or JSON"),
        (b"!!python/name:os.system", "not plain YAML or JSON"),
        (b"\x89PNG\r\n\x1a\n\xff", "not text"),
        (b"scorer: a\0b", "not plain YAML or JSON"),
        (b"scorer: {name: Randon}", "Did you mean 'Random'?"),
        (b"schedule: {name: Stages, stages: {x: 0.5}}", "Stages"),
    ],
)
def test_a_broken_configuration_file_is_refused(tmp_path, data: bytes, part: str):
    path = tmp_path / "broken.yaml"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as error:
        LazyConfig.load(path)
    assert part in str(error.value)
    if "Did you mean" not in part and part != "Stages":
        assert str(path) in str(error.value) or "unknown field 1" in part


def test_a_configuration_file_that_cannot_be_read_is_refused(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError) as error:
            LazyConfig.load(path)
        assert repr(str(path)) in str(error.value)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_fits_a_model(name: str):
    config = LazyConfig.preset(name)
    assert LazyConfig.from_text(config.to_yaml()) == config
    cuts = config.schedule.cuts(24, Phase(is_prefill=True, context_tokens=4096))
    assert (cuts == {}) == (name in ("dense", "snapkv", "h2o", "streamingllm")), "these compute the whole prompt"
    assert LazyPipeline.from_preset(name).config == config


def test_the_paper_preset_is_the_default():
    assert LazyConfig.preset("paper") == LazyConfig()
    assert LazyConfig().schedule.resolve(10) == [1.0] * 3 + [0.7] * 3 + [0.49] * 3 + [0.343]
    assert json.loads(LazyConfig().to_json())["scorer"] == {"name": "LastTokenAttention"}


def test_an_unknown_preset_names_the_nearest_and_all():
    with pytest.raises(ConfigError, match=r"unknown preset 'papr'\. Did you mean 'paper'") as error:
        LazyConfig.preset("papr")
    for name in preset_names():
        assert name in str(error.value)


def test_the_dense_preset_fits_a_model_of_one_layer():
    assert LazyConfig.preset("dense").schedule.resolve(1) == [1.0]
