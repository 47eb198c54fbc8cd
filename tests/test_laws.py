"""The eight laws of the design, each a property."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lazyllm import AuxCache, Constant, LastTokenAttention, LazyPipeline, PerPhase, Random, ScoreContext, Scorer, Stages
from lazyllm.caches.store import KeyValueStore
from tests.histories import AUX_CACHES, CACHES, History, new_history, policies, scripts
from tests.replay import assert_replays, replay
from tests.tiny import FAMILY_KERNELS, LAYERS, random_ids, tiny_model


@st.composite
def histories(draw, cache=CACHES) -> History:
    """A pipeline of drawn policies that has been through a drawn script."""
    rows = draw(st.integers(1, 3))
    history = new_history(tiny_model("llama"), cache=draw(cache), **draw(policies()))
    for ids, real in draw(scripts(rows)):
        history.step(ids, real)
    return history


@given(histories())
def test_law_1_no_token_is_computed_twice_at_a_layer(history: History):
    for row in range(len(history.ids)):
        work = [
            (event.layer, token)
            for step in history.steps
            for event in step
            for token in event.rows[row].computed.tolist()
        ]
        assert len(work) == len(set(work))
        assert len(work) <= len(history.ids[row]) * LAYERS
        depth = history.cache.rows[row].ledger.depth
        for layer, store in enumerate(history.cache.rows[row].stores):
            assert sorted(store.tokens.tolist()) == torch.nonzero(depth > layer).flatten().tolist()
            assert sorted(token for at, token in work if at == layer) == sorted(store.tokens.tolist())


@given(histories())
def test_law_2_a_layer_computes_the_visible_tokens_of_its_depth(history: History):
    for row, ids in enumerate(history.ids):
        depth = torch.zeros(len(ids), dtype=torch.long)
        for step in history.steps:
            previous = None
            for event in step:
                trace = event.rows[row]
                expected = trace.visible[depth[trace.visible] == event.layer]
                assert torch.equal(trace.computed, expected)
                assert set(trace.visible.tolist()) <= set(trace.attended.tolist())
                if previous is not None:
                    assert set(trace.visible.tolist()) <= previous
                previous = set(trace.visible.tolist())
                depth[trace.computed] += 1
        assert torch.equal(depth, history.cache.rows[row].ledger.depth)
        counts = torch.bincount(depth, minlength=LAYERS + 1).tolist()
        assert history.cache.rows[row].ledger.at_depth == counts


@given(histories(AUX_CACHES))
def test_law_3_unfinished_tokens_have_one_frontier_state_each(history: History):
    for row, ids in zip(history.cache.rows, history.ids, strict=True):
        unfinished = torch.nonzero(row.ledger.depth < LAYERS).flatten()
        assert torch.equal(row.frontier.tokens, unfinished)
        if not unfinished.numel():
            continue
        _, states = replay(history.pipe.model, torch.tensor(ids), history.steps, history.cache.rows.index(row))
        expected = torch.stack([states[row.ledger.depth[token]][token] for token in unfinished])
        torch.testing.assert_close(row.frontier.read(unfinished), expected, rtol=0, atol=1e-10)


@given(histories())
def test_law_4_keys_and_values_depend_on_the_token_alone(history: History):
    decoder = history.pipe.model.get_decoder()
    for index, (row, ids) in enumerate(zip(history.cache.rows, history.ids, strict=True)):
        if not ids:
            continue
        _, states = replay(history.pipe.model, torch.tensor(ids), history.steps, index)
        for layer, store in enumerate(row.stores):
            if not len(store):
                continue
            attention = decoder.layers[layer].self_attn
            entering = decoder.layers[layer].input_layernorm(states[layer][store.tokens])
            values = attention.v_proj(entering).view(len(store), -1, attention.head_dim).transpose(0, 1)
            torch.testing.assert_close(store.read()[1][0], values, rtol=0, atol=1e-10)


@given(histories())
def test_law_5_a_dense_forward_with_the_same_masks_gives_the_same_logits(history: History):
    assert_replays(history)


class Shifting(Scorer):
    """Prefers other tokens at every layer and context length, so that every step revives some."""

    def score(self, context: ScoreContext) -> torch.Tensor:
        return ((context.tokens * 7 + context.layer * 5) * context.context_tokens % 23).double()


@pytest.mark.parametrize(("family", "kernel"), FAMILY_KERNELS)
@pytest.mark.parametrize(
    "cache", [AuxCache(), AuxCache(attend="cached"), AuxCache(decode="reuse"), AuxCache(max_revived=4)], ids=str
)
def test_law_5_holds_for_every_family_and_kernel(family: str, kernel: str, cache: AuxCache):
    history = new_history(
        tiny_model(family, kernel), scorer=Shifting(), schedule=Stages({1: 0.7, 2: 0.5, 3: 0.3}), cache=cache
    )
    real = torch.ones(2, 24, dtype=torch.long)
    real[0, :6] = 0
    history.step(random_ids(2, 24), real)
    for seed in range(1, 4):
        history.step(random_ids(2, 1, seed))
    history.step(random_ids(2, 7, 9))
    history.step(random_ids(2, 1, 10))
    revived = sum(event.rows[0].revived.numel() for step in history.steps for event in step)
    assert revived > 0, "the history must revive, or it proves little"
    assert_replays(history)


@pytest.mark.parametrize(("family", "kernel"), FAMILY_KERNELS)
@pytest.mark.parametrize("cache", ["AuxCache", "DropCache", "DenseCache"])
def test_law_6_keep_ratio_one_is_the_unmodified_model_bit_for_bit(family: str, kernel: str, cache: str):
    model, ids = tiny_model(family, kernel), random_ids(1, 30)
    pipe = LazyPipeline(model, scorer=LastTokenAttention(), schedule=Constant(1.0), cache=cache)
    with torch.no_grad():
        expected = model(ids).logits
        with pipe.attached():
            got = model(ids, past_key_values=pipe.new_cache()).logits
    assert torch.equal(got, expected)
    greedy = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert pipe.generate(ids[0], max_new_tokens=12, do_sample=False).token_ids == greedy[0, 30:].tolist()


@pytest.mark.parametrize(("family", "kernel"), FAMILY_KERNELS)
def test_law_6_holds_for_padded_batches(family: str, kernel: str):
    model, ids = tiny_model(family, kernel), random_ids(3, 14)
    pipe = LazyPipeline(model, scorer=LastTokenAttention(), schedule=Constant(1.0), cache=AuxCache())
    prompts = [ids[0].tolist(), ids[1, :9].tolist(), ids[2, :3].tolist()]
    together = pipe.generate(prompts, max_new_tokens=10, do_sample=False)
    for prompt, result in zip(prompts, together, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False)[0, len(prompt) :].tolist()
        stop = alone.index(2) + 1 if 2 in alone else len(alone)
        assert result.token_ids == alone[:stop]


@given(histories())
def test_law_7_the_model_is_untouched(history: History):
    model = history.pipe.model
    ids = random_ids(1, 8)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, _untouched_logits())
    assert len(model.get_decoder().layers) == LAYERS


def _untouched_logits() -> torch.Tensor:
    fresh = tiny_model.__wrapped__("llama")
    with torch.no_grad():
        return fresh(random_ids(1, 8)).logits


class PositionStore(KeyValueStore):
    """A store whose slots are always in order of position, whatever the order of computation."""

    def append(self, tokens, keys, values):
        super().append(tokens, keys, values)
        self.keep(torch.argsort(self.tokens))


class PositionCache(AuxCache):
    """AuxCache over position-ordered stores."""

    def new_store(self) -> KeyValueStore:
        """A position-ordered store."""
        return PositionStore()


@given(st.data())
def test_law_8_storage_order_does_not_matter(data):
    chosen = data.draw(policies())
    bounds = {"max_revived": data.draw(st.sampled_from([None, 1, 3])), "revive_every": data.draw(st.integers(1, 2))}
    rows = data.draw(st.integers(1, 2))
    script = data.draw(scripts(rows))
    compact, ordered = (
        new_history(tiny_model("mistral"), cache=cache(**bounds), **chosen) for cache in (AuxCache, PositionCache)
    )
    for ids, real in script:
        torch.testing.assert_close(compact.step(ids, real), ordered.step(ids, real), rtol=0, atol=1e-10, equal_nan=True)


def test_law_8_holds_where_a_step_revives_everything():
    schedule = PerPhase(prefill=Stages({1: 0.5}), decode=Constant(1.0))
    compact, ordered = (
        new_history(tiny_model(), scorer=LastTokenAttention(), schedule=schedule, cache=cache)
        for cache in (AuxCache(), PositionCache())
    )
    for ids in (random_ids(1, 9), random_ids(1, 1), random_ids(1, 1, 3)):
        torch.testing.assert_close(compact.step(ids), ordered.step(ids), rtol=0, atol=1e-10, equal_nan=True)
    assert len(compact.steps[1][1].rows[0].revived) == 5


def test_law_8_positions_given_by_the_caller_are_kept():
    model, ids = tiny_model("gemma3_text", "eager"), random_ids(1, 20)
    positions = torch.arange(20)[None] * 2 + 5
    pipe = LazyPipeline(model, scorer=Random(), schedule=Constant(1.0), cache=AuxCache())
    with torch.no_grad(), pipe.attached(missing="nan"):
        cache = pipe.new_cache()
        got = model(ids, position_ids=positions, past_key_values=cache).logits
    assert torch.equal(cache.rows[0].ledger.position, positions[0])
    everything = [[_everything(layer, 20) for layer in range(LAYERS)]]
    expected, _ = replay(model, ids[0], everything, 0, positions[0])
    torch.testing.assert_close(got[0], expected, rtol=0, atol=1e-10)


def _everything(layer: int, tokens: int):
    from lazyllm.callbacks import LayerEnd, RowTrace

    all_tokens = torch.arange(tokens)
    return LayerEnd(layer, LAYERS, True, (RowTrace(all_tokens, all_tokens, all_tokens, 0),))
