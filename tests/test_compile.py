"""Compiled steps: the same numbers, one graph whatever the length, and a clear word where it cannot be."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lazyllm import AuxCache, LazyConfig, LazyPipeline, Stages, UnsupportedModelError
from lazyllm.models.layers import CompiledLayers
from tests.histories import new_history
from tests.replay import assert_replays
from tests.test_laws import Shifting
from tests.tiny import FAMILY_KERNELS, LAYERS, random_ids, tiny_model

DENSE = LazyConfig.preset("dense")
POLICIES = {"scorer": Shifting(), "schedule": Stages({1: 0.7, 2: 0.5, 3: 0.3})}
BUILDS = {"gemma2": 2, "gemma3_text": 2, "smollm3": 2}
"""Families whose layers are of two kinds; the others' are of one."""
LOOPING = ("mixtral", "qwen3_moe")
"""Families whose eager experts loop over what they find, which torch does not compile."""


@pytest.fixture(autouse=True)
def forgotten_graphs():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch) -> CompileCounterWithBackend:
    """Counts the graphs and runs them uncompiled, which is as good for the laws and saves the compiler."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr("lazyllm.pipeline.CompiledLayers", partial(CompiledLayers, counter))
    return counter


def own_model(*arguments, **options):
    """A tiny model that no other test has used: transformers leaves hooks on one that was asked for its attention."""
    return tiny_model.__wrapped__(*arguments, **options)


def go_on(history) -> None:
    """A padded prefill, single tokens, a further turn and single tokens again."""
    real = torch.ones(2, 24, dtype=torch.long)
    real[0, :6] = 0
    history.step(random_ids(2, 24), real)
    turns = torch.zeros(2, 1, dtype=torch.long)
    for seed in range(1, 6):
        turns[seed % 2], turns[1 - seed % 2] = 1, 0  # one row at a time, so that a step has one token
        history.step(random_ids(2, 1, seed), turns.clone())
    history.step(random_ids(2, 7, 9))
    history.step(random_ids(2, 1, 10), turns.clone())


@pytest.mark.parametrize(("family", "kernel"), [pair for pair in FAMILY_KERNELS if pair[0] not in LOOPING])
def test_compiled_layers_keep_law_5(family: str, kernel: str, graphs: CompileCounterWithBackend):
    history = new_history(own_model(family, kernel), cache=AuxCache(decode="reuse"), compile=True, **POLICIES)
    go_on(history)
    assert 1 <= graphs.frame_count <= BUILDS.get(family, 1), "one graph for all layers of a build, at every length"
    assert_replays(history)


@pytest.mark.parametrize("cache", [AuxCache(revive_every=2), AuxCache(attend="cached", revive_every=2)], ids=str)
def test_steps_between_those_that_revive_keep_law_5(cache: AuxCache, graphs: CompileCounterWithBackend):
    history = new_history(own_model(), cache=cache, compile=True, **POLICIES)
    go_on(history)
    assert graphs.frame_count == 1
    assert_replays(history)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_the_compiler_itself_gives_the_same_numbers():
    model, prompt = own_model("qwen3", layers=LAYERS), random_ids(1, 40)[0].tolist()
    config = LazyConfig(schedule=Stages({1: 0.5}), cache=AuxCache(decode="reuse"))
    replies = []
    for compiled in (False, True):
        pipe = LazyPipeline.from_config(config.model_copy(update={"compile": compiled}), model)
        with torch.no_grad(), pipe.attached() as lazy:
            cache = pipe.new_cache()
            lazy(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1)
            replies.append([lazy(random_ids(1, 1, seed), past_key_values=cache).logits for seed in range(6)])
    torch.testing.assert_close(replies[1], replies[0], rtol=0, atol=1e-5)  # norms compute in float32
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("family", LOOPING)
def test_layers_that_cannot_be_compiled_are_refused_and_nothing_is_lost(family: str):
    pipe = LazyPipeline.from_config(DENSE.model_copy(update={"compile": True}), own_model(family))
    with torch.no_grad(), pipe.attached() as lazy:
        cache = pipe.new_cache()
        lazy(random_ids(1, 12), past_key_values=cache, logits_to_keep=1)
        held = cache.kv_bytes
        with pytest.raises(
            UnsupportedModelError, match=r"DecoderLayer cannot be compiled; leave compile off \(torch: .*\)$"
        ):
            lazy(random_ids(1, 1), past_key_values=cache)
        assert (cache.columns, cache.kv_bytes) == (12, held)


@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_hooks_that_transformers_leaves_on_layers_are_named(asked: str):
    model = own_model(kernel="eager")
    model(random_ids(1, 5), **{asked: True})
    pipe = LazyPipeline.from_config(DENSE.model_copy(update={"compile": True}), model)
    with torch.no_grad(), pipe.attached() as lazy:
        cache = pipe.new_cache()
        lazy(random_ids(1, 12), past_key_values=cache, logits_to_keep=1)
        with pytest.raises(
            UnsupportedModelError, match=r"it has forward hooks.* load the model anew, or leave compile"
        ):
            lazy(random_ids(1, 1), past_key_values=cache)
