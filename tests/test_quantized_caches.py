"""Caches that round: the error of each number, the bytes it takes, and replay with the same numbers rounded."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lazyllm import AuxCache, Constant, LastTokenAttention, LazyPipeline, QuantizedAux, QuantizedKV, Stages
from lazyllm.caches.rounding import pack, unpack
from tests import test_laws
from tests.histories import ROUNDING_CACHES, new_history
from tests.replay import Rounding, assert_replays, replay, rounded
from tests.test_laws import Shifting, histories
from tests.tiny import FAMILY_KERNELS, random_ids, tiny_model

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


# -- rounding ----------------------------------------------------------------------------------------


@given(st.data())
def test_each_number_is_off_by_half_a_scale_at_most(data):
    dtype, bits = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from([8, 4]))
    shape = [*data.draw(st.lists(st.integers(0, 4), max_size=3)), data.draw(st.integers(1, 9))]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64) * data.draw(st.sampled_from([1e-3, 1, 99]))
    numbers = numbers.to(dtype)
    if len(shape) > 2 and data.draw(st.booleans()):
        numbers = numbers.transpose(0, 1)  # keys come as a view
    packed = pack(numbers, bits)
    back = unpack(packed, numbers[..., :0, :] if numbers.ndim > 1 else numbers, bits)
    scale = numbers.double().abs().amax(-1, keepdim=True) / (127 if bits == 8 else 7)
    limits = torch.finfo(dtype)
    allowed = scale / 2 * (1 + 1e-6) + limits.eps * back.double().abs().clamp(min=limits.smallest_normal)
    assert bool(((back.double() - numbers.double()).abs() <= allowed).all())
    assert back.dtype == dtype
    assert packed.dtype == torch.uint8
    codes = shape[-1] if bits == 8 else (shape[-1] + 1) // 2
    assert packed.shape == (*numbers.shape[:-1], codes + (8 if dtype == torch.float64 else 4))
    if dtype == torch.float64:
        assert torch.equal(back, rounded(numbers, bits)), "the replay rounds in its own way, to the same numbers"


@pytest.mark.parametrize("bits", [8, 4])
def test_a_part_of_the_packed_vectors_is_read_as_well(bits: int):
    """Whatever stands before it in memory; the scale of one vector does not begin at a multiple of its size."""
    numbers = torch.randn(7, 5, dtype=torch.float64)
    packed = pack(numbers, bits)
    for index in range(7):
        part = unpack(packed[index : index + 1], numbers[:0], bits)
        assert torch.equal(part, rounded(numbers, bits)[index : index + 1])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_does_not_become_one(bits: int, odd: float):
    numbers = torch.ones(3, 4)
    numbers[1, 2] = odd
    back = unpack(pack(numbers, bits), numbers, bits)
    assert torch.equal(back.isfinite().all(-1), torch.tensor([True, False, True]))
    assert not bool(back[1, 2].isfinite())


def test_zeros_stay_zeros():
    for bits in (8, 4):
        assert not unpack(pack(torch.zeros(2, 3), bits), torch.zeros(2, 3), bits).any()


# -- laws --------------------------------------------------------------------------------------------


@given(histories(ROUNDING_CACHES))
def test_the_laws_of_the_ledger_hold(history):
    test_laws.test_law_1_no_token_is_computed_twice_at_a_layer.hypothesis.inner_test(history)
    test_laws.test_law_2_a_layer_computes_the_visible_tokens_of_its_depth.hypothesis.inner_test(history)
    for row in history.cache.rows:
        assert torch.equal(row.frontier.tokens, torch.nonzero(row.ledger.depth < row.ledger.layers).flatten())


@given(histories(ROUNDING_CACHES))
def test_replay_holds_with_the_same_numbers_rounded(history):
    assert_replays(history)


def revive_in_every_step(history):
    real = torch.ones(2, 24, dtype=torch.long)
    real[0, :6] = 0
    for ids, mask in ((random_ids(2, 24), real), (random_ids(2, 1, 1), None), (random_ids(2, 7, 9), None)):
        history.step(ids, mask)
    revived = sum(event.rows[0].revived.numel() for step in history.steps for event in step)
    assert revived > 0, "the history must revive, or it proves little"


@pytest.mark.parametrize(("family", "kernel"), FAMILY_KERNELS)
@pytest.mark.parametrize("cache", [QuantizedAux(bits=4), QuantizedKV(), QuantizedKV(attend="cached")], ids=str)
def test_replay_holds_for_every_family_and_kernel(family: str, kernel: str, cache):
    history = new_history(
        tiny_model(family, kernel), scorer=Shifting(), schedule=Stages({1: 0.7, 2: 0.5, 3: 0.3}), cache=cache
    )
    revive_in_every_step(history)
    assert_replays(history)


@pytest.mark.parametrize("cache", [QuantizedAux(), QuantizedKV()], ids=str)
def test_the_replay_would_see_a_cache_that_does_not_round(cache):
    history = new_history(tiny_model(), scorer=Shifting(), schedule=Stages({1: 0.7, 3: 0.3}), cache=cache)
    revive_in_every_step(history)
    exact, _ = replay(history.pipe.model, torch.tensor(history.ids[1]), history.steps, 1, rounding=Rounding())
    assert (history.logits[-1][1, -1] - exact[-1]).abs().max() > 1e-6


@pytest.mark.parametrize("bits", [8, 4])
def test_attention_reads_the_same_keys_in_one_piece_and_in_many(bits: int):
    whole, pieces = (
        new_history(
            tiny_model("gemma3_text"),
            scorer=LastTokenAttention(),
            schedule=Stages({1: 0.6, 3: 0.3}),
            cache=QuantizedKV(bits=bits),
            chunk=chunk,
        )
        for chunk in (4096, 7)
    )
    for ids in (random_ids(2, 40), random_ids(2, 1, 1), random_ids(2, 17, 2)):
        torch.testing.assert_close(whole.step(ids), pieces.step(ids), rtol=0, atol=1e-10, equal_nan=True)


def test_a_scorer_reads_the_keys_that_were_attended():
    seen = {}

    class Note(LastTokenAttention):
        def score(self, context):
            seen[context.layer] = context.attention.keys
            return super().score(context)

    history = new_history(tiny_model(), scorer=Note(), schedule=Stages({1: 0.7, 3: 0.5}), cache=QuantizedKV(bits=4))
    history.step(random_ids(1, 20))
    for layer in (0, 2):
        keys, _ = history.cache.rows[0].stores[layer].read()
        assert torch.equal(seen[layer], keys[0])
        torch.testing.assert_close(rounded(keys, 4), keys, rtol=1e-14, atol=0)


# -- what it costs and what it saves -----------------------------------------------------------------


@pytest.mark.parametrize(("bits", "codes"), [(8, 1), (4, 1 / 2)])
def test_bytes_are_those_of_codes_and_scales(bits: int, codes: float):
    """Of float64 models here: 8 bytes per number, 8 per scale."""
    exact, aux, keys = (
        new_history(tiny_model(), scorer=Shifting(), schedule=Stages({1: 0.7, 3: 0.3}), cache=cache)
        for cache in (AuxCache(), QuantizedAux(bits=bits), QuantizedKV(bits=bits))
    )
    for history in (exact, aux, keys):
        history.step(random_ids(1, 30))
    width, head = 32, 8
    assert (aux.cache.kv_bytes, keys.cache.aux_bytes) == (exact.cache.kv_bytes, exact.cache.aux_bytes)
    assert aux.cache.aux_bytes == exact.cache.aux_bytes * (codes * width + 8) / (8 * width)
    assert keys.cache.kv_bytes == exact.cache.kv_bytes * (codes * head + 8) / (8 * head)


@pytest.mark.parametrize(
    ("cache", "most"),
    [
        (QuantizedAux(), 0.01),
        (QuantizedAux(bits=4), 0.12),
        (QuantizedKV(), 0.03),
        (QuantizedKV(bits=4), 0.6),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_logits_are_off_by_little(cache, most: float, family: str):
    """Relative to the logits without rounding, where the scorer chooses the same tokens whatever the numbers."""
    exact, rounding = (
        new_history(tiny_model(family), scorer=Shifting(), schedule=Stages({1: 0.7, 2: 0.5, 3: 0.3}), cache=one)
        for one in (AuxCache(), cache)
    )
    for history in (exact, rounding):
        revive_in_every_step(history)
    for one, other in zip(exact.logits, rounding.logits, strict=True):
        assert bool((other[:, -1] - one[:, -1]).norm() <= most * one[:, -1].norm())
    assert not torch.equal(exact.logits[-1][:, -1], rounding.logits[-1][:, -1])


def test_where_nothing_is_pruned_frontier_states_are_not_rounded():
    model, ids = tiny_model(), random_ids(1, 30)
    pipe = LazyPipeline(model, schedule=Constant(1.0), cache=QuantizedAux(bits=4))
    with torch.no_grad():
        expected = model(ids).logits
        with pipe.attached():
            assert torch.equal(model(ids, past_key_values=pipe.new_cache()).logits, expected)
