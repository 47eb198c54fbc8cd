"""What the benchmark of the limits counts and writes, on tiny models; what it times is no business of a test."""

import json
from collections import Counter
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace

import pytest
import torch

from lazyllm import AuxCache, Constant, DropCache, InputError, LazyConfig, LazyLLMError, LazyPipeline, TokenTrace
from lazyllm.evaluation import data, limits, memory
from lazyllm.evaluation.bench import Spread, StockRun, TimedRun, Timing, Workload, reply_options
from lazyllm.evaluation.options import names_in, numbers_in
from lazyllm.evaluation.plots import plot_growth, plot_reply_sizes
from tests.tiny import LAYERS, random_ids, tiny_model

CPU = torch.device("cpu")
HIDDEN, FLOAT64 = 32, 8
LAYER_TOKEN = 2 * 2 * 8 * FLOAT64
"""Bytes of K and V of one token at one layer: two key-value heads of eight."""
PROMPT = random_ids(1, 40)[0].tolist()
KEEP_FROM_2 = LazyConfig(schedule=Constant(keep=0.3, start=2), cache=AuxCache())


@pytest.fixture(scope="module")
def setup():
    """Ten layers, so that every preset fits."""
    return limits.Setup(
        model=tiny_model(layers=10),
        name="tiny",
        text=random_ids(1, 200)[0].tolist(),
        question=[5, 6, 7],
        rounds=1,
        command="python limits.py --quick",
    )


@pytest.mark.parametrize("seed", range(5))
def test_ragged_lengths_are_spread_over_the_range(seed: int):
    lengths = limits.ragged_lengths(8, 200, 4000, seed=seed)
    assert lengths == limits.ragged_lengths(8, 200, 4000, seed=seed)
    eighths = [(length - 200) * 8 // 3801 for length in lengths]
    assert sorted(eighths) == list(range(8))
    assert lengths != sorted(lengths)


def test_ragged_lengths_reach_both_ends():
    assert sorted(limits.ragged_lengths(3, 7, 9, seed=0)) == [7, 8, 9]
    assert limits.ragged_lengths(1, 5, 5, seed=0) == [5]
    with pytest.raises(InputError, match="4 rows of different lengths do not fit between 7 and 9"):
        limits.ragged_lengths(4, 7, 9, seed=0)


def test_every_prompt_of_a_batch_ends_with_the_question(setup):
    work = limits.ragged_batch(setup, [20, 50, 35])
    assert [len(prompt) for prompt in work.prompts] == [20, 50, 35]
    assert all(
        prompt[start:stop] == [5, 6, 7] for prompt, (start, stop) in zip(work.prompts, work.questions, strict=True)
    )
    assert all(stop == len(prompt) for prompt, (_, stop) in zip(work.prompts, work.questions, strict=True))
    assert len({tuple(prompt[:10]) for prompt in work.prompts}) == 3
    assert work.padded_over_real == 150 / 105


def test_a_prompt_needs_room_for_the_question_and_a_text_as_long(setup):
    for tokens in (3, 204):
        with pytest.raises(InputError, match=f"4 to 203 tokens .*not {tokens}"):
            setup.prompt(tokens)
    assert setup.prompt(203) == ([*setup.text, 5, 6, 7], (200, 203))


def test_the_unmodified_model_gets_a_ragged_batch_padded_on_the_left(monkeypatch):
    model, seen = tiny_model(), {}
    monkeypatch.setattr(model, "generate", lambda ids, **options: seen.update(ids=ids, **options) or ids)
    StockRun(model, "sdpa").reply(Workload([[5, 6], [7, 8, 9]], 1), reply_options(1))
    assert seen["ids"].tolist() == [[0, 5, 6], [7, 8, 9]]
    assert seen["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]


def test_ratios_are_of_the_same_round(setup):
    class Scripted(TimedRun):
        def __init__(self, name, timings):
            super().__init__(name, is_stock=True)
            self.timings = iter([Timing(9.0), *timings])

        def run(self, work):
            return next(self.timings)

    base = Scripted("base", [Timing(2.0, (1.0,)), Timing(6.0, (3.0, 1.0)), Timing(3.0, (2.0,))])
    own = Scripted("own", [Timing(1.0, (1.0,)), Timing(1.0, (3.0, 1.0)), Timing(3.0, (5.0,))])
    work = Workload([PROMPT, PROMPT[:10]], 2)
    entry = limits.time_runs(replace(setup, rounds=3), [base, own], work, baseline="base")[1]
    assert (entry.speedup.minimum, entry.speedup.median, entry.speedup.maximum) == (1, 2, 6)
    assert (entry.reply_ratio.minimum, entry.reply_ratio.median, entry.reply_ratio.maximum) == (0.5, 2 / 3, 8 / 5)
    assert entry.second_token_seconds.median == 3
    assert entry.prompt_tokens == 50
    assert entry.milliseconds_per_prompt_token == Spread(20, 20, 60, 20, 40)
    assert entry.once is None


def test_reviving_everything_computes_each_layer_token_once():
    trace, model, reply = TokenTrace(), tiny_model(), 6
    pipe = LazyPipeline.from_config(limits.everything_revived(), model, callbacks=[trace])
    stats = pipe.generate(PROMPT, **reply_options(reply)).stats
    computed = Counter(
        (layer, token)
        for step in trace.steps
        for layer, event in enumerate(step)
        for token in event.rows[0].computed.tolist()
    )
    shown = len(PROMPT) + reply - 1
    assert computed == Counter((layer, token) for layer in range(LAYERS) for token in range(shown))
    prefill, first, *others = stats.tokens_per_layer
    assert [layer.computed for layer in prefill] == [len(PROMPT), 1, 1, 1]
    assert [layer.revived for layer in first] == [0, *[len(PROMPT) - 1] * (LAYERS - 1)]
    assert all(layer.revived == 0 for step in others for layer in step)
    assert stats.computed_fraction == 1
    assert limits.computed_once(stats)
    assert stats.aux_bytes == 0


def test_a_reply_that_leaves_tokens_behind_did_not_compute_all_once():
    stats = LazyPipeline.from_config(KEEP_FROM_2, tiny_model()).generate(PROMPT, **reply_options(2)).stats
    assert not limits.computed_once(stats)


@pytest.mark.parametrize(
    ("config", "kept_at", "parked"),
    [
        (LazyConfig.preset("dense"), [40, 40, 40, 40], 0),
        (KEEP_FROM_2, [40, 40, 12, 12], 28),
        (KEEP_FROM_2.model_copy(update={"cache": DropCache()}), [40, 40, 12, 12], 0),
        (LazyConfig(schedule="Stages({1: 0.5, 3: 0.25})", cache=AuxCache(decode="reuse")), [40, 20, 20, 10], 30),
    ],
)
def test_bytes_are_those_of_the_tokens_kept_and_of_those_that_wait(config, kept_at: list[int], parked: int):
    found = memory.measure_footprint(tiny_model(), config, PROMPT, (38, 40), reply_tokens=3)
    assert found.kv_bytes == sum(kept_at) * LAYER_TOKEN
    assert found.aux_bytes == parked * HIDDEN * FLOAT64
    assert found.total_bytes == found.kv_bytes + found.aux_bytes
    assert (found.prompt_tokens, found.reply_tokens) == (40, 3)
    assert found.peak_bytes is None
    if not config.cache.selects_in_decode(1):
        assert found.reply_kv_bytes == found.kv_bytes + 3 * LAYERS * LAYER_TOKEN
        assert found.reply_aux_bytes == found.aux_bytes


def test_a_cache_grows_by_what_a_reply_computes():
    steps = memory.trace_reply(tiny_model(), KEEP_FROM_2, PROMPT, None, 7)
    sizes = memory.reply_sizes(steps, every=3)
    assert [size.reply_tokens for size in sizes] == [3, 6, 7]
    assert all(size.adds_up for size in sizes)
    assert all(size.new_bytes == size.reply_tokens * LAYERS * LAYER_TOKEN for size in sizes)
    assert sizes[0].revived_bytes > 0
    assert sizes[-1].kv_bytes == steps[0].kv_bytes + sizes[-1].grown_bytes
    leaking = [*steps[:-1], replace(steps[-1], kv_bytes=steps[-1].kv_bytes + 1)]
    assert [size.adds_up for size in memory.reply_sizes(leaking, every=3)] == [True, True, False]


@pytest.mark.skipif(not memory.STATM.exists(), reason="the system does not tell what a process holds")
def test_the_process_is_seen_to_hold_what_is_held():
    before = memory.held_bytes(CPU)
    block = torch.ones(8 << 20)
    with_block = memory.held_bytes(CPU)
    assert with_block - before > 0.9 * block.nbytes
    del block
    assert with_block - memory.held_bytes(CPU) > 0.9 * (32 << 20)


def test_a_system_that_does_not_tell_gives_no_figure(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "STATM", tmp_path / "statm")
    assert memory.held_bytes(CPU) is None
    assert memory.measure_footprint(tiny_model(), KEEP_FROM_2, PROMPT, None, 1).held_bytes is None


def test_a_process_that_dies_is_an_error_of_ours(monkeypatch):
    class Dying:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, *_):
            future = Future()
            future.set_exception(BrokenProcessPool())
            return future

    monkeypatch.setattr(memory, "ProcessPoolExecutor", Dying)
    with pytest.raises(LazyLLMError, match="measured 40 tokens died"):
        memory.measure_in_fresh_process("model", "float32", "cpu", KEEP_FROM_2, PROMPT, None, 1)


@pytest.fixture(scope="module")
def sections(setup):
    def measure(config, prompt, question):
        return memory.measure_footprint(setup.model, config, prompt, question, 3)

    grown, entries = limits.growth(setup, [16, 48, 300])
    reply, sizes = limits.long_reply(setup, 60, 5, every=2)
    batch = limits.batch(setup, 3, 10, 60)
    return [grown, batch, limits.memory(setup, 60, measure), reply, limits.revival(setup, 60, 3)], entries, sizes


def test_sections_say_how_they_were_measured_and_hold_a_row_per_figure(sections, tmp_path):
    parts, _, _ = sections
    page, written = limits.save_sections(parts, tmp_path / "new", environment={"threads": 1})[::-1]
    assert page.read_text().count("\n## ") == len(parts) - 1
    for section in parts:
        text = section.markdown()
        assert text in page.read_text()
        for said in (
            "tiny",
            "10 layers",
            "tokens",
            "float64",
            "thread",
            "baseline",
            "python limits.py --quick",
            "Schedules",
        ):
            assert said in section.conditions
        table = [line for line in text.splitlines() if line.startswith("|")]
        assert len(table) == 2 + len(section.rows)
        assert {line.count("|") for line in table} == {len(section.columns) + 1}
    timed = [section for section in parts if section.part != "memory"]
    assert all("1 interleaved round after a warm-up" in section.conditions for section in timed)
    saved = json.loads(written.read_text())
    assert saved["environment"] == {"threads": 1}
    assert [len(section["records"]) for section in saved["sections"]] == [8, 3, 5, 3, 3]


def test_lengths_without_positions_are_left_out_and_said_so(sections, setup):
    (grown, *_), entries, _ = sections
    assert {entry.prompt_tokens for entry in entries} == {16, 48}
    assert list(grown.notes) == ["Left out: 300 tokens, the model has positions for 256."]
    with pytest.raises(InputError, match=r"positions for 256 tokens, every prompt is longer: \[300\]"):
        limits.growth(setup, [300])


def test_goals_are_compared_with_what_was_found(sections):
    _, batch, held, _, revived = sections[0]
    assert batch.notes[0].startswith("Goal, at least 0.95: speedup of dense / padding is ")
    assert [row[-1] for row in revived.rows] == ["-", "yes", "yes"]
    # Ten layers, 60 tokens, 18 kept from layer 2; the Aux state of 32 numbers weighs as much as K/V at one layer.
    share = (2 * 60 + 8 * 18 + 42) / 600
    assert held.notes == [
        f"Goal, at most 0.45: {limits.KEEP_CASE}: K/V and Aux over the K/V of dense is {share:.3f}, missed."
    ]
    assert limits._goal("x", 0.95, least=0.95).endswith("met.")
    assert limits._goal("x", 1.1501, most=1.15).endswith("missed.")


def test_figures_are_drawn(sections, tmp_path):
    _, entries, sizes = sections
    other = [replace(entry, dtype="bfloat16") for entry in entries]
    for path in (
        plot_growth([*entries, *other], tmp_path / "a" / "growth.png"),
        plot_reply_sizes(sizes, tmp_path / "b" / "reply.png"),
    ):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_lists_on_the_command_line():
    assert names_in(" a, b,") == ["a", "b"]
    assert numbers_in("1,20") == [1, 20]
    with pytest.raises(InputError, match="Did you mean 'growth'"):
        names_in("growt", known=("growth", "batch"))
    with pytest.raises(InputError, match="not '-3'"):
        numbers_in("4,-3")
    with pytest.raises(InputError, match="empty one"):
        numbers_in(" ,")


@pytest.mark.slow
def test_a_fresh_process_holds_what_is_counted():
    found = memory.measure_in_fresh_process(
        str(data.packaged_model()), "float32", "cpu", LazyConfig.preset("dense"), PROMPT * 12, None, 1
    )
    assert found.kv_bytes == 480 * 30 * 2 * 3 * 64 * 4
    assert found.held_bytes is None or found.held_bytes == pytest.approx(found.total_bytes, rel=0.25)
