"""The cost model against what runs on tiny models count, exactly; its times against laws. Nothing is timed here."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, DynamicCache
from typer.testing import CliRunner

from lazyllm import (
    AttentionMass,
    AuxCache,
    ConfigError,
    Constant,
    Cosine,
    DropCache,
    FullBelow,
    Funnel,
    InputError,
    LastTokenAttention,
    LateInteraction,
    LazyConfig,
    LazyPipeline,
    Linear,
    Pooled,
    Protect,
    Pyramid,
    Random,
    ScoreGap,
    Stages,
    TokenBudget,
    TwoHop,
    UnsupportedModelError,
    WindowAttention,
    preset_names,
)
from lazyllm.cli.main import app
from lazyllm.costs import Device, ModelShape, Rate, calibrate, entering_tokens, full_below_break_even, predict
from lazyllm.costs import calibrate as calibration
from lazyllm.costs.device import data_sheets
from lazyllm.costs.predict import MEASURED_KEPT
from lazyllm.costs.shape import named_shapes
from lazyllm.evaluation import predictions
from lazyllm.evaluation.bench import Spread
from lazyllm.evaluation.plots import plot_checks, plot_prediction
from lazyllm.evaluation.sections import save_page
from tests.tiny import FAMILIES, LAYERS, WINDOW, random_ids, tiny_model

PROMPT = 60
SMALL = ModelShape(layers=8, hidden=64, intermediate=128, heads=4, kv_heads=4, head_dim=16, vocabulary=100)


def flat_device(**numbers) -> Device:
    """Float64, the same rate at every size, nothing but the work; numbers may be replaced."""
    rate = Rate.flat(1e9)
    plain = {
        "linear": rate,
        "attention": rate,
        "moving": rate,
        "standardising": 1e9,
        "bytes_per_second": 1e15,
        "memory_bytes": 1e9,
    }
    return Device(**{"name": "flat", "dtype": "float64", **plain, **numbers})


FREE = Rate.flat(1e30)
ONLY_LINEAR = {"attention": FREE, "moving": FREE, "bytes_per_second": 1e30}
POLICIES = {
    "stages": LazyConfig(scorer=LastTokenAttention(), schedule=Stages({1: 0.6, 3: 0.3})),
    "protected": LazyConfig(schedule=Constant(0.1, start=2), protect=Protect(sinks=7, recent=11)),
    "before layer 0": LazyConfig(scorer=Random(), schedule=Constant(0.5, start=0), cache=DropCache()),
    "waiting as embeddings": LazyConfig(scorer=Random(), schedule=Constant(0.5, start=0)),
    "line": LazyConfig(scorer=WindowAttention(window=4), schedule=Linear(0.9, 0.2), cache=AuxCache(decode="reuse")),
    "curve": LazyConfig(schedule=Cosine(0.9, 0.2)),
    "pyramid": LazyConfig(schedule=Pyramid(stages=3)),
    "budget": LazyConfig(schedule=TokenBudget({1: 25, 3: 10})),
    "budget of more": LazyConfig(schedule=TokenBudget({1: PROMPT, 2: PROMPT - 1})),
    "budget of protected": LazyConfig(schedule=TokenBudget({2: 5}), protect=Protect(sinks=7, recent=11)),
    "states": LazyConfig(scorer=LateInteraction(query=5), schedule=Stages({1: 0.7, 2: 0.4})),
    "query is protected": LazyConfig(scorer=LateInteraction(), schedule=Constant(0.2)),
    "short": LazyConfig(scorer=LateInteraction(), schedule=FullBelow(PROMPT + 1, Constant(0.2))),
    "dense": LazyConfig.preset("dense"),
}


def run(family: str, config: LazyConfig):
    """Statistics of a prefill of PROMPT tokens."""
    model = tiny_model(family, "eager")
    return LazyPipeline.from_config(config, model).generate(random_ids(1, PROMPT)[0].tolist(), max_new_tokens=1).stats


def predicted(family: str, config: LazyConfig, **options):
    shape = ModelShape.of(tiny_model(family, "eager").config)
    return predict(shape, config, flat_device(), tokens=PROMPT, asked=False, **options)


# -- counts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["stages", "dense"])
def test_operations_are_those_that_a_run_counts(family: str, name: str):
    stats, prediction = run(family, POLICIES[name]), predicted(family, POLICIES[name])
    assert prediction.pruned.flops == stats.flops
    assert prediction.dense.flops == stats.dense_flops
    assert prediction.pruned.flops < prediction.dense.flops or name == "dense"


@pytest.mark.parametrize("name", POLICIES)
def test_tokens_and_bytes_are_those_of_a_run(name: str):
    stats, prediction = run("llama", POLICIES[name]), predicted("llama", POLICIES[name])
    assert list(prediction.entering) == [layer.computed for layer in stats.tokens_per_layer[0]]
    assert prediction.pruned.flops == stats.flops
    assert prediction.pruned.kv_bytes == stats.kv_bytes
    assert prediction.pruned.aux_bytes == stats.aux_bytes


@pytest.mark.parametrize("preset", preset_names())
def test_presets_without_a_share_of_their_own_are_counted_as_they_run(preset: str):
    config = LazyConfig.preset(preset)
    family = "llama"
    if preset == "static-pruning" or preset == "random-drop":
        config = config.model_copy(update={"schedule": Stages({0.3: 0.5})})
    assert predicted(family, config).pruned.kv_bytes == run(family, config).kv_bytes


def test_an_adapting_cut_keeps_what_it_is_said_to_keep():
    config = LazyConfig(
        scorer=LateInteraction(query=4), schedule=Funnel((AttentionMass(0.6, start=1), AttentionMass(0.3, start=3)))
    )
    stats = run("llama", config)
    counts = [layer.computed for layer in stats.tokens_per_layer[0]]
    assert PROMPT > counts[1] > counts[3]
    prediction = predicted("llama", config, kept={1: counts[1] / PROMPT, 3: counts[3] / PROMPT})
    assert list(prediction.entering) == counts
    assert prediction.pruned.aux_bytes == stats.aux_bytes
    assert prediction.assumed == ()


@pytest.mark.parametrize(("family", "held"), [("llama", PROMPT), ("mistral", WINDOW)])
def test_the_unmodified_model_keeps_what_its_window_allows(family: str, held: int):
    shape = ModelShape.of(tiny_model(family).config)
    prediction = predict(shape, POLICIES["dense"], flat_device(), tokens=PROMPT)
    assert prediction.dense.kv_bytes == LAYERS * held * shape.key_values * 8
    assert prediction.pruned.kv_bytes == LAYERS * PROMPT * shape.key_values * 8


def test_the_unmodified_models_bytes_are_those_of_its_own_cache():
    model = tiny_model()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(random_ids(1, PROMPT), past_key_values=cache)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert predicted("llama", POLICIES["dense"]).dense.kv_bytes == held


@pytest.mark.parametrize(
    ("scorer", "compared"),
    [
        (Random(), 0),
        (LastTokenAttention(), 1),
        (WindowAttention(window=9), 9),
        (LateInteraction(), 32),
        (Pooled(WindowAttention(window=9)), 9),
        (TwoHop(LateInteraction(), tokens=100), 132),
    ],
)
def test_a_scorer_says_how_many_tokens_it_compares_with(scorer, compared: int):
    assert scorer.compares == compared


# -- shapes ------------------------------------------------------------------------------------------

MILLIONS = {
    "llama-3.2-1b": 1236,
    "llama-3.2-3b": 3213,
    "llama-3.1-8b": 8030,
    "llama-3.1-70b": 70554,
    "llama-3.1-405b": 405853,
    "qwen2.5-7b": 7616,
    "qwen3-30b-a3b": 30532,
    "gemma-3-27b": 27009,
    "mixtral-8x7b": 46703,
    "smollm2-135m": 135,
}


@pytest.mark.parametrize("name", named_shapes())
def test_named_shapes_have_the_published_number_of_weights(name: str):
    assert ModelShape.named(name).weights == pytest.approx(MILLIONS[name] * 1e6, rel=0.005)


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_count_all_weights_but_norms_and_biases(family: str):
    model = tiny_model(family, "eager")
    matrices = sum(weight.numel() for weight in model.parameters() if weight.ndim > 1)
    assert ModelShape.of(model.config).weights == matrices


def test_windows_repeat_over_the_depth():
    shape = ModelShape.named("gemma-3-27b")
    assert [shape.window(layer) for layer in (0, 5, 6, 11)] == [1024, None, 1024, None]


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("starcoder2", {}, "layer 0 of this starcoder2"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "layer 1 of this qwen3"),
    ],
)
def test_layers_of_another_build_have_no_shape(family: str, fields: dict, message: str):
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 16,
    }
    config = AutoConfig.for_model(family, **sizes, num_key_value_heads=2, **fields)
    with pytest.raises(UnsupportedModelError, match=message):
        ModelShape.of(config)


def test_layers_without_attention_have_no_shape():
    config = AutoConfig.for_model("llama", num_hidden_layers=2)
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UnsupportedModelError, match="linear_attention"):
        ModelShape.of(config)


def test_reading_a_configuration_leaves_it_as_it_was():
    config = tiny_model().config
    before = config.to_dict(), config._attn_implementation
    ModelShape.of(config)
    assert (config.to_dict(), config._attn_implementation) == before


# -- times -------------------------------------------------------------------------------------------


def test_nothing_pruned_costs_what_the_unmodified_model_costs():
    for config in (POLICIES["dense"], LazyConfig(schedule=Constant(1.0))):
        prediction = predict(SMALL, config, flat_device(cut_seconds=1.0), tokens=1000)
        assert prediction.pruned.prefill == prediction.dense.prefill
        assert prediction.speedup == prediction.keep_limit == 1
        assert prediction.break_even_tokens is None


def test_linear_time_is_operations_over_rate():
    prediction = predict(SMALL, POLICIES["dense"], flat_device(**ONLY_LINEAR), tokens=1000)
    assert prediction.dense.ttft_seconds == pytest.approx(
        (1000 * sum(SMALL.costs.per_token) + SMALL.costs.per_logits) / 1e9
    )


def test_a_decode_step_reads_weights_and_what_is_cached():
    device = flat_device(linear=FREE, attention=FREE, moving=FREE, bytes_per_second=1e9)
    config = LazyConfig(schedule=Constant(0.5), cache=DropCache())
    prediction = predict(SMALL, config, device, tokens=1000)
    weights = 8 * (SMALL.weights - SMALL.head_weights)
    for cost in (prediction.dense, prediction.pruned):
        assert cost.seconds_per_output_token == pytest.approx((weights + cost.kv_bytes) / 1e9)
    assert prediction.pruned.kv_bytes == prediction.dense.kv_bytes * (1 + 7 * 0.5) / 8


def test_few_tokens_take_as_long_as_reading_the_weights():
    device = flat_device(bytes_per_second=1e6, attention=FREE, moving=FREE)
    one, four = (predict(SMALL, POLICIES["dense"], device, tokens=tokens).dense.prefill for tokens in (1, 4))
    assert one.linear == four.linear == pytest.approx(8 * sum(m.stored for m in SMALL.matrices) * SMALL.layers / 1e6)


def test_a_mixture_reads_the_experts_that_are_visited():
    mixture = SMALL.model_copy(update={"experts": 8, "active_experts": 2})
    device = flat_device(linear=FREE, attention=FREE, moving=FREE, bytes_per_second=1e6)

    def read(tokens: int) -> float:
        seconds = predict(mixture, POLICIES["dense"], device, tokens=tokens).dense.prefill.linear
        return seconds * 1e6 / 8 / SMALL.layers

    *shared, _, _, expert = mixture.matrices
    always = sum(matrix.stored for matrix in shared[:5])
    one = 3 * expert.inputs * expert.outputs
    assert [round((read(tokens) - always) / one, 6) for tokens in (1, 2, 4, 9)] == [2, 4, 8, 8]


lengths = st.integers(50, 100_000)
shares = st.floats(0.01, 1)
configs = st.sampled_from([POLICIES["stages"], POLICIES["protected"], POLICIES["states"], POLICIES["dense"]])


@given(configs, lengths, st.integers(1, 10_000))
def test_more_tokens_cost_more(config: LazyConfig, tokens: int, more: int):
    short, long = (predict(SMALL, config, flat_device(), tokens=count) for count in (tokens, tokens + more))
    for name in ("dense", "pruned"):
        shorter, longer = getattr(short, name), getattr(long, name)
        assert shorter.ttft_seconds < longer.ttft_seconds
        assert shorter.kv_bytes < longer.kv_bytes
        assert shorter.device_bytes < longer.device_bytes
        assert shorter.seconds_per_output_token <= longer.seconds_per_output_token


@given(lengths, shares, shares)
def test_a_smaller_share_never_costs_more_and_parks_more(tokens: int, one: float, other: float):
    less, more = (
        predict(SMALL, LazyConfig(schedule=Constant(keep)), flat_device(), tokens=tokens).pruned
        for keep in sorted((one, other))
    )
    assert less.ttft_seconds <= more.ttft_seconds + 1e-12
    assert less.kv_bytes <= more.kv_bytes
    assert less.aux_bytes >= more.aux_bytes


@given(lengths, st.lists(shares, min_size=2, max_size=2))
def test_entering_tokens_never_rise_and_hold_the_protected(tokens: int, kept: list[float]):
    high, low = sorted(kept, reverse=True)
    config = LazyConfig.preset("recommended")
    entering = entering_tokens(config, 12, tokens, kept={0: high, 1: low})
    assert list(entering) == sorted(entering, reverse=True)
    assert entering[-1] >= min(tokens, 68)
    assert entering[0] == tokens or tokens >= 512


# -- limits and break-even -----------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [Stages({2: 0.5, 4: 0.25}), Constant(0.25, start=4)])
def test_linear_layers_alone_reach_the_limit_of_the_mean_share(schedule):
    device = flat_device(**ONLY_LINEAR)
    shape = SMALL.model_copy(update={"vocabulary": 1})
    prediction = predict(shape, LazyConfig(schedule=schedule), device, tokens=100_000)
    mean = sum(schedule.resolve(8)) / 8
    assert prediction.keep_limit == pytest.approx(1 / mean)
    assert prediction.speedup == pytest.approx(1 / mean, rel=0.01)


def test_however_little_is_kept_the_dense_layers_remain():
    device = flat_device(**ONLY_LINEAR)
    config = LazyConfig(schedule=Constant(1e-9, start=2))
    prediction = predict(SMALL, config, device, tokens=100_000)
    assert prediction.layer_limit == 4
    assert prediction.speedup == pytest.approx(4, rel=0.01)
    assert prediction.speedup < prediction.layer_limit


def test_a_cut_before_layer_0_has_no_dense_layer():
    assert predict(SMALL, POLICIES["before layer 0"], flat_device(), tokens=100).layer_limit is None


@pytest.mark.parametrize("cut_seconds", [1e-3, 3e-3, 0.05])
def test_break_even_is_the_first_length_that_pays(cut_seconds: float):
    device, config = flat_device(cut_seconds=cut_seconds), POLICIES["stages"]
    least = predict(SMALL, config, device, tokens=10).break_even_tokens
    assert least > 2
    assert predict(SMALL, config, device, tokens=least).speedup > 1
    assert predict(SMALL, config, device, tokens=least - 1).speedup <= 1


def test_break_even_rises_with_the_cost_of_scoring():
    leasts = [
        predict(SMALL, POLICIES["stages"], flat_device(cut_seconds=seconds), tokens=10).break_even_tokens
        for seconds in (1e-4, 3e-3, 0.05)
    ]
    assert leasts == sorted(set(leasts))


def test_a_schedule_that_leaves_short_prompts_alone_pays_from_there_on():
    config = LazyConfig(schedule=FullBelow(700, Constant(0.3)))
    prediction = predict(SMALL, config, flat_device(), tokens=699)
    assert prediction.break_even_tokens == 700
    assert prediction.speedup == 1


def test_scoring_that_costs_more_than_it_saves_never_pays():
    device = flat_device(ranked_token_seconds=1.0, attention=FREE)
    prediction = predict(SMALL, POLICIES["stages"], device, tokens=10)
    assert prediction.break_even_tokens is None
    with pytest.raises(InputError, match="pays at no length on flat"):
        full_below_break_even(POLICIES["stages"], prediction)


def test_prompts_too_short_to_pay_can_be_left_alone():
    config = POLICIES["stages"]
    prediction = predict(SMALL, config, flat_device(cut_seconds=3e-3), tokens=10)
    least = prediction.break_even_tokens
    spared = full_below_break_even(config, prediction)
    assert spared == config.model_copy(update={"schedule": FullBelow(least, config.schedule)})
    assert predict(SMALL, spared, flat_device(cut_seconds=3e-3), tokens=least - 1).speedup == 1
    assert full_below_break_even(spared, prediction) == spared


@pytest.mark.parametrize(("length", "expected"), [(5, 700), (900, 900)])
def test_of_two_lengths_the_longer_one_holds(length: int, expected: int):
    schedule = FullBelow.at_least(length, FullBelow(700, Constant(0.3)))
    assert schedule == FullBelow(expected, Constant(0.3))


# -- decode --------------------------------------------------------------------------------------------


def test_decode_pays_for_the_steps_that_select():
    device = flat_device(ranked_token_seconds=1e-3)

    def scoring(cache) -> float:
        config = LazyConfig(schedule=Constant(0.5), cache=cache)
        return predict(SMALL, config, device, tokens=1000).pruned.decode.scoring

    every = scoring(AuxCache(max_revived=0))
    assert every > 1
    assert scoring(AuxCache(max_revived=0, revive_every=4)) == pytest.approx(every / 4)
    assert scoring(AuxCache(decode="reuse")) == scoring(DropCache()) == 0


def test_revivals_without_a_bound_are_said_to_be_left_out():
    assert "revive" in " ".join(predict(SMALL, LazyConfig.preset("paper"), flat_device(), tokens=100).notes)
    assert predict(SMALL, LazyConfig.preset("recommended"), flat_device(), tokens=100).notes == ()


# -- groups --------------------------------------------------------------------------------------------

LINKED = {"link_bytes_per_second": 1e9}


@pytest.mark.parametrize("tokens", [1, 1000])
def test_two_devices_halve_linear_layers_attention_and_cache(tokens: int):
    device = flat_device(**LINKED, bytes_per_second=1e9)
    one, two = (predict(SMALL, POLICIES["dense"], device, tokens=tokens, parallel=count) for count in (1, 2))
    for step in ("prefill", "decode"):
        alone, shared = getattr(one.dense, step), getattr(two.dense, step)
        assert shared.linear == pytest.approx(alone.linear / 2)
        assert shared.attention == pytest.approx(alone.attention / 2)
        assert alone.links == 0 < shared.links
    assert two.dense.flops == one.dense.flops
    assert two.dense.device_bytes < one.dense.device_bytes


def test_the_group_exchanges_two_sums_per_layer():
    device = flat_device(**LINKED, link_seconds=0.5)
    links = predict(SMALL, POLICIES["dense"], device, tokens=1000, parallel=4).dense.prefill.links
    assert links == pytest.approx(8 * 2 * (0.5 + 2 * 3 / 4 * 1000 * 64 * 8 / 1e9))


@pytest.mark.parametrize("parallel", [1, 2])
def test_a_device_holds_its_share_of_weights_and_cache_and_the_widest_moment(parallel: int):
    config = POLICIES["stages"]
    cost = predict(SMALL, config, flat_device(**LINKED), tokens=1000, parallel=parallel).pruned
    widest = 8 * 1000 * (2 * 64 + 3 * 128 / parallel)
    assert cost.aux_bytes == 8 * 64 * 700
    assert cost.device_bytes == (8 * SMALL.weights + cost.kv_bytes) / parallel + cost.aux_bytes + widest


def test_what_does_not_fit_is_said():
    held = predict(SMALL, POLICIES["dense"], flat_device(), tokens=1000).dense.device_bytes
    assert held > 8 * SMALL.weights
    for memory, fits in ((held, True), (held - 1, False)):
        prediction = predict(SMALL, POLICIES["dense"], flat_device(memory_bytes=memory), tokens=1000)
        assert prediction.dense.fits is fits


def test_a_host_that_runs_ahead_costs_only_what_the_device_waits_for():
    slow = {"layer_seconds": 1.0}
    waits = predict(SMALL, POLICIES["dense"], flat_device(**slow), tokens=10).dense.prefill
    ahead = predict(SMALL, POLICIES["dense"], flat_device(**slow, overlaps=True), tokens=10).dense.prefill
    assert waits.host == 8
    assert ahead.total == pytest.approx(8 + ahead.head)


# -- devices -------------------------------------------------------------------------------------------


def test_a_rate_is_what_was_measured_and_in_between():
    rate = Rate(tokens=(10, 1000), widths=(4, 64), per_second=((1.0, 4.0), (100.0, 400.0)))
    assert [rate.at(tokens, width) for tokens in (10, 1000) for width in (4, 64)] == pytest.approx([1, 4, 100, 400])
    assert rate.at(100, 16) == pytest.approx(20)
    assert rate.at(1, 1) == pytest.approx(1)
    assert rate.at(1e9, 1e9) == pytest.approx(400)


@pytest.mark.parametrize("name", data_sheets())
def test_named_devices_are_slower_than_their_peaks_and_survive_saving(name: str, tmp_path):
    device = Device.named(name)
    assert device.linear.at(1, 1) < data_sheets()[name].teraflops * 1e12
    assert Device.load(device.save(tmp_path / "device.json")) == device


def test_this_machine_can_be_measured(monkeypatch, tmp_path):
    small = {"LINEAR_TOKENS": (4, 8), "LINEAR_WIDTHS": (8, 16), "ATTENTION_TOKENS": (4, 8), "ATTENTION_WIDTHS": (8, 16)}
    more = {
        "MOVING_TOKENS": (4, 8),
        "MOVING_HIDDEN": (128,),
        "READ_WIDTH": 64,
        "STATES": (8, 4),
        "RANKED_TOKENS": 64,
        "LEAST_SECONDS": 0,
    }
    for name, value in {**small, **more}.items():
        monkeypatch.setitem(calibration.__globals__, name, value)
    parts = []
    device = calibrate(repeats=1, on_part=parts.append)
    assert (device.dtype, device.overlaps, device.memory_bytes > 1e8) == ("float32", False, True)
    assert parts[0] == "matrix products"
    assert Device.load(device.save(tmp_path / "device.json")) == device
    assert predict(SMALL, POLICIES["stages"], device, tokens=100).dense.ttft_seconds > 0


# -- what cannot be ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "at least 1 token, got 0"),
        ({"parallel": 3}, "3 devices .* allowed: 1, 2, 4$"),
        ({"parallel": 0}, "0 devices"),
        ({"parallel": 2}, "'flat' has no link"),
        ({"kept": {1: 0.0}}, r"layer 1 must be in \(0, 1\], got 0.0"),
        ({"kept": {1: 1.5}}, "got 1.5"),
        ({"kept": {1: 0.2, 3: 0.4}}, "rises from 0.2 to 0.4 at layer 3"),
        ({"kept": {1: 0.2}}, "layer 1, but no cut adapts"),
    ],
)
def test_what_cannot_be_predicted_is_refused(options, message: str):
    with pytest.raises(InputError, match=message):
        predict(SMALL, POLICIES["stages"], flat_device(), **{"tokens": 100, **options})


def test_a_share_for_a_layer_without_an_adapting_cut_is_refused():
    with pytest.raises(InputError, match="layer 5, but cuts adapt before layers 0, 1"):
        predict(SMALL, LazyConfig.preset("recommended"), flat_device(), tokens=1000, kept={5: 0.2})


def test_a_schedule_that_does_not_fit_the_depth_is_refused():
    with pytest.raises(ConfigError, match="layer 9"):
        predict(SMALL, LazyConfig(schedule=Stages({9: 0.5})), flat_device(), tokens=100)


@pytest.mark.parametrize(("tokens", "counts"), [(9, (9, 9)), (100, (25, 10)), (1 << 20, (25, 10)), (999_983, (25, 10))])
def test_a_budget_is_predicted_by_count_at_every_length(tokens: int, counts: tuple[int, int]):
    config = POLICIES["budget"]
    few, less = counts
    assert entering_tokens(config, 4, tokens) == (tokens, few, few, less)
    assert predict(SMALL, config, flat_device(), tokens=tokens).kept == {}


def test_a_cut_at_a_gap_is_one_whose_share_must_be_given():
    config = LazyConfig(schedule=Funnel((TokenBudget({1: 700}), ScoreGap(ceiling=0.5, start=2))))
    prediction = predict(SMALL, config, flat_device(), tokens=1000)
    assert prediction.kept == {2: MEASURED_KEPT[-1]}
    assert prediction.assumed == (2,)
    assert prediction.entering == (1000, 700, *[220] * 6)
    assert entering_tokens(config, 8, 1000, kept={2: 0.8}) == (1000, 700, *[500] * 6)
    with pytest.raises(InputError, match="layer 1, but cuts adapt before layers 2"):
        entering_tokens(config, 8, 1000, kept={1: 0.8})


def test_shares_that_are_not_given_are_the_measured_ones():
    prediction = predict(SMALL, LazyConfig.preset("recommended"), flat_device(), tokens=1000, kept={1: 0.1})
    assert prediction.kept == {0: MEASURED_KEPT[0], 1: 0.1}
    assert prediction.assumed == (0,)
    one = LazyConfig(schedule=AttentionMass())
    assert predict(SMALL, one, flat_device(), tokens=1000).kept == {1: MEASURED_KEPT[-1]}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: ModelShape.named("llama-3.1-7b"), "Did you mean 'llama-3.1-70b'|Did you mean 'llama-3.1-8b'"),
        (lambda path: Device.named("h100-sx"), "Did you mean 'h100-sxm'"),
        (lambda path: Device.load(path / "none.json"), "No such file"),
        (lambda path: ModelShape(**{**dict(SMALL), "layers": 0}), "layers.*got 0"),
        (lambda path: Rate(tokens=(2, 1), widths=(1,), per_second=((1.0,), (1.0,))), "must ascend"),
        (lambda path: Rate(tokens=(1,), widths=(1, 2), per_second=((1.0,),)), "1 rows of 2 values"),
        (lambda path: flat_device(dtype="float31"), "float31"),
    ],
)
def test_unknown_names_and_wrong_numbers_are_refused(make, message: str, tmp_path):
    with pytest.raises((InputError, ConfigError), match=message):
        make(tmp_path)


def test_a_file_that_is_no_device_is_refused(tmp_path):
    path = tmp_path / "own.json"
    path.write_text('{"name": "own"}')
    with pytest.raises(InputError, match=r"own\.json.*is no device file"):
        Device.load(path)


def test_the_page_shows_what_is_predicted_now(monkeypatch):
    docs = Path(__file__).parents[1] / "docs"
    monkeypatch.syspath_prepend(docs / "figures")
    script = importlib.import_module("make_predict")
    shown = (docs / "predict.md").read_text(encoding="utf-8").splitlines()
    for row in (*script.dense_rows(), *script.pruned_rows()):
        assert row in shown


# -- command line --------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return lambda *arguments: CliRunner().invoke(app, ["predict", *map(str, arguments)])


def test_the_command_writes_what_predict_says(command, tmp_path):
    file, figure = tmp_path / "costs.json", tmp_path / "costs.png"
    result = command(
        "llama-3.1-70b", "--tokens", "1000,8192", "--parallel", 4, "--kept", "0:0.35,1:0.1", "--stats-json", file,
        "--plot", figure,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    shape, config, device = (
        ModelShape.named("llama-3.1-70b"),
        LazyConfig.preset("recommended"),
        Device.named("h100-sxm"),
    )
    predictions = [
        predict(shape, config, device, tokens=tokens, parallel=4, kept={0: 0.35, 1: 0.1}) for tokens in (1000, 8192)
    ]
    assert json.loads(file.read_text()) == json.loads(json.dumps([line.to_dict() for line in predictions]))
    assert f"{predictions[1].pruned.ttft_seconds:.3f}" in result.stdout
    assert "kept at layer 1: 10.0% of the context (given)" in result.stdout
    assert "4 x h100-sxm" in result.stdout
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_the_command_says_which_shares_it_assumed(command):
    out = command("llama-3.1-8b").stdout
    assert "kept at layer 1: 22.0% of the context (assumed" in out
    assert "pruning pays from 512 tokens on" in out
    assert "pruning pays at no length" in command("llama-3.1-8b", "--preset", "dense").stdout
    paper = command("llama-3.1-8b", "--preset", "paper").stdout
    assert "1.47x by the mean share" in paper
    assert "3.56x by the layers that everything enters" in paper
    assert "revive" in paper


def test_the_command_reads_a_models_folder_and_a_devices_file(command, tmp_path):
    tiny_model().config.save_pretrained(tmp_path)
    path = flat_device().save(tmp_path / "device.json")
    result = command(tmp_path, "--device", path, "--save-device", tmp_path / "again.json", "--tokens", "60")
    assert result.exit_code == 0, result.stderr
    assert "predicted on flat" in result.stdout
    assert Device.load(tmp_path / "again.json") == Device.load(path)


def test_the_command_saves_a_configuration_that_spares_short_prompts(command, tmp_path):
    mine = tmp_path / "mine.yaml"
    result = command("llama-3.1-8b", "--preset", "paper", "--save-config", mine)
    assert result.exit_code == 0, result.stderr
    least = int(re.search(r"pruning pays from ([\d,]+) tokens", result.stdout)[1].replace(",", ""))
    paper = LazyConfig.preset("paper")
    assert LazyConfig.load(mine) == paper.model_copy(update={"schedule": FullBelow(least, paper.schedule)})
    refused = command("llama-3.1-8b", "--preset", "dense", "--save-config", mine)
    assert refused.exit_code == 2
    assert "pays at no length" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["llama-3.1-7b"], "unknown model shape 'llama-3.1-7b'"),
        (["llama-3.1-8b", "--device", "h300"], "unknown device 'h300'"),
        (["llama-3.1-8b", "--device", "no.json"], "'no.json'"),
        (["llama-3.1-8b", "--tokens", "0"], "at least 1 token, got 0"),
        (["llama-3.1-8b", "--tokens", "many"], "'many'"),
        (["llama-3.1-8b", "--kept", "0:1.5"], "got 1.5"),
        (["llama-3.1-8b", "--kept", "0:.3,1:.5"], "rises from 0.3 to 0.5"),
        (["llama-3.1-8b", "--kept", "0.3"], "--kept is written like"),
        (["llama-3.1-8b", "--parallel", "3"], "allowed: 1, 2, 4, 8"),
        (["llama-3.1-8b", "--preset", "papier"], "Did you mean 'paper'"),
        (["llama-3.1-8b", "--stats-json", "no/such/costs.json"], "'no/such/costs.json'"),
        (["tests"], "cannot read the configuration of the model 'tests'"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_the_command_refuses_in_one_line(command, arguments, part: str):
    result = command(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("lazyllm: ")
    assert len(result.stderr.splitlines()) == 1
    assert part in result.stderr


def test_lengths_of_several_models_are_drawn(tmp_path):
    lines = [predict(SMALL, POLICIES["stages"], flat_device(), tokens=tokens) for tokens in (100, 1000)]
    path = plot_prediction({"one": lines, "two": lines[:1]}, tmp_path / "new" / "costs.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_predictions_stand_beside_what_was_measured(tmp_path):
    model = tiny_model(layers=10)
    checks = [
        one for tokens in (20, 30) for one in predictions.check("tiny", model, flat_device(), tokens, rounds=1, seed=0)
    ]
    assert [one.run for one in checks] == 2 * ["stock sdpa", *predictions.RUNS]
    assert all(one.predicted_seconds > 0 and one.measured_seconds.minimum > 0 for one in checks)
    section = predictions.section(checks, {"layers": 10, "device": "flat", "threads": 1}, 1, "python predict.py")
    for said in ("tiny", "10 layers", "20 to 30 tokens", "float32", "1 thread;", "baseline", "1 interleaved round "):
        assert said in section.conditions
    assert "Constant(0.3): `Constant(keep=0.3" in section.conditions
    assert save_page([section, section], tmp_path / "new" / "predict.md").read_text().count("\n## ") == 1
    assert plot_checks(checks, tmp_path / "new" / "predict.png").read_bytes().startswith(b"\x89PNG")


def test_an_error_is_relative_to_the_median_measured():
    measured = Spread.of([1.0, 2.0, 9.0])
    checks = [
        predictions.Check("m", run, 8, seconds, measured) for run, seconds in (("a", 3.0), ("b", 1.8), ("c", 2.0))
    ]
    assert [one.error for one in checks] == pytest.approx([0.5, -0.1, 0])
    assert predictions.errors_in_words(checks) == "median error 10.0%, worst 50.0%, of 3"
