"""Weights in 4 and 8 bits: what is rounded and how, that pruning works on them, and what is refused."""

import logging
import subprocess
import sys
from contextlib import suppress
from copy import deepcopy

import pytest
import torch
from torch import nn

from lazyllm import AuxCache, InputError, LazyPipeline, Stages
from lazyllm.costs import ModelShape
from lazyllm.models.families import contract_of
from lazyllm.models.flops import flop_model
from lazyllm.models.loading import load_model
from lazyllm.models.quantize import WEIGHTS, quantize
from lazyllm.quiet import only_errors
from tests.histories import new_history
from tests.replay import assert_replays
from tests.test_laws import Shifting
from tests.tiny import LAYERS, random_ids, tiny_model, word_tokenizer

WORDS = [f"w{index}" for index in range(60)]
ROUNDING = 2e-4
"""Of float32, on logits of a size of ten."""


def plain(family="llama", kernel="sdpa", dtype=torch.float32):
    """A tiny model of one's own; the layers behind the MLP's activation have 48 inputs, all others 32."""
    return deepcopy(tiny_model(family, kernel)).to(dtype)


def quantised(weights, *which, **how):
    model = plain(*which, **how)
    quantize(model, weights)
    return model


def layers_of(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def is_rounded(layer):
    return type(layer.weight) is not nn.Parameter


@torch.no_grad()
def values(layer):
    """Weights [outputs, inputs] that a layer multiplies with."""
    return layer(torch.eye(layer.in_features)).T


def test_int4_shares_a_scale_among_32_inputs():
    torch.manual_seed(0)
    model = plain()
    layer = model.model.layers[0].self_attn.q_proj = nn.Linear(64, 32, bias=False)
    before = layer.weight.detach().clone()
    before[:, 32:] *= 100  # rounded with these, the others would all become zero
    layer.weight.data.copy_(before)
    quantize(model, "int4")
    groups = before.view(32, 2, 32)
    steps = (groups.amax(-1) - groups.amin(-1)) / 15
    assert ((values(layer) - before).view(32, 2, 32).abs() <= 0.51 * steps[..., None]).all()
    assert values(layer)[0, :32].unique().numel() <= 16


def test_int8_shares_a_scale_among_all_inputs():
    before, after = plain().model.layers[0].mlp.down_proj, quantised("int8").model.layers[0].mlp.down_proj
    steps = before.weight.abs().amax(-1, keepdim=True) / 127
    assert ((values(after) - before.weight).abs() <= 0.51 * steps).all()
    assert not torch.equal(values(after), before.weight)


def test_what_does_not_divide_by_the_group_stays_as_it_is():
    before, after = layers_of(plain()), layers_of(quantised("int4"))
    assert [name for name in after if not is_rounded(after[name])] == [
        f"model.layers.{layer}.mlp.down_proj" for layer in range(LAYERS)
    ]
    assert all(torch.equal(after[name].weight, before[name].weight) for name in after if not is_rounded(after[name]))
    assert all(map(is_rounded, layers_of(quantised("int8")).values()))


def test_int4_leaves_a_head_whose_rows_the_kernel_does_not_take():
    model = plain()
    model.lm_head = nn.Linear(32, 90, bias=False)
    quantize(model, "int4")
    assert not is_rounded(model.lm_head)
    assert is_rounded(model.model.layers[0].mlp.up_proj)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_tied_head_is_rounded_and_the_embedding_is_not(weights):
    model = plain("gemma")
    before = model.get_input_embeddings().weight.detach().clone()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    quantize(model, weights)
    assert is_rounded(model.lm_head)
    assert type(model.get_input_embeddings().weight) is nn.Parameter
    assert torch.equal(model.get_input_embeddings().weight, before)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_operations_are_counted_as_before(weights, family):
    before, after = plain(family), quantised(weights, family)
    assert flop_model(after, contract_of(after)) == flop_model(before, contract_of(before))
    assert after.num_parameters() == before.num_parameters()
    if family == "llama":
        assert flop_model(after, contract_of(after)) == ModelShape.of(after.config).costs


def test_packed_weights_count_by_inputs_and_outputs():
    model, packed = plain(), plain()
    for layer in layers_of(packed.model.layers).values():
        layer.weight = nn.Parameter(torch.zeros(layer.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    assert flop_model(packed, contract_of(packed)) == flop_model(model, contract_of(model))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dense_is_the_quantised_model_itself(weights, dtype):
    model, ids = quantised(weights, dtype=dtype), random_ids(1, 20)
    pipe = LazyPipeline.from_preset("dense", model)
    with torch.no_grad():
        expected = model(ids).logits
        with pipe.attached() as attached:
            got = attached(ids, past_key_values=pipe.new_cache()).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=ROUNDING if dtype == torch.float32 else 0.1)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    reply = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, 20:]
    assert pipe.generate(ids[0].tolist(), **options).token_ids == reply.tolist()
    with torch.no_grad():
        assert (expected - plain(dtype=dtype)(ids).logits).abs().max() > 0.01, "nothing was rounded"


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma3_text", "mixtral"])
def test_pruned_and_revived_tokens_replay(weights, kernel, family):
    model = quantised(weights, family, kernel)
    schedule = Stages({1: 0.7, 2: 0.5, 3: 0.3})
    history = new_history(model, scorer=Shifting(), schedule=schedule, cache=AuxCache())
    history.step(random_ids(2, 24))
    for seed in range(1, 4):
        history.step(random_ids(2, 1, seed))
    assert sum(event.rows[0].revived.numel() for step in history.steps for event in step) > 0
    assert_replays(history, tolerance=ROUNDING)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_settings_of_the_process_stay_as_they_are(weights, monkeypatch):
    changes = []
    monkeypatch.setattr("torchao.quantization.utils.recommended_inductor_config_setter", lambda: changes.append("set"))
    quantised(weights)
    assert not changes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    plain().save_pretrained(path)
    word_tokenizer(WORDS).save_pretrained(path)
    return path


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_model_is_loaded_with_such_weights(folder, weights):
    model, _ = load_model(folder, weights=weights)
    pipe = LazyPipeline.from_pretrained(folder, weights=weights, preset="recommended")
    for loaded in (model, pipe.model):
        assert is_rounded(loaded.lm_head)
        assert not loaded.training
    assert torch.equal(values(model.lm_head), values(quantised(weights).lm_head))
    assert not is_rounded(load_model(folder)[0].lm_head)
    assert len(pipe.generate(" ".join(WORDS), max_new_tokens=3, min_new_tokens=3).token_ids) == 3


def test_an_unknown_kind_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(InputError, match=r"unknown kind of weights 'int5'.*Known: int4, int8"):
        load_model(tmp_path / "nothing", weights="int5")
    with pytest.raises(InputError, match="'int5'"):
        quantize(plain(), "int5")


def test_without_torchao_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(InputError, match=r'need torchao.*pip install "lazyllm-torch\[quantized\]"'):
        load_model(tmp_path / "nothing", weights="int4")


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_dtype_that_cannot_be_rounded_is_refused(weights):
    with pytest.raises(InputError, match="bfloat16, float16, float32, and this one is in float64"):
        quantize(plain(dtype=torch.float64), weights)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_quantised_model_is_refused(weights):
    with pytest.raises(InputError, match=r"quantised already: model.layers.0.self_attn.q_proj.weight is a Int8Tensor"):
        quantize(quantised("int8"), weights)


@pytest.mark.parametrize("kind", ["buffer", "parameter"])
def test_packed_weights_are_refused(kind):
    model, blocks = plain(), torch.zeros(4, 4, dtype=torch.int32)
    place = model.model.layers[1].mlp
    if kind == "buffer":
        place.register_buffer("qweight", blocks)
    else:
        place.qweight = nn.Parameter(blocks.to(torch.uint8), requires_grad=False)
    with pytest.raises(InputError, match=r"quantised already: model.layers.1.mlp.qweight is a \w+ of u?int"):
        quantize(model, "int4")
    assert not any(map(is_rounded, layers_of(model).values()))


def test_a_model_of_which_nothing_fits_is_refused():
    model = plain()
    for name in layers_of(model):
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, nn.Linear(40, 32))
    with pytest.raises(InputError, match=r"no layer of this llama can have int4 weights.*divide by 32"):
        quantize(model, "int4")


def test_a_kernel_that_is_missing_is_named(monkeypatch):
    def absent(*_):
        raise ImportError("Requires mslk >= 1.0.0")

    monkeypatch.setattr("torchao.quantization.quantize_", absent)
    with pytest.raises(InputError, match="cannot make int4 weights on cpu: Requires mslk"):
        quantize(plain(), "int4")


def test_importing_lazyllm_shows_nothing_of_torchao():
    code = "import lazyllm, sys; assert 'torchao' in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_levels_of_loggers_are_put_back():
    logger = logging.getLogger("lazyllm-test")
    for level in (logging.NOTSET, logging.DEBUG):
        logger.setLevel(level)
        with suppress(ValueError), only_errors(logger.name):
            assert not logger.isEnabledFor(logging.WARNING)
            raise ValueError
        assert logger.level == level
