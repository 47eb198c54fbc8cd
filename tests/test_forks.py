"""Forks: caches that go on from one context by themselves, and share its tensors until they write."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lazyllm import AuxCache, CacheError, Callback, LazyPipeline, Stages
from tests.histories import CACHES, FORGETTING_CACHES, ROUNDING_CACHES, History, Moving, batches, new_history, policies
from tests.replay import assert_replays
from tests.test_chunks import LiveBytes
from tests.tiny import random_ids, tiny_model

REVIVING = {
    "scorer": Moving(),
    "schedule": Stages({1: 0.6, 3: 0.3}),
    "cache": AuxCache(max_revived=2),
}
"""Decode steps revive two tokens at most, longer ones any number."""


def filled() -> History:
    """A history whose cache holds K/V, frontier states and remembered states, all written to more than once."""
    history = new_history(tiny_model(), **REVIVING)
    for ids in (random_ids(2, 20), random_ids(2, 6, 1), random_ids(2, 1, 2)):
        history.step(ids)
    return history


def big_tensors(history: History) -> list[torch.Tensor]:
    """Everything of a cache that grows with the width of the model, as it lies in memory."""
    tensors = []
    for row in history.cache.rows:
        for store in row.stores:
            tensors += store.read()
        tensors.append(row.frontier._packed)
        tensors += [memory._states.read() for memory in row.memories.values()]
    assert len(tensors) == 2 * (2 * 4 + 1 + 2)
    return tensors


def places(history: History) -> list[int]:
    return [tensor.data_ptr() for tensor in big_tensors(history)]


def test_a_fork_takes_no_memory_until_it_writes():
    history = filled()
    history.cache.rows[0].ledger.depth  # noqa: B018 - what is still to be noted is
    with LiveBytes() as live:
        forks = [history.fork() for _ in range(3)]
    assert live.peak == 0
    assert all(places(fork) == places(history) for fork in forks)
    assert all(fork.cache.kv_bytes == history.cache.kv_bytes for fork in forks)


@pytest.mark.parametrize("writer", ["fork", "original"])
def test_who_writes_first_leaves_the_other_as_it_was(writer: str):
    history = filled()
    fork = history.fork()
    first, second = (fork, history) if writer == "fork" else (history, fork)
    before, contents = places(second), [tensor.clone() for tensor in big_tensors(second)]
    depths = [row.ledger.depth.clone() for row in second.cache.rows]
    slots = [row.frontier.tokens for row in second.cache.rows]
    first.step(random_ids(2, 9, 5))
    assert not set(places(first)) & set(before), "every store was written to"
    assert any(event.rows[0].revived.numel() for event in first.steps[-1]), "the step must revive, or it proves little"
    assert places(second) == before
    assert all(torch.equal(*pair) for pair in zip(big_tensors(second), contents, strict=True))
    assert all(torch.equal(row.ledger.depth, depth) for row, depth in zip(second.cache.rows, depths, strict=True))
    assert all(torch.equal(row.frontier.tokens, held) for row, held in zip(second.cache.rows, slots, strict=True))
    second.step(random_ids(2, 9, 6))
    for one in (first, second):
        assert_replays(one)


@given(st.data())
def test_forks_do_not_know_of_each_other(data):
    """In any order of steps, each gives what a deep copy gives that is alone."""
    history = new_history(
        tiny_model(), cache=data.draw(st.one_of(CACHES, ROUNDING_CACHES, FORGETTING_CACHES)), **data.draw(policies())
    )
    history.step(*data.draw(batches(2, 12)))
    forks, alone = [history.fork() for _ in range(2)], [history.fork() for _ in range(2)]
    for one in alone:
        one.cache = copy.deepcopy(one.cache)
    for index in data.draw(st.lists(st.integers(0, 1), min_size=2, max_size=5)):
        ids, real = data.draw(batches(2, data.draw(st.sampled_from([1, 5]))))
        got, expected = forks[index].step(ids, real), alone[index].step(ids, real)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10, equal_nan=True)


def test_many_replies_over_one_context():
    pipe = LazyPipeline(tiny_model(), **REVIVING)
    greedy = {"do_sample": False, "eos_token_id": -1, "max_new_tokens": 4}
    document, context = random_ids(1, 30)[0].tolist(), pipe.new_cache()
    pipe.generate(document, past_key_values=context, **{**greedy, "max_new_tokens": 1})
    depths = context.rows[0].ledger.depth.clone()
    for seed in range(3):
        prompt = document + random_ids(1, 5, seed)[0].tolist()
        alone = pipe.generate(prompt, past_key_values=copy.deepcopy(context), **greedy)
        reply = pipe.generate(prompt, past_key_values=context.fork(), **greedy)
        assert reply.token_ids == alone.token_ids
        assert reply.stats.tokens_per_layer == alone.stats.tokens_per_layer
    assert context.columns == 30
    assert torch.equal(context.rows[0].ledger.depth, depths)


def test_a_fork_may_be_filled_while_the_other_is_claimed():
    history = filled()
    with history.cache.claim("generation"):
        fork = history.fork()
        fork.step(random_ids(2, 3))
    assert fork.cache.columns == history.cache.columns + 3


@pytest.mark.parametrize("action", ["fork", "save", "trim"])
def test_a_cache_in_the_middle_of_a_step_is_left_alone(action: str, tmp_path):
    class Act(Callback):
        def on_layer_end(self, event):
            getattr(cache, action)(*[tmp_path / "cache"] * (action == "save"))

    pipe = LazyPipeline(tiny_model(), callbacks=[Act()], **REVIVING)
    cache = pipe.new_cache()
    with torch.no_grad(), pipe.attached() as model, pytest.raises(CacheError, match="middle of a step"):
        model(random_ids(1, 9), past_key_values=cache, logits_to_keep=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("action", ["fork", "save"])
def test_between_the_steps_of_a_generation_it_may_be(action: str, tmp_path):
    class Act(Callback):
        def on_step_end(self, event):
            made.append(cache.fork() if action == "fork" else cache.save(tmp_path / str(cache.columns)))

    made: list = []
    pipe = LazyPipeline(tiny_model(), callbacks=[Act()], **REVIVING)
    cache = pipe.new_cache()
    pipe.generate(random_ids(1, 9)[0], past_key_values=cache, max_new_tokens=3, eos_token_id=-1, do_sample=False)
    taken = made if action == "fork" else [pipe.load_cache(path) for path in made]
    assert [one.columns for one in taken] == [9, 10, 11]


@pytest.mark.parametrize("modes", [(True, False, True, False), (False, True, False, True)])
def test_steps_may_run_in_and_out_of_inference_mode(modes):
    """Tensors made in inference mode must not be written to outside of it."""
    history, plain = (new_history(tiny_model(), **REVIVING) for _ in range(2))
    for number, inference in enumerate(modes):
        ids = random_ids(2, (14, 5, 1, 6)[number], number)
        with torch.inference_mode(inference):
            got = history.step(ids)
        assert torch.equal(got.nan_to_num(7), plain.step(ids).nan_to_num(7))
    history.cache.crop(-3)
    assert_replays(plain)
