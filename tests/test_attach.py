"""Attaching: what it costs each time, and what it notices of a model that changed after its pipeline was made."""

import inspect
from collections import Counter
from copy import deepcopy

import pytest
import torch
from torch import nn

from lazyllm import AuxCache, Constant, LastTokenAttention, LazyPipeline, UnsupportedModelError
from lazyllm.models.names import CACHE
from tests.tiny import random_ids, tiny_model

IDS = random_ids(1, 30)[0]


def made(family: str = "llama", **options):
    """A model of the test's own, to be changed."""
    return tiny_model.__wrapped__(family, **options)


def pipeline(model) -> LazyPipeline:
    return LazyPipeline(model, scorer=LastTokenAttention(), schedule=Constant(0.5, start=1), cache=AuxCache())


def reply(pipe: LazyPipeline):
    done = pipe.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    return done.token_ids, done.stats.flops


class Looks(Counter):
    """Counts how often a signature is read, and modules or parameters are walked."""

    def __init__(self, monkeypatch):
        super().__init__()
        self._count(monkeypatch, inspect, "signature")
        self._count(monkeypatch, nn.Module, "named_modules")

    def _count(self, monkeypatch, owner, name: str):
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            self[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)


def looks_of(layers: int, monkeypatch) -> Counter[str]:
    pipe = pipeline(tiny_model(layers=layers))
    with monkeypatch.context() as patch:
        looks = Looks(patch)
        pipe.generate(IDS, max_new_tokens=1, do_sample=False)
    return Counter(looks)


def test_a_model_that_stays_as_it_is_is_not_checked_again(monkeypatch):
    """A layer costs a generation one look at its first weight, to see where it runs: layer, attention, projection."""
    shallow, deep = (looks_of(layers, monkeypatch) for layers in (4, 8))
    assert deep["signature"] == shallow["signature"]
    assert deep["named_modules"] - shallow["named_modules"] == 4 * 3


def test_a_contract_that_holds_is_kept():
    model = made()
    pipe = pipeline(model)
    with pipe.attached():
        first = model.get_decoder().layers[0].contract
    with pipe.attached():
        assert model.get_decoder().layers[0].contract is first


def test_layers_stay_in_the_mode_they_are_in():
    model = made()
    model.model.layers[1].train()
    pipe = pipeline(model)
    with pipe.attached():
        assert not model.model.layers[0].training
    assert [layer.training for layer in model.model.layers] == [False, True, False, False]


def switch_kernel(model):
    model.set_attn_implementation("eager")


def swap_a_layer(model):
    model.model.layers[2] = deepcopy(model.model.layers[0])
    model.model.layers[2].self_attn.layer_idx = 2


def drop_layers(model):
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers, model.config.layer_types = 2, model.config.layer_types[:2]


def swap_an_attention_with_a_config_of_its_own(model):
    attention = model.model.layers[1].self_attn = deepcopy(model.model.layers[1].self_attn)
    assert attention.config is not model.config


def narrow_the_window(model):
    model.config.sliding_window = 3


def change_dtype(model):
    model.float()


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("llama", switch_kernel),
        ("llama", swap_a_layer),
        ("qwen2", drop_layers),
        ("llama", swap_an_attention_with_a_config_of_its_own),
        ("mistral", narrow_the_window),
        ("llama", change_dtype),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_change_of_the_model_is_noticed(family: str, change):
    """A pipeline made before the change does what one made after it does, and remembers what it has read."""
    model = made(family)
    pipe = pipeline(model)
    reply(pipe)
    change(model)
    with pipe.attached():
        seen = model.model.layers[0].contract
    fresh = pipeline(model)
    with fresh.attached():
        assert model.model.layers[0].contract == seen
    assert reply(pipe) == reply(fresh)
    with pipe.attached():
        assert model.model.layers[0].contract is seen


def test_the_kernel_is_the_one_the_model_was_switched_to():
    model = made()
    pipe = pipeline(model)
    switch_kernel(model)
    with pipe.attached():
        assert model.model.layers[0].contract.kernel == "eager"
    assert model.config._attn_implementation == "eager"


class Foreign(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states, gate):
        return hidden_states


def swap_in_a_foreign_layer(model):
    model.model.layers[1] = Foreign(model.model.layers[1])


def patch_a_forward(model):
    model.model.layers[1].forward = lambda hidden_states, gate: hidden_states


def move_to_meta(model):
    model.to("meta")


def switch_to_an_unknown_kernel(model):
    model.config._attn_implementation_internal = "flex_attention"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_in_a_foreign_layer, "Foreign does not take"),
        (patch_a_forward, "does not take"),
        (move_to_meta, "meta"),
        (switch_to_an_unknown_kernel, "flex_attention"),
    ],
)
def test_a_change_that_cannot_work_is_refused(change, message: str):
    model = made()
    pipe = pipeline(model)
    change(model)
    try:
        with pytest.raises(UnsupportedModelError, match=message), pipe.attached():
            raise AssertionError("it was attached")
    finally:
        model.config._attn_implementation_internal = "sdpa"


class Doubled:
    """A cache whose keys are doubled."""

    def __init__(self, cache):
        self.cache = cache

    def update(self, *args):
        keys, values = self.cache.update(*args)
        return keys * 2.0, values


def test_a_layer_that_changes_what_the_cache_gave_is_refused():
    model = made()
    attention = model.model.layers[1].self_attn

    class Doubling(type(attention)):
        def forward(self, *args, **options):
            return super().forward(*args, **options | {CACHE: Doubled(options[CACHE])})

    attention.__class__ = Doubling
    with pytest.raises(UnsupportedModelError, match=r"layer 1 .* cannot run on a packed step: TypeError"):
        pipeline(model)


def test_a_device_that_changed_is_read_again():
    """Where layers run comes from their weights or from the hook that moves them; here from a hook."""
    model = made()
    pipe = pipeline(model)
    hook = type("Hook", (), {"execution_device": "cpu:0"})()
    model.model.layers[3]._hf_hook = hook
    with pipe.attached():
        assert model.model.layers[0].contract.devices[3] == torch.device("cpu:0")
