"""A step that goes through each layer in pieces: the same result, the same choice, and memory for one piece only."""

import sys
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from lazyllm import (
    AuxCache,
    Constant,
    LastTokenAttention,
    LateInteraction,
    LazyPipeline,
    PerPhase,
    Stages,
    WindowAttention,
)
from lazyllm.caches import LayerView
from lazyllm.caches.indexing import is_ascending
from lazyllm.models.masks import WHOLE, RowMasks, causal
from tests.histories import new_history
from tests.replay import assert_replays
from tests.tiny import FAMILY_KERNELS, LAYERS, random_ids, tiny_model


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made while it is on have held at any one time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._seen = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        given = {
            tensor.untyped_storage().data_ptr()
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(tensor, torch.Tensor)
        }
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage(), given)
        return result

    def _note(self, storage, given):
        place, size = storage.data_ptr(), storage.nbytes()
        if place in given or place in self._seen or not size:
            return
        self._seen.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, place, size)

    def _free(self, place, size):
        self._seen.discard(place)
        self.now -= size


@pytest.mark.parametrize(("family", "kernel"), FAMILY_KERNELS)
def test_pieces_give_the_unmodified_models_logits(family: str, kernel: str, monkeypatch):
    monkeypatch.setattr(RowMasks, "MOST", 24)
    model, ids = tiny_model(family, kernel), random_ids(1, 23)
    pipe = LazyPipeline(model, scorer=LastTokenAttention(), schedule=Constant(1.0), cache=AuxCache(), chunk=5)
    calls = []
    hook = model.get_decoder().layers[2].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        expected = model(ids).logits
        calls.clear()
        with pipe.attached():
            got = model(ids, past_key_values=pipe.new_cache()).logits
    hook.remove()
    assert len(calls) == 5
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "scorer", [LastTokenAttention(), WindowAttention(window=12), LateInteraction(query=6, pool=3)], ids=str
)
@pytest.mark.parametrize("attend", ["visible", "cached"])
def test_the_choice_is_made_from_the_whole_prompt(scorer, attend: str):
    whole, pieces = (
        new_history(
            tiny_model(), scorer=scorer, schedule=Stages({1: 0.6, 3: 0.3}), cache=AuxCache(attend=attend), chunk=chunk
        )
        for chunk in (4096, 7)
    )
    for ids in (random_ids(2, 40), random_ids(2, 1, 1), random_ids(2, 17, 2), random_ids(2, 1, 3)):
        torch.testing.assert_close(whole.step(ids), pieces.step(ids), rtol=0, atol=1e-10, equal_nan=True)
    for one, other in zip(whole.steps, pieces.steps, strict=True):
        for layer in range(LAYERS):
            for left, right in zip(one[layer].rows, other[layer].rows, strict=True):
                assert torch.equal(left.visible, right.visible)
                assert torch.equal(left.computed, right.computed)


@pytest.mark.parametrize("attend", ["visible", "cached"])
@pytest.mark.parametrize("chunk", [4096, 7, 1])
def test_reviving_many_tokens_reads_keys_in_order_of_position(attend: str, chunk: int, monkeypatch):
    """What is stored behind later tokens is handed over in front of them, so that spans can leave later keys out."""
    monkeypatch.setattr(RowMasks, "MOST", 24)
    schedule = PerPhase(prefill=Stages({1: 0.3}), decode=Constant(1.0))
    histories = []
    for many in (2, sys.maxsize):
        monkeypatch.setattr(LayerView, "MANY", many)
        history = new_history(
            tiny_model(), scorer=LastTokenAttention(), schedule=schedule, cache=AuxCache(attend=attend), chunk=chunk
        )
        for ids in (random_ids(1, 30), random_ids(1, 1, 1), random_ids(1, 1, 2)):
            history.step(ids)
        assert_replays(history)
        histories.append(history)
    in_order, as_stored = (history.steps[1][1].rows[0] for history in histories)
    assert len(in_order.revived) == 21
    assert is_ascending(in_order.attended)
    assert not is_ascending(as_stored.attended)


@given(st.data())
def test_spans_cover_every_pair_once_and_allow_the_right_ones(data):
    positions = torch.arange(40)
    keys = torch.tensor(data.draw(st.lists(st.integers(0, 39), min_size=1, max_size=30, unique=True)))
    if data.draw(st.booleans()):
        keys = keys.sort().values
    todo = torch.tensor(sorted(data.draw(st.sets(st.sampled_from(keys.tolist()), min_size=1))))
    window = data.draw(st.sampled_from([None, 1, 5, 60]))
    masks = RowMasks(torch.device("cpu"))
    masks.MOST = data.draw(st.integers(1, 80))
    allowed = torch.zeros(todo.numel(), keys.numel(), dtype=torch.bool)
    for span in masks.spans(0, todo, lambda: keys, positions, window):
        part, mask = allowed[span.queries, span.keys], span.read_mask()
        if mask is None:
            own = part.shape[0]
            part |= torch.ones(part.shape, dtype=torch.bool) if own == 1 else torch.ones(own, own).bool().tril()
        else:
            assert span.queries == WHOLE or mask.numel() <= max(masks.MOST, keys.numel())
            part |= mask[0, 0]
    assert torch.equal(allowed, causal(positions[todo], positions[keys], window))


def long_model(layers: int) -> LlamaForCausalLM:
    """A model so narrow that tens of thousands of tokens are quick."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=65536,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).requires_grad_(False).eval()


@pytest.mark.parametrize("schedule", [Constant(1.0), Stages({2: 0.3})], ids=str)
def test_activations_do_not_grow_with_the_prompt(schedule, monkeypatch):
    """Beside K/V and frontier states, a prefill holds the embeddings, two states per token, and one piece's work."""
    monkeypatch.setattr(RowMasks, "MOST", 2**15)
    model, ids = long_model(layers=20), random_ids(1, 3000) % 64
    pipe = LazyPipeline(model, scorer=LastTokenAttention(), schedule=schedule, cache=AuxCache(), chunk=128)
    cache = pipe.new_cache()
    with torch.no_grad(), pipe.attached() as lazy, LiveBytes() as live:
        lazy(ids, past_key_values=cache, logits_to_keep=1)
    held = cache.kv_bytes + cache.aux_bytes
    assert live.peak <= 1.3 * held, (live.peak, held)
