"""Generating: everything transformers' generate offers, batches, chunks, streams, statistics, callbacks."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from lazyllm import (
    AuxCache,
    Callback,
    Constant,
    DropCache,
    InputError,
    LastTokenAttention,
    LazyPipeline,
    ProgressBar,
    Protect,
    Random,
    Stages,
    TokenTrace,
    WindowAttention,
)
from lazyllm.models.flops import causal_pairs
from lazyllm.models.names import CACHE_NAMES
from tests.histories import CACHES, PROTECT, SCORERS, schedules
from tests.tiny import LAYERS, random_ids, tiny_model

GREEDY = {"do_sample": False, "eos_token_id": -1}
PRUNING = {"scorer": WindowAttention(window=4), "schedule": Stages({1: 0.6, 3: 0.3})}


@given(SCORERS, schedules(), CACHES, PROTECT, st.lists(st.integers(1, 24), min_size=2, max_size=4))
def test_a_row_does_not_depend_on_its_neighbours(scorer, schedule, cache, protect, lengths):
    pipe = LazyPipeline(tiny_model(), scorer=scorer, schedule=schedule, cache=cache, protect=protect)
    prompts = [random_ids(1, length, seed)[0].tolist() for seed, length in enumerate(lengths)]
    together = pipe.generate(prompts, max_new_tokens=5, **GREEDY)
    for prompt, result in zip(prompts, together, strict=True):
        # A one-token prompt has no prefill of its own beside longer ones: its first step is theirs.
        alone = pipe.generate(prompt, max_new_tokens=5, **GREEDY)
        assert result.token_ids == alone.token_ids
        assert result.stats.tokens_per_layer == alone.stats.tokens_per_layer


@given(st.integers(1, 7), st.sampled_from([AuxCache(), DropCache()]))
def test_chunked_prefill_computes_each_token_once_and_may_revive(chunk, cache):
    pipe = LazyPipeline(tiny_model(), cache=cache, **PRUNING)
    trace = TokenTrace()
    pipe.callbacks = (trace,)
    pipe.generate(random_ids(1, 30)[0], prefill_chunk_size=chunk, max_new_tokens=4, **GREEDY)
    work = [(event.layer, token) for step in trace.steps for event in step for token in event.rows[0].computed.tolist()]
    assert len(work) == len(set(work))


@pytest.mark.parametrize("chunk", [1, 4, 29, 30, 64])
def test_chunked_prefill_at_keep_one_is_the_stock_result(chunk: int):
    model, ids = tiny_model(), random_ids(1, 30)
    pipe = LazyPipeline(model, scorer=LastTokenAttention(), schedule=Constant(1.0), cache=AuxCache())
    stock = model.generate(ids, max_new_tokens=6, **GREEDY)[0, 30:].tolist()
    assert pipe.generate(ids[0], prefill_chunk_size=chunk, max_new_tokens=6, **GREEDY).token_ids == stock


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_gives_the_same_reply(side: str):
    pipe = LazyPipeline(tiny_model(), cache=AuxCache(), **PRUNING)
    short, long = random_ids(1, 11)[0], random_ids(1, 17, 1)[0]
    ids = torch.zeros(2, 17, dtype=torch.long)
    mask = torch.zeros_like(ids)
    place = slice(6, 17) if side == "left" else slice(0, 11)
    ids[0, place], mask[0, place] = short, 1
    ids[1], mask[1] = long, 1
    with pipe.attached() as model:
        out = model.generate(ids, attention_mask=mask, past_key_values=pipe.new_cache(), max_new_tokens=6, **GREEDY)
    for row, prompt in enumerate((short, long)):
        assert out[row, 17:].tolist() == pipe.generate(prompt, max_new_tokens=6, **GREEDY).token_ids


def test_right_padding_survives_chunked_prefill():
    pipe = LazyPipeline(tiny_model(), scorer=Random(), schedule=Constant(1.0), cache=AuxCache())
    ids, mask = random_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, 5:] = 0
    with pipe.attached() as model:
        out = model.generate(
            ids, attention_mask=mask, past_key_values=pipe.new_cache(), prefill_chunk_size=4, max_new_tokens=4, **GREEDY
        )
    assert out[0, 12:].tolist() == pipe.generate(ids[0, :5], max_new_tokens=4, **GREEDY).token_ids


class Ban(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores[:, 50:] = -torch.inf
        return scores


class StopAt(StoppingCriteria):
    def __call__(self, input_ids, scores, **_):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 20)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 1.3, "top_k": 20},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "repetition_penalty": 1.4},
        {"do_sample": False, "logits_processor": LogitsProcessorList([Ban()])},
        {"do_sample": False, "stopping_criteria": StoppingCriteriaList([StopAt()])},
        {"do_sample": False, "prompt_lookup_num_tokens": 3},
    ],
    ids=lambda options: "-".join(options),
)
def test_keep_one_agrees_with_transformers_in_every_mode(options: dict):
    model, ids = tiny_model(), random_ids(1, 15)
    pipe = LazyPipeline(model, scorer=LastTokenAttention(), schedule=Constant(1.0), cache=AuxCache())
    torch.manual_seed(7)
    stock = model.generate(ids, max_new_tokens=8, eos_token_id=-1, **options)[:, 15:].tolist()
    torch.manual_seed(7)
    results = pipe.generate(ids[0], max_new_tokens=8, eos_token_id=-1, **options)
    results = results if isinstance(results, list) else [results]
    assert [result.token_ids for result in results] == stock


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_beams_and_assisted_decoding_run_under_pruning(options: dict):
    trace = TokenTrace()
    pipe = LazyPipeline(tiny_model(), cache=AuxCache(), callbacks=[trace], **PRUNING)
    prompt = random_ids(1, 8)[0].repeat(3)
    result = pipe.generate(prompt, max_new_tokens=6, **GREEDY, **options)
    assert len(result.token_ids) == 6


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_carries_a_conversation_on(name: str):
    pipe = LazyPipeline(tiny_model(), cache=AuxCache(), **PRUNING)
    first, second = random_ids(1, 20)[0].tolist(), random_ids(1, 6, 1)[0].tolist()
    cache = pipe.new_cache()
    given = {name: cache, **GREEDY}
    reply = pipe.generate(first, max_new_tokens=4, **given)
    follow = pipe.generate([*first, *reply.token_ids, *second], max_new_tokens=3, **given)
    assert cache.get_seq_length() == 20 + 4 + 6 + 2
    assert follow.stats.tokens_per_layer[0][0].computed == 7
    assert follow.stats.revived_tokens > 0
    assert follow.stats.computed_fraction > 1, "reviving the first prompt's tokens is this reply's work"


def test_a_prompt_shorter_than_its_cache_is_refused():
    pipe = LazyPipeline(tiny_model(), cache=AuxCache(), **PRUNING)
    cache = pipe.new_cache()
    pipe.generate(random_ids(1, 10)[0], past_key_values=cache, max_new_tokens=2, **GREEDY)
    with pytest.raises(InputError, match="10 tokens, its cache already holds 11"):
        pipe.generate(random_ids(1, 10)[0], past_key_values=cache, max_new_tokens=2, **GREEDY)
    assert cache.get_seq_length() == 11


def test_statistics_of_a_dense_run_are_the_plain_formulas():
    result = LazyPipeline.from_preset("dense", tiny_model()).generate(random_ids(1, 10)[0], max_new_tokens=4, **GREEDY)
    stats, model = result.stats, tiny_model()
    assert (stats.prompt_tokens, stats.new_tokens, stats.prefill_steps) == (10, 4, 1)
    assert stats.computed_fraction == stats.prefill_computed_fraction == stats.predicted_speedup == 1
    assert stats.revived_tokens == stats.aux_bytes == 0
    assert stats.flops == stats.dense_flops
    weights = sum(p.numel() for p in model.get_decoder().layers.parameters() if p.ndim == 2)
    pairs = causal_pairs(13, None) * LAYERS
    head = model.lm_head.weight.numel()
    assert stats.dense_flops == 13 * 2 * weights + 4 * 4 * 8 * pairs + 4 * 2 * head
    assert stats.kv_bytes == 13 * LAYERS * 2 * 2 * 8 * 8
    assert stats.ttft_seconds > 0
    assert stats.seconds_per_output_token > 0
    assert stats.peak_bytes > 0


def test_statistics_count_what_pruning_left_out():
    pipe = LazyPipeline(tiny_model(), scorer=Random(), schedule=Stages({2: 0.5}), cache=AuxCache(decode="reuse"))
    stats = pipe.generate(random_ids(1, 20)[0], max_new_tokens=3, **GREEDY).stats
    assert [layer.computed for layer in stats.tokens_per_layer[0]] == [20, 20, 10, 10]
    assert stats.prefill_computed_fraction == 60 / 80
    assert stats.computed_fraction == (60 + 8) / (80 + 8)
    assert stats.predicted_speedup > 1.2
    assert stats.aux_bytes == 10 * 32 * 8
    assert json.loads(stats.to_json())["tokens_per_layer"][0][2] == {"visible": 10, "computed": 10, "revived": 0}


def test_the_figure_is_drawn(tmp_path):
    stats = (
        LazyPipeline(tiny_model(), cache=AuxCache(), **PRUNING)
        .generate(random_ids(1, 20)[0], max_new_tokens=5, **GREEDY)
        .stats
    )
    path = stats.plot(tmp_path / "tokens.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_recipe_is_tried_on_several_models():
    recipe = LazyPipeline(scorer="WindowAttention(window=2)", schedule="Constant(0.5)", cache="AuxCache")
    for family in ("llama", "qwen3"):
        stats = recipe.bind(tiny_model(family)).generate(random_ids(1, 12)[0], max_new_tokens=1).stats
        assert stats.tokens_per_layer[0][1].computed == 6


def test_protected_tokens_are_never_pruned():
    trace = TokenTrace()
    protect = Protect(sinks=2, recent=3, spans=[(7, 9)])
    pipe = LazyPipeline(
        tiny_model(), scorer=Random(5), schedule=Stages({1: 0.1}), cache=AuxCache(), protect=protect, callbacks=[trace]
    )
    pipe.generate(random_ids(1, 20)[0], max_new_tokens=3, **GREEDY)
    for step, events in enumerate(trace.steps):
        recent = {17 + step, 18 + step, 19 + step}
        assert {0, 1, 7, 8} | recent | set(range(20, 20 + step)) == set(events[1].rows[0].visible.tolist())


def test_callbacks_hear_every_event_in_order():
    heard = []

    class Listener(Callback):
        def on_prefill_start(self, event):
            heard.append(("prefill", event.new_tokens))

        def on_layer_end(self, event):
            heard.append(("layer", event.layer))

        def on_step_end(self, event):
            heard.append(("step", event.is_prefill, event.context_tokens))

        def on_generate_end(self, event):
            heard.append(("end", len(event.results)))

    pipe = LazyPipeline.from_preset("dense", tiny_model(), callbacks=[Listener()])
    pipe.generate(random_ids(1, 6)[0], max_new_tokens=2, **GREEDY)
    layers = [("layer", layer) for layer in range(LAYERS)]
    assert heard == [
        ("prefill", (6,)), *layers, ("step", True, (6,)), *layers, ("step", False, (7,)), ("end", 1),
    ]  # fmt: skip


def test_a_trace_is_saved_and_read_back(tmp_path):
    trace = TokenTrace()
    pipe = LazyPipeline(tiny_model(), cache=AuxCache(), callbacks=[trace, ProgressBar(min_tokens=1)], **PRUNING)
    pipe.generate(random_ids(1, 12)[0], max_new_tokens=3, **GREEDY)
    records = json.loads(trace.save(tmp_path / "trace.json").read_text())["records"]
    assert len(records) == 3 * LAYERS
    with np.load(trace.save(tmp_path / "trace.npz")) as arrays:
        for record in records:
            for kind in ("visible", "computed", "attended", "revived"):
                key = f"step{record['step']}/layer{record['layer']}/row0/{kind}"
                assert arrays[key].tolist() == record[kind]


def test_output_of_transformers_is_handed_on():
    pipe = LazyPipeline.from_preset("dense", tiny_model())
    result = pipe.generate(
        random_ids(1, 6)[0], max_new_tokens=3, return_dict_in_generate=True, output_scores=True, **GREEDY
    )
    assert len(result.output.scores) == 3
