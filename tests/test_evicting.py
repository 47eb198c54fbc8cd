"""Caches that let K/V go: which ones, when, and what that does to the laws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lazyllm import (
    AccumulatedAttention,
    AuxCache,
    BudgetCache,
    Callback,
    ConfigError,
    Constant,
    EvictingCache,
    KeyNorm,
    LateInteraction,
    LazyConfig,
    LazyPipeline,
    MultiLayerAttention,
    NextLayerAttention,
    Protect,
    Random,
    SinkRecent,
    Stages,
    WindowAttention,
)
from tests.histories import History, new_history, policies, scripts
from tests.replay import assert_replays
from tests.tiny import FAMILY_KERNELS, LAYERS, random_ids, tiny_model

KEEP_ALL = Constant(1.0, start=0)
LENGTH = 20


def evicting(cache: EvictingCache, protect: Protect | None = None, *, family: str = "llama", kernel="sdpa") -> History:
    """A dense history whose cache evicts."""
    protect = protect or Protect(generated=False)
    return new_history(tiny_model(family, kernel), schedule=KEEP_ALL, cache=cache, protect=protect)


def stored(history: History, row: int = 0) -> list[list[int]]:
    """By layer, the tokens that have K/V."""
    return [sorted(store.tokens.tolist()) for store in history.cache.rows[row].stores]


# -- eviction -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "kernel"), FAMILY_KERNELS)
def test_a_prefill_leaves_each_layer_what_its_window_attends_to(family: str, kernel: str):
    ids = random_ids(1, LENGTH)
    with torch.no_grad():
        attention = tiny_model(family, "eager")(ids, output_attentions=True).attentions
    history = evicting(
        EvictingCache(scorer=WindowAttention(window=3), budget=8), Protect(recent=3), family=family, kernel=kernel
    )
    history.step(ids)
    for layer, found in enumerate(stored(history)):
        scores = attention[layer][0, :, -3:, :-3].mean((0, 1))
        assert found == sorted([*scores.topk(5).indices.tolist(), 17, 18, 19])


def test_heavy_hitters_are_the_ones_of_all_queries_so_far():
    ids = random_ids(1, LENGTH)
    history = evicting(
        EvictingCache(scorer=AccumulatedAttention(), budget=8, when="decode"), Protect(recent=4, generated=False)
    )
    history.step(ids)
    with torch.no_grad():
        attention = tiny_model("llama", "eager")(ids, output_attentions=True).attentions[0][0].sum(1).mean(0)
    assert stored(history)[0] == sorted([*attention[:16].topk(4).indices.tolist(), 16, 17, 18, 19])
    tally = history.cache.rows[0].tallies["evict", 0].clone()
    history.step(random_ids(1, 1, 5))
    assert [len(tokens) for tokens in stored(history)] == [8] * LAYERS
    after = history.cache.rows[0].tallies["evict", 0]
    attended = history.steps[-1][0].rows[0].attended
    assert abs(float(after.sum() - tally.sum()) - 1) < 1e-9
    assert set(torch.nonzero(after[:LENGTH] > tally).flatten().tolist()) <= set(attended.tolist())
    assert_replays(history)


def test_a_rolling_window_keeps_the_first_and_the_last_tokens():
    history = evicting(EvictingCache(scorer=SinkRecent(2), budget=6, when="decode"))
    history.step(random_ids(1, LENGTH))
    assert stored(history) == [[0, 1, 16, 17, 18, 19]] * LAYERS
    for step in range(1, 4):
        history.step(random_ids(1, 1, step))
        last = LENGTH - 1 + step
        assert stored(history) == [[0, 1, last - 3, last - 2, last - 1, last]] * LAYERS
    assert_replays(history)


def test_every_says_how_often_decode_evicts():
    history = evicting(EvictingCache(scorer=SinkRecent(2), budget=6, when="decode", every=3))
    history.step(random_ids(1, LENGTH))
    lengths = []
    for step in range(6):
        history.step(random_ids(1, 1, step))
        lengths.append(len(stored(history)[0]))
    assert lengths == [7, 8, 6, 7, 8, 6]


def test_prefill_eviction_leaves_the_reply_alone():
    history = evicting(EvictingCache(scorer=KeyNorm(), budget=0.25))
    history.step(random_ids(1, LENGTH))
    assert [len(tokens) for tokens in stored(history)] == [5] * LAYERS
    history.step(random_ids(1, 1, 1))
    assert [len(tokens) for tokens in stored(history)] == [6] * LAYERS


def test_protected_tokens_stay_even_beyond_the_budget():
    history = evicting(EvictingCache(scorer=Random(), budget=2), Protect(sinks=3, recent=4))
    history.step(random_ids(1, LENGTH))
    assert stored(history) == [[0, 1, 2, 16, 17, 18, 19]] * LAYERS


EVICTING = st.builds(
    EvictingCache,
    scorer=st.sampled_from([WindowAttention(window=2), AccumulatedAttention(), KeyNorm(), SinkRecent(1), Random()]),
    budget=st.sampled_from([1, 4, 9, 0.3, 1.0]),
    when=st.sampled_from(["prefill", "decode"]),
    every=st.integers(1, 3),
)


@given(st.data())
def test_what_was_attended_replays_whatever_was_evicted(data):
    rows = data.draw(st.integers(1, 2))
    history = new_history(tiny_model(), cache=data.draw(EVICTING), **data.draw(policies()))
    for ids, real in data.draw(scripts(rows)):
        history.step(ids, real)
    assert_replays(history)
    work = [
        (event.layer, token) for step in history.steps for event in step for token in event.rows[0].computed.tolist()
    ]
    assert len(work) == len(set(work)), "what is evicted is not computed again"
    for row in history.cache.rows:
        for layer, store in enumerate(row.stores):
            assert set(store.tokens.tolist()) <= set(torch.nonzero(row.ledger.depth > layer).flatten().tolist())


def test_a_step_that_fails_evicts_nothing():
    class Boom(Callback):
        def on_layer_end(self, event):
            if event.layer == 2:
                raise RuntimeError("boom")

    history = evicting(EvictingCache(scorer=AccumulatedAttention(), budget=6, when="decode"))
    history.step(random_ids(1, LENGTH))
    before, tallies = stored(history), dict(history.cache.rows[0].tallies)
    with pytest.raises(RuntimeError), torch.no_grad(), history.pipe.attached(callbacks=[Boom()]) as model:
        model(random_ids(1, 1, 1), past_key_values=history.cache)
    assert stored(history) == before
    assert history.cache.rows[0].tallies.keys() == tallies.keys()
    assert all(torch.equal(history.cache.rows[0].tallies[key], tally) for key, tally in tallies.items())


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"attend": "visible"}, "attend"),
        ({"budget": 0}, "budget"),
        ({"budget": 1.5}, "budget"),
        ({"every": 0}, "every"),
        ({"when": "never"}, "when"),
        ({"scorer": LateInteraction()}, "LateInteraction reads more than the layer"),
        ({"scorer": NextLayerAttention()}, "NextLayerAttention reads more"),
        ({"scorer": MultiLayerAttention()}, "MultiLayerAttention reads more"),
    ],
    ids=str,
)
def test_an_eviction_that_cannot_be_is_refused(fields, part: str):
    with pytest.raises(ConfigError, match=part):
        EvictingCache(**fields)


class Greedy(AuxCache):
    """Wants to evict and to revive."""

    @property
    def eviction(self):
        return EvictingCache().eviction


def test_a_cache_that_evicts_may_not_revive():
    with pytest.raises(ConfigError, match="Greedy revives tokens and evicts K/V"):
        LazyPipeline(tiny_model(), cache=Greedy())


def test_an_eviction_survives_json_and_yaml():
    config = LazyConfig(cache=EvictingCache(scorer=AccumulatedAttention(window=3), budget=7, when="decode"))
    assert LazyConfig.from_text(LazyConfig.from_text(config.to_json()).to_yaml()) == config
    assert LazyConfig.from_text(LazyConfig(cache=EvictingCache(budget=1.0)).to_yaml()).cache.budget == 1.0


# -- a bound on tokens ------------------------------------------------------------------------------------


def bounded(tokens: int, **options) -> History:
    return new_history(
        tiny_model(),
        scorer=Random(),
        schedule=Stages({1: 0.7, 2: 0.5}),
        cache=BudgetCache(tokens=tokens, sinks=1, **options),
    )


def check_ledger(history: History) -> None:
    for row in history.cache.rows:
        depth = row.ledger.depth
        assert row.ledger.at_depth == torch.bincount(depth, minlength=LAYERS + 1).tolist()
        assert torch.equal(row.frontier.tokens, torch.nonzero(depth < LAYERS).flatten())
        for layer, store in enumerate(row.stores):
            assert sorted(store.tokens.tolist()) == torch.nonzero(depth > layer).flatten().tolist()


@pytest.mark.parametrize("layer", [1, 2, 3, 0.5])
def test_no_more_tokens_are_deep_than_the_budget_allows(layer):
    history = bounded(6, layer=layer)
    number = 2 if layer == 0.5 else layer
    history.step(random_ids(2, LENGTH))
    for seed in range(1, 6):
        history.step(random_ids(2, 1, seed))
        for row in history.cache.rows:
            assert int((row.ledger.depth > number).sum()) <= 6
        check_ledger(history)


def test_tokens_used_longest_ago_fall_out_first():
    history = bounded(5, decode="reuse", attend="visible")
    history.step(random_ids(1, 10))
    deep = torch.nonzero(history.cache.rows[0].ledger.depth == LAYERS).flatten().tolist()
    assert len(deep) == 5, "half of ten tokens enter the last layer"
    history.step(random_ids(1, 1, 3))
    assert int((history.cache.rows[0].ledger.depth > 1).sum()) == 5
    expected = ([0] if 0 in deep else []) + [token for token in deep if token][1:] + [10]
    assert torch.nonzero(history.cache.rows[0].ledger.depth > 1).flatten().tolist() == expected


def test_without_revival_afterwards_a_retreat_changes_no_logits():
    history = bounded(4, decode="reuse")
    history.step(random_ids(1, LENGTH))
    for seed in range(1, 5):
        history.step(random_ids(1, 1, seed))
    assert history.cache.rows[0].retreated > 0
    assert_replays(history)


def test_work_done_twice_is_at_most_what_was_given_up():
    history = bounded(4)
    history.step(random_ids(1, LENGTH))
    for seed in range(1, 8):
        history.step(random_ids(1, 1, seed))
    computed = sum(event.rows[0].computed.numel() for step in history.steps for event in step)
    once = int(history.cache.rows[0].ledger.depth.sum())
    assert history.cache.rows[0].retreated > 0
    assert computed - once == history.cache.rows[0].retreated
    check_ledger(history)


def test_a_budget_that_is_never_reached_changes_nothing():
    plain = new_history(tiny_model(), scorer=Random(), schedule=Stages({1: 0.7, 2: 0.5}), cache=AuxCache())
    roomy = bounded(999)
    for history in (plain, roomy):
        history.step(random_ids(1, LENGTH))
        for seed in range(1, 4):
            history.step(random_ids(1, 1, seed))
    for one, other in zip(plain.logits, roomy.logits, strict=True):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))
    assert roomy.cache.rows[0].retreated == 0


def test_scorers_that_look_back_forget_what_is_computed_again():
    history = new_history(
        tiny_model(),
        scorer=LateInteraction(query=3),
        schedule=Stages({1: 0.8, 3: 0.5}),
        cache=BudgetCache(tokens=5, layer=1),
    )
    history.step(random_ids(1, LENGTH))
    for seed in range(1, 6):
        history.step(random_ids(1, 1, seed))
    row = history.cache.rows[0]
    assert row.retreated > 0
    for layer, memory in row.memories.items():
        assert len(memory) == int((row.ledger.depth > layer).sum())


@pytest.mark.parametrize(("fields", "part"), [({"layer": 0}, "layer 1 or later"), ({"tokens": 0}, "tokens")], ids=str)
def test_a_budget_that_cannot_be_is_refused(fields, part: str):
    with pytest.raises(ConfigError, match=part):
        BudgetCache(**fields)


def test_a_budget_beyond_the_model_is_refused():
    history = bounded(4, layer=7)
    with pytest.raises(ConfigError, match="layer 7 does not exist"):
        history.step(random_ids(1, LENGTH))
