"""Prompts that begin alike: what is found is used, at keep ratio 1 it changes nothing, and room is bounded."""

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lazyllm import (
    AuxCache,
    CacheError,
    Callback,
    Constant,
    InputError,
    LastTokenAttention,
    LazyPipeline,
    PrefixCache,
    Stages,
    TokenTrace,
    WindowAttention,
)
from lazyllm.caches.row import Row
from lazyllm.contexts.prefixes import common_prefix, held_ids, take_up
from tests.histories import CACHES, FORGETTING_CACHES, new_history, policies
from tests.tiny import random_ids, tiny_model

GREEDY = {"do_sample": False, "eos_token_id": -1, "max_new_tokens": 4}
PRUNING = {"scorer": WindowAttention(window=4), "schedule": Stages({1: 0.6, 3: 0.3}), "cache": AuxCache()}
DENSE = {"scorer": LastTokenAttention(), "schedule": Constant(1.0), "cache": AuxCache()}
DOCUMENT = random_ids(1, 40)[0].tolist()


def question(seed: int) -> list[int]:
    return DOCUMENT + random_ids(1, 6, seed)[0].tolist()


# -- what is common ----------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2), max_size=8), st.lists(st.integers(0, 2), max_size=8))
def test_a_common_prefix_is_the_longest_one(left, right):
    length = common_prefix(left, right)
    assert left[:length] == right[:length]
    assert left[length : length + 1] != right[length : length + 1] or length == min(len(left), len(right))
    assert length == common_prefix(torch.tensor(right, dtype=torch.long), left)


@given(st.data())
def test_a_cache_is_cropped_to_what_a_prompt_begins_with(data):
    history = new_history(tiny_model(), cache=data.draw(st.one_of(CACHES, FORGETTING_CACHES)), **data.draw(policies()))
    ids = random_ids(1, data.draw(st.integers(1, 20)))
    history.step(ids)
    held = ids[0].tolist()
    wanted = held[: data.draw(st.integers(0, len(held)))] + data.draw(st.lists(st.integers(3, 90), max_size=5))
    wanted = wanted or [3]
    kept = take_up(history.cache, wanted)
    assert kept == min(common_prefix(held, wanted), len(wanted) - 1)
    assert held_ids(history.cache).tolist() == wanted[:kept]
    assert history.cache.columns == kept


def test_an_empty_cache_holds_nothing():
    assert take_up(LazyPipeline(tiny_model()).new_cache(), [3, 4]) == 0


def test_a_cache_of_several_rows_or_with_padding_is_refused():
    history = new_history(tiny_model(), **PRUNING)
    real = torch.ones(2, 9, dtype=torch.long)
    real[0, :3] = 0
    history.step(random_ids(2, 9), real)
    with pytest.raises(CacheError, match="holds 2 rows"):
        take_up(history.cache, [3, 4])
    history.cache.batch_select_indices(torch.tensor([0]))
    with pytest.raises(CacheError, match="6 tokens in 9 columns"):
        take_up(history.cache, [3, 4])


# -- calls that share --------------------------------------------------------------------------------


def test_a_second_call_computes_what_is_new_alone():
    pipe, prefixes = LazyPipeline(tiny_model(), **PRUNING), PrefixCache(min_tokens=8)
    first = pipe.generate(question(1), prefixes=prefixes, **GREEDY)
    second = pipe.generate(question(2), prefixes=prefixes, **GREEDY)
    assert (first.stats.reused_tokens, second.stats.reused_tokens) == (0, 40)
    assert [result.stats.tokens_per_layer[0][0].computed for result in (first, second)] == [46, 6]
    stats = prefixes.stats
    assert (stats.hits, stats.misses, stats.reused_tokens, stats.entries) == (1, 1, 40, 2)


def test_what_a_call_says_does_not_depend_on_others_at_keep_one():
    pipe, prefixes = LazyPipeline(tiny_model(), **DENSE), PrefixCache(min_tokens=1)
    for prompt in (question(1), question(2), question(1)[:30], question(1), DOCUMENT, DOCUMENT[:-1], question(2)):
        assert pipe.generate(prompt, prefixes=prefixes, **GREEDY).token_ids == pipe.generate(prompt, **GREEDY).token_ids
    assert prefixes.stats.hits == 6


def test_a_reply_is_found_by_the_next_turn():
    pipe, prefixes = LazyPipeline(tiny_model(), **PRUNING), PrefixCache(min_tokens=1)
    reply = pipe.generate(question(1), prefixes=prefixes, **GREEDY)
    turn = [*question(1), *reply.token_ids, 7, 8, 9]
    follow = pipe.generate(turn, prefixes=prefixes, **GREEDY)
    assert follow.stats.reused_tokens == 46 + 3, "the last token of the reply was not computed yet"
    assert prefixes.stats.entries == 1, "the longer one stands in for the shorter one"


def test_no_layer_computes_a_token_twice_along_a_chain_of_calls():
    trace, prefixes = TokenTrace(), PrefixCache(min_tokens=1)
    pipe = LazyPipeline(tiny_model(), callbacks=[trace], **{**PRUNING, "cache": AuxCache(decode="reuse")})
    for prompt in (question(1), [*question(1), 8, 9], [*question(1), 8, 9, 10, 11]):
        pipe.generate(prompt, prefixes=prefixes, **{**GREEDY, "max_new_tokens": 1})
    work = [(event.layer, token) for step in trace.steps for event in step for token in event.rows[0].computed.tolist()]
    assert len(work) == len(set(work)) > 46 * 2
    assert any(event.rows[0].revived.numel() for step in trace.steps for event in step)


def test_the_longest_beginning_is_taken_and_of_equals_the_latest():
    pipe, prefixes = LazyPipeline(tiny_model(), **PRUNING), PrefixCache(min_tokens=1)
    long, short = question(1), [*DOCUMENT[:20], *random_ids(1, 9, 5)[0].tolist()]
    for prompt in (long, short):
        pipe.generate(prompt, prefixes=prefixes, **GREEDY)
    assert pipe.generate([*long[:44], 3, 4], prefixes=prefixes, **GREEDY).stats.reused_tokens == 44
    assert pipe.generate([*short[:25], 3, 4], prefixes=prefixes, **GREEDY).stats.reused_tokens == 25


def test_a_beginning_that_is_too_short_is_not_taken():
    pipe, prefixes = LazyPipeline(tiny_model(), **PRUNING), PrefixCache(min_tokens=41)
    for seed in (1, 2):
        assert pipe.generate(question(seed), prefixes=prefixes, **GREEDY).stats.reused_tokens == 0
    assert prefixes.stats.misses == 2


def test_entries_stay_as_they_are():
    pipe, prefixes = LazyPipeline(tiny_model(), **PRUNING), PrefixCache(min_tokens=1)
    pipe.generate(question(1), prefixes=prefixes, **GREEDY)
    entry = prefixes._entries[0].cache
    depths, columns = entry.rows[0].ledger.depth.clone(), entry.columns
    pipe.generate(question(2), prefixes=prefixes, **GREEDY)
    assert entry.columns == columns
    assert torch.equal(entry.rows[0].ledger.depth, depths)


# -- room --------------------------------------------------------------------------------------------


def test_bytes_are_bounded_and_what_was_used_longest_ago_leaves():
    pipe = LazyPipeline(tiny_model(), **DENSE)
    one = PrefixCache(min_tokens=1)
    pipe.generate(question(1), prefixes=one, **GREEDY)
    prefixes = PrefixCache(max_bytes=int(one.stats.bytes * 2.5), min_tokens=1)
    prompts = [[4 + seed, *random_ids(1, 45, seed)[0].tolist()] for seed in range(3)]
    again = {**GREEDY, "max_new_tokens": 1}  # the first prompt is used, and what comes of it is there already
    for prompt, options in ((prompts[0], GREEDY), (prompts[1], GREEDY), (prompts[0], again), (prompts[2], GREEDY)):
        pipe.generate(prompt, prefixes=prefixes, **options)
        assert prefixes.stats.bytes <= prefixes.max_bytes
    assert (prefixes.stats.entries, prefixes.stats.evictions) == (2, 1)
    reused = [pipe.generate([*prompt, 7], prefixes=prefixes, **GREEDY).stats.reused_tokens for prompt in prompts[:2]]
    assert reused == [46, 0], "the second was used longest ago"


def test_what_is_kept_has_no_room_to_grow():
    pipe, prefixes = LazyPipeline(tiny_model(), **PRUNING), PrefixCache(min_tokens=1)
    prompt = random_ids(1, 120)[0].tolist()
    for more in (0, 100):
        pipe.generate(
            [*prompt, *random_ids(1, more, 1)[0].tolist()], prefixes=prefixes, prefill_chunk_size=32, **GREEDY
        )
    for entry in prefixes._entries:
        assert entry.bytes <= allocated(entry.cache.rows[0]) <= entry.bytes * 17 / 16


def allocated(row: Row) -> int:
    """Bytes of the memory that keys, values and states of a row lie in."""
    parts = [tensor for store in row.stores for tensor in store.read()]
    parts += [memory._states.read() for memory in row.memories.values()]
    places = {place.data_ptr(): place for place in (part.untyped_storage() for part in (*parts, row.frontier._packed))}
    return sum(place.nbytes() for place in places.values())


def test_an_outcome_that_is_too_large_leaves_the_others_alone():
    pipe = LazyPipeline(tiny_model(), **PRUNING)
    small = PrefixCache(min_tokens=1)
    pipe.generate(question(1)[:20], prefixes=small, **GREEDY)
    prefixes = PrefixCache(max_bytes=small.stats.bytes, min_tokens=1)
    pipe.generate(question(1)[:20], prefixes=prefixes, **GREEDY)
    pipe.generate(random_ids(1, 60, 3)[0], prefixes=prefixes, **GREEDY)
    assert (prefixes.stats.entries, prefixes.stats.evictions) == (1, 0)


def test_the_same_prompt_again_is_one_entry():
    pipe, prefixes = LazyPipeline(tiny_model(), **DENSE), PrefixCache(min_tokens=1)
    for new_tokens in (4, 4, 1):
        pipe.generate(question(1), prefixes=prefixes, **{**GREEDY, "max_new_tokens": new_tokens})
    assert prefixes.stats.entries == 1
    prefixes.clear()
    assert (prefixes.stats.entries, prefixes.stats.bytes, prefixes.stats.hits) == (0, 0, 2)


# -- what is kept apart ------------------------------------------------------------------------------


def test_another_model_or_configuration_finds_nothing():
    prefixes = PrefixCache(min_tokens=1)
    pipes = [
        LazyPipeline(tiny_model(), **PRUNING),
        LazyPipeline(tiny_model("qwen3"), **PRUNING),
        LazyPipeline(tiny_model(), **{**PRUNING, "schedule": Stages({1: 0.5})}),
        LazyPipeline(tiny_model(), **{**PRUNING, "cache": AuxCache(attend="cached")}),
    ]
    for pipe in pipes:
        assert pipe.generate(question(1), prefixes=prefixes, **GREEDY).stats.reused_tokens == 0
    assert LazyPipeline(tiny_model(), **PRUNING).generate(question(1), prefixes=prefixes, **GREEDY).stats.reused_tokens


def test_a_call_that_fails_leaves_nothing():
    class Fail(Callback):
        def on_layer_end(self, event):
            if not event.is_prefill:
                raise RuntimeError("boom")

    pipe, prefixes = LazyPipeline(tiny_model(), **PRUNING), PrefixCache(min_tokens=1)
    with pytest.raises(RuntimeError, match="boom"):
        pipe.generate(question(1), prefixes=prefixes, callbacks=[Fail()], **GREEDY)
    assert prefixes.stats.entries == 0


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_several_rows_are_refused(options: dict):
    pipe, prefixes = LazyPipeline(tiny_model(), **PRUNING), PrefixCache()
    with pytest.raises(InputError, match="one row each"):
        pipe.generate(question(1), prefixes=prefixes, **{**GREEDY, **options})
    with pytest.raises(InputError, match="one row each"):
        pipe.generate([question(1), question(2)], prefixes=prefixes, **GREEDY)
    with pytest.raises(InputError, match="not both"):
        pipe.generate(question(1), prefixes=prefixes, past_key_values=pipe.new_cache(), **GREEDY)


@pytest.mark.parametrize("name", ["max_bytes", "min_tokens"])
def test_numbers_below_one_are_refused(name: str):
    with pytest.raises(InputError, match=f"{name} of a PrefixCache is a number from 1 on, not 0"):
        PrefixCache(**{name: 0})


def test_threads_share_one():
    pipe, prefixes = LazyPipeline(tiny_model(), **DENSE), PrefixCache(min_tokens=1)
    expected = {seed: pipe.generate(question(seed), **GREEDY).token_ids for seed in range(4)}
    got: dict[int, list[list[int]]] = {seed: [] for seed in expected}

    def run(seed: int) -> None:
        for _ in range(3):
            got[seed].append(pipe.generate(question(seed), prefixes=prefixes, **GREEDY).token_ids)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == {seed: [reply] * 3 for seed, reply in expected.items()}
    assert prefixes.stats.hits + prefixes.stats.misses == 12
