"""One canary per behaviour of transformers that lazyllm relies on: an upgrade that changes it fails here, by name."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from transformers import Cache, DynamicCache, LlamaConfig
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lazyllm
from lazyllm import LazyPipeline
from lazyllm.models.attention import ATTENTION_NAME, eager_kernel
from lazyllm.models.names import CACHE
from tests.tiny import FAMILIES, LAYERS, WINDOW, random_ids, tiny_model


def layer_calls(model, **inputs):
    """Keyword arguments of the first layer's call."""
    calls = []
    layer = model.get_decoder().layers[0]
    handle = layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    try:
        with torch.no_grad():
            model(random_ids(1, 6), **inputs)
    finally:
        handle.remove()
    return calls[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_decoders_hand_their_layers_positions_and_no_cache_position(family: str):
    """Trap 1: prefill and decode are told apart by our own state, positions by `position_ids`."""
    kwargs = layer_calls(tiny_model(family, "eager"), use_cache=False)
    assert "cache_position" not in kwargs
    assert kwargs["position_ids"].tolist() == [list(range(6))]


def test_sdpa_without_a_mask_cuts_the_keys_to_the_queries():
    """Trap 2: why several queries over more keys always get a mask."""
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    module = tiny_model().get_decoder().layers[0].self_attn
    query, key = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 5, 8)
    cut, _ = sdpa(module, query, key, key, None, scaling=1.0)
    same, _ = sdpa(module, query, key[:, :, :2], key[:, :, :2], None, scaling=1.0)
    assert torch.equal(cut, same)


def test_no_model_is_given_its_cache_by_a_name_that_only_some_versions_have():
    """The argument is called what the installed transformers calls it; a pipeline's `generate` takes every name."""
    calls = [
        (path.name, call.lineno)
        for path in Path(lazyllm.__file__).parent.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and {"past_key_values", "cache"} & {one.arg for one in call.keywords}
        if ast.unparse(call.func).split(".")[-1] in {"model", "lazy", "layer", "decoder"}
    ]
    assert calls == []


def test_our_attention_is_registered_with_its_mask_function():
    """Trap 3: a name without a mask function gets no mask at all."""
    assert ATTENTION_NAME in ALL_ATTENTION_FUNCTIONS.valid_keys()
    assert ATTENTION_NAME in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()


def test_windows_come_from_the_layer_types():
    """Trap 4: where the sliding windows are read from."""
    types, options = get_layer_types_and_kwargs(tiny_model("gemma3_text", "eager").config)
    assert set(types) == {"sliding_attention", "full_attention"}
    windows = [option.get("sliding_window") for option in options]
    assert windows == [WINDOW if kind == "sliding_attention" else None for kind in types]
    assert [option.get("sliding_window") for option in get_layer_types_and_kwargs(LlamaConfig())[1]] == [None] * 32


def test_a_lazy_cache_overrides_all_that_transformers_caches_do_by_their_layers():
    """Trap 5: over an empty `layers`, an inherited method would do nothing and say nothing."""
    pipe = LazyPipeline.from_preset("paper", tiny_model())
    own = vars(type(pipe.new_cache()))
    uses_layers = [
        name
        for name, member in vars(Cache).items()
        if (inspect.isfunction(member) or isinstance(member, property))
        and "self.layers" in inspect.getsource(member.fget if isinstance(member, property) else member)
    ]
    harmless = {
        "__init__", "__repr__", "__len__", "is_sliding", "is_dummy", "is_compileable",
        "activate_past_recording", "is_recording_past", "prefetch", "offload", "early_initialization",
        "has_previous_state", "get_query_offset", "update_conv_state", "update_recurrent_state",
        "get_conv_state", "get_recurrent_state", "update_indexer",
    }  # fmt: skip
    assert set(uses_layers) - harmless <= set(own)


def test_generate_takes_a_cache_and_reads_its_columns():
    """Trap 5 and 6: `get_seq_length` is the logical length; without a cache the model makes its own."""
    model = tiny_model()
    with torch.no_grad():
        assert isinstance(getattr(model(random_ids(1, 4)), CACHE), DynamicCache)
    pipe = LazyPipeline.from_preset("paper", model)
    cache = pipe.new_cache()
    pipe.generate(random_ids(1, 20)[0], past_key_values=cache, max_new_tokens=3, do_sample=False, eos_token_id=-1)
    assert cache.get_seq_length() == 22


def test_ropes_of_two_kinds_are_asked_for_by_layer_type():
    """Trap 7."""
    rotary = tiny_model("gemma3_text", "eager").get_decoder().rotary_emb
    assert "layer_type" in inspect.signature(rotary.forward).parameters
    assert "layer_type" not in inspect.signature(tiny_model().get_decoder().rotary_emb.forward).parameters


def test_every_family_defines_the_eager_kernel_in_its_own_file():
    for family in FAMILIES:
        module = tiny_model(family, "eager").get_decoder().layers[0].self_attn
        assert callable(eager_kernel(module))


def test_layers_slice_like_a_list():
    """Decoders iterate `self.layers[:n]`, which one module in a ModuleList survives."""
    layers = torch.nn.ModuleList([torch.nn.Identity()])
    assert len(layers[:LAYERS]) == 1


def test_generate_reads_only_the_last_logits_of_a_prefill():
    seen = []
    model = tiny_model()
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs.get("logits_to_keep")), with_kwargs=True
    )
    try:
        model.generate(random_ids(1, 5), max_new_tokens=2, do_sample=False, eos_token_id=-1)
    finally:
        handle.remove()
    assert seen == [1, 1]
