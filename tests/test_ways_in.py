"""Ways a model comes to a pipeline: adapters, weights that are elsewhere, and other quantisers than our own."""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, Gemma4TextConfig, PreTrainedModel, TorchAoConfig
from transformers.models.gemma4 import modeling_gemma4

from lazyllm import AuxCache, CacheError, Constant, InputError, LazyPipeline, UnsupportedModelError, WindowAttention
from lazyllm.models.families import contract_of
from lazyllm.models.flops import flop_model
from lazyllm.models.loading import load_model
from tests.histories import History, Moving, new_history
from tests.replay import assert_replays
from tests.test_quantize import ROUNDING
from tests.tiny import random_ids, tiny_model, word_tokenizer

# what peft asks of the model, in any of its versions
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def lora(**options) -> LoraConfig:
    """An adapter with random numbers on both sides, so that it does something."""
    options = {"r": 4, "lora_alpha": 16, "target_modules": TARGETS, "init_lora_weights": False, **options}
    return LoraConfig(task_type=TaskType.CAUSAL_LM, **options)


def wrapped(family: str = "llama", *more: str) -> PeftModel:
    """A model of the test's own with an adapter `law`, which is on, and others."""
    torch.manual_seed(0)
    model = get_peft_model(deepcopy(tiny_model(family)), lora(), "law")
    for name in more:
        model.add_adapter(name, lora())
    return model.eval().requires_grad_(False)


def pruning(model, **policies) -> LazyPipeline:
    return LazyPipeline(model, scorer=WindowAttention(window=3), schedule=Constant(0.5, start=1), **policies)


def history_of(model, **policies) -> History:
    """A history that prunes, revives and decodes."""
    history = new_history(model, scorer=Moving(), schedule=Constant(0.5, start=1), cache=AuxCache(), **policies)
    for length, seed in ((20, 0), (1, 1), (1, 2), (5, 3), (1, 4)):
        history.step(random_ids(2, length, seed))
    return history


@torch.no_grad()
def assert_dense_is_stock(model: PreTrainedModel, tolerance: float = 0.0) -> None:
    """Where nothing is pruned, the pipeline is the model itself: logits, then the reply."""
    ids = random_ids(1, 20)
    pipe = LazyPipeline.from_preset("dense", model)
    expected = model(ids).logits
    with pipe.attached() as attached:
        got = attached(ids, past_key_values=pipe.new_cache()).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
    reply = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY)[0, 20:]
    assert pipe.generate(ids[0], **GREEDY).token_ids == reply.tolist()


# -- layers that are called in their own way -----------------------------------------------------------


LENDS_KEYS = not hasattr(modeling_gemma4, "KVSharingDict")
"""Before transformers 5.23 the last layers of each type lend their keys in a dictionary, read or not."""


def gemma4(kernel: str = "sdpa", **options) -> PreTrainedModel:
    """Heads of two sizes; layers that take what they have of their own by position."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "global_head_dim": 16, "sliding_window": 9}
    types = ["sliding_attention", "full_attention"] * 2
    own = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 96, **options}
    config = Gemma4TextConfig(**sizes, **heads, **own, layer_types=types)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation=kernel)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25) if parameter.ndim > 1 else None
    return model.requires_grad_(False).eval()


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_layers_with_heads_of_two_sizes(kernel: str):
    model = gemma4(kernel)
    assert_dense_is_stock(model)
    assert_replays(history_of(model))
    small, *_, large = flop_model(model, contract_of(model)).per_pair
    assert (small, large) == (4 * 4 * 8, 4 * 4 * 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size_per_layer_input": 8}, "cannot run on a packed step"),
        ({"num_kv_shared_layers": 2}, "cannot run on a packed step" if LENDS_KEYS else "type dummy"),
    ],
)
def test_layers_with_inputs_or_keys_from_elsewhere_are_refused(options, message: str):
    with pytest.raises(UnsupportedModelError, match=message):
        pruning(gemma4(**options))


def test_a_tensor_that_goes_to_every_layer_is_refused():
    pipe, ids = pruning(tiny_model()), random_ids(1, 20)
    cache = pipe.new_cache()
    message = r"LlamaModel hands its layers a tensor of its own \(one_per_token\)"
    with torch.no_grad(), pipe.attached() as model, pytest.raises(UnsupportedModelError, match=message):
        model(ids, past_key_values=cache, one_per_token=torch.ones(1, 20))
    assert cache.columns == 0
    with torch.no_grad(), pruning(deepcopy(pipe.model)).attached() as other:  # no model has it yet
        other(ids, past_key_values=cache, logits_to_keep=1)
    assert cache.columns == 20


# -- adapters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_a_peft_model_is_what_it_is_without_us(family: str):
    model = wrapped(family)
    assert_dense_is_stock(model)
    with torch.no_grad():
        ids = random_ids(1, 20)
        assert (model(ids).logits - tiny_model(family)(ids).logits).abs().max() > 0.1, "the adapter does nothing"


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_pruned_and_revived_tokens_replay_with_an_adapter(family: str):
    history = history_of(wrapped(family))
    assert sum(event.rows[0].revived.numel() for step in history.steps for event in step) > 0
    assert_replays(history)


def test_the_pipeline_has_the_model_inside_the_wrapper():
    model = wrapped()
    assert pruning(model).model is model.get_base_model()
    assert model.active_adapters == ["law"]


def test_an_adapter_that_transformers_loads(tmp_path):
    model = wrapped()
    model.save_pretrained(tmp_path)
    loaded = deepcopy(tiny_model())
    pipe = pruning(loaded)
    without = pipe.generate(random_ids(1, 20)[0], **GREEDY).token_ids
    loaded.load_adapter(tmp_path / "law", "law")
    assert_dense_is_stock(loaded)
    replies = [own.generate(random_ids(1, 20)[0], **GREEDY).token_ids for own in (pipe, pruning(model))]
    assert replies[0] == replies[1] != without
    assert_replays(history_of(loaded))


def test_a_folder_of_an_adapter_is_loaded(folders, tmp_path):
    base = folders("llama")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), lora(), "default")
    model.save_pretrained(tmp_path)
    word_tokenizer(["a", "b"]).save_pretrained(tmp_path)
    pipe = LazyPipeline.from_pretrained(tmp_path, preset="dense", dtype="float64")
    assert contract_of(pipe.model).adapters.startswith("default (")
    ids = random_ids(1, 20)[0]
    assert (
        pipe.generate(ids, **GREEDY).token_ids
        == LazyPipeline.from_preset("dense", model).generate(ids, **GREEDY).token_ids
    )


SWITCHES = {
    "another one": lambda model: model.set_adapter("style"),
    "off": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
}


def set_scale(model: PeftModel, factor: float) -> None:
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("law", factor)


SWITCHES["stronger"] = lambda model: set_scale(model, 3.0)


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize("held", ["cache", "fork", "file"])
def test_a_cache_stays_with_the_adapter_that_filled_it(switch, held: str, tmp_path):
    model = wrapped("llama", "style")
    pipe = pruning(model)
    cache = pipe.new_cache()
    ids = random_ids(1, 30)[0].tolist()
    pipe.generate(ids[:20], past_key_values=cache, **GREEDY)
    kept = {"cache": lambda: cache, "fork": cache.fork, "file": lambda: cache}[held]()
    path = cache.save(tmp_path / "cache")
    columns = kept.columns
    switch(model)
    with pytest.raises(CacheError, match=r"adapters law \(|fingerprint"):
        pipe.load_cache(path) if held == "file" else pipe.generate(ids, past_key_values=kept, **GREEDY)
    assert kept.columns == columns
    fresh = pipe.generate(ids, **GREEDY).token_ids
    assert pipe.bind(model).generate(ids, **GREEDY).token_ids == fresh, "a pipeline made before notices the switch"


def test_a_cache_goes_on_when_its_adapter_is_back(tmp_path):
    model = wrapped("llama", "style")
    pipe = pruning(model)
    ids = random_ids(1, 30)[0].tolist()
    cache = pipe.new_cache()
    pipe.generate(ids[:20], past_key_values=cache, **GREEDY)
    path, undisturbed = cache.save(tmp_path / "cache"), cache.fork()
    expected = pipe.generate(ids, past_key_values=undisturbed, **GREEDY).token_ids
    model.set_adapter("style")
    pipe.generate(ids, **GREEDY)
    model.set_adapter("law")
    for again in (cache, pipe.load_cache(path)):
        assert pipe.generate(ids, past_key_values=again, **GREEDY).token_ids == expected


def test_other_numbers_under_the_same_name_are_noticed():
    model = wrapped()
    pipe = pruning(model)
    cache = pipe.new_cache()
    ids = random_ids(1, 30)[0].tolist()
    pipe.generate(ids[:20], past_key_values=cache, **GREEDY)
    model.add_adapter("style", lora())
    model.set_adapter("style")
    model.delete_adapter("law")
    model.add_adapter("law", lora())
    model.set_adapter("law")
    with pytest.raises(CacheError, match=r"filled with the adapters law \(\w+\), the model now has law \(\w+\)"):
        pipe.generate(ids, past_key_values=cache, **GREEDY)


def test_adapters_that_are_off_are_none():
    model = deepcopy(tiny_model())
    pipe = pruning(model)
    cache = pipe.new_cache()
    ids = random_ids(1, 30)[0].tolist()
    pipe.generate(ids[:20], past_key_values=cache, **GREEDY)
    expected = pipe.generate(ids, past_key_values=cache.fork(), **GREEDY).token_ids
    get_peft_model(model, lora()).base_model.disable_adapter_layers()
    assert contract_of(model).adapters is None
    assert pipe.generate(ids, past_key_values=cache, **GREEDY).token_ids == expected


def test_virtual_tokens_are_refused():
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=4)
    with pytest.raises(UnsupportedModelError, match=r"adapter 'soft' \(PROMPT_TUNING\) adds virtual tokens"):
        pruning(get_peft_model(deepcopy(tiny_model()), config, "soft"))


def test_an_adapter_that_waits_for_a_sequence_is_refused():
    model = get_peft_model(deepcopy(tiny_model()), lora(alora_invocation_tokens=[5, 6]), "late")
    with pytest.raises(UnsupportedModelError, match="adapter 'late' is on from an invocation sequence only"):
        pruning(model)


# -- weights that are elsewhere ------------------------------------------------------------------------


EVERYTHING_ELSE = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
LAYERS_ON = {
    "cpu": {"": "cpu"},
    "some on the disk": {
        **EVERYTHING_ELSE,
        **{f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(4)},
    },
    "all on the disk": {**EVERYTHING_ELSE, **{f"model.layers.{layer}": "disk" for layer in range(4)}},
}
EMBEDDING_TOO = {**LAYERS_ON["all on the disk"], "model.embed_tokens": "disk"}
"""Not for a model whose head is the embedding."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By family and dtype, a folder with a saved model and tokenizer."""
    made = {}

    def folder(family: str, dtype: torch.dtype = torch.float64):
        if (family, dtype) not in made:
            made[family, dtype] = tmp_path_factory.mktemp(family)
            deepcopy(tiny_model(family)).to(dtype).save_pretrained(made[family, dtype])
            word_tokenizer(["a", "b"]).save_pretrained(made[family, dtype])
        return made[family, dtype]

    return folder


def dispatched(folder, device_map, tmp_path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, device_map=device_map, offload_folder=tmp_path / "offload"
    ).eval()


@pytest.mark.parametrize(
    ("family", "where"),
    [*((family, where) for family in ("llama", "gemma3_text") for where in LAYERS_ON), ("llama", "the embedding too")],
)
def test_a_dispatched_model_prunes_and_is_left_as_found(folders, tmp_path, family: str, where: str):
    model = dispatched(folders(family), {**LAYERS_ON, "the embedding too": EMBEDDING_TOO}[where], tmp_path)
    before = {name: parameter.device for name, parameter in model.named_parameters()}
    forwards = [module.forward for module in model.modules()]
    assert ("meta" in {device.type for device in before.values()}) == (where != "cpu")
    assert_dense_is_stock(model)
    history = history_of(model)
    assert_replays(history)
    assert history.logits[0].nan_to_num(0).equal(history_of(tiny_model(family)).logits[0].nan_to_num(0))
    assert {name: parameter.device for name, parameter in model.named_parameters()} == before
    assert [module.forward for module in model.modules()] == forwards


def test_a_pipeline_loads_a_model_with_a_device_map(folders):
    pipe = LazyPipeline.from_pretrained(folders("llama"), device_map={"": "cpu"}, preset="dense")
    assert pipe.generate(random_ids(1, 20)[0], **GREEDY).token_ids == (
        LazyPipeline.from_preset("dense", tiny_model()).generate(random_ids(1, 20)[0], **GREEDY).token_ids
    )


# -- other quantisers ----------------------------------------------------------------------------------


def test_a_model_that_transformers_quantised_prunes(folders, tmp_path):
    config = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    folder = folders("llama", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config).eval()
    assert type(model.model.layers[0].self_attn.q_proj.weight) is not torch.nn.Parameter
    assert_dense_is_stock(model, ROUNDING)
    assert_replays(history_of(model), tolerance=ROUNDING)
    with pytest.raises(InputError, match="quantised already"):
        load_model(folder, weights="int8", quantization_config=config)
