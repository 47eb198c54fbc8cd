"""Bad input: a clear error of ours that shows the value; model and cache stay usable."""

import threading

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    OPTConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from lazyllm import (
    AttachError,
    AuxCache,
    CacheError,
    Callback,
    ConfigError,
    Constant,
    InputError,
    LastTokenAttention,
    LazyPipeline,
    PolicyError,
    PromptMarks,
    Protect,
    Random,
    Scorer,
    Stages,
    UnsupportedModelError,
)
from lazyllm.errors import unknown
from tests.tiny import LAYERS, random_ids, tiny_model, word_tokenizer

GREEDY = {"do_sample": False, "eos_token_id": -1, "max_new_tokens": 3}


@pytest.fixture
def pipe():
    """A pruning pipeline; after the test it must still answer as a fresh one does."""
    made = LazyPipeline(tiny_model(), scorer=LastTokenAttention(), schedule=Stages({1: 0.5}), cache=AuxCache())
    yield made
    fresh = LazyPipeline(tiny_model(), scorer=LastTokenAttention(), schedule=Stages({1: 0.5}), cache=AuxCache())
    ids = random_ids(1, 20)[0]
    assert made.generate(ids, **GREEDY).token_ids == fresh.generate(ids, **GREEDY).token_ids


@pytest.mark.parametrize("prompt", ["", [], torch.empty(0, dtype=torch.long)], ids=["text", "ids", "tensor"])
def test_an_empty_prompt(pipe, prompt):
    with pytest.raises(InputError, match="empty"):
        pipe.generate(prompt, **GREEDY)


@pytest.mark.parametrize("prompt", [3, {"role": "user"}, [{"text": "no role"}]], ids=str)
def test_a_prompt_of_no_known_kind(pipe, prompt):
    pipe.tokenizer = object()
    with pytest.raises(InputError, match="a prompt is a string"):
        pipe.generate(prompt, **GREEDY)
    pipe.tokenizer = None


def test_text_without_a_tokenizer(pipe):
    with pytest.raises(InputError, match="needs a tokenizer"):
        pipe.generate("hello", **GREEDY)


def test_a_prompt_longer_than_the_models_positions(pipe):
    with pytest.raises(InputError, match=r"300 tokens.*256"):
        pipe.generate(random_ids(1, 300)[0], **GREEDY)
    cache = pipe.new_cache()
    with torch.no_grad(), pipe.attached() as model, pytest.raises(InputError, match=r"300 tokens.*256"):
        model(random_ids(1, 300), past_key_values=cache)
    assert cache.get_seq_length() == 0


class Faulty(Scorer):
    """Returns what it is told to."""

    kind: str

    def score(self, context):
        scores = context.tokens.double()
        return {
            "shape": scores[1:],
            "integers": context.tokens,
            "list": scores.tolist(),
            "nan": scores.masked_fill(context.tokens == 2, torch.nan),
            "infinity": scores / 0,
        }[self.kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("shape", r"shape \(20,\), got \(19,\)"),
        ("integers", "int64"),
        ("list", "got \\["),
        ("nan", "1 scores that are NaN"),
        ("infinity", "infinite"),
    ],
)
def test_a_scorer_that_breaks_its_contract(kind: str, message: str):
    pipe = LazyPipeline(tiny_model(), scorer=Faulty(kind=kind), schedule=Stages({2: 0.5}), cache=AuxCache())
    cache = pipe.new_cache()
    with pytest.raises(PolicyError, match=message):
        pipe.generate(random_ids(1, 20)[0], past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == cache.kv_bytes == 0


def test_an_attention_scorer_cannot_prune_before_layer_0():
    with pytest.raises(ConfigError, match="before layer 0"):
        LazyPipeline(tiny_model(), scorer=LastTokenAttention(), schedule=Constant(0.5, start=0), cache=AuxCache())
    pipe = LazyPipeline(tiny_model(), scorer=Random(), schedule=Constant(0.5, start=0), cache=AuxCache())
    stats = pipe.generate(random_ids(1, 20)[0], **GREEDY).stats
    assert [layer.computed for layer in stats.tokens_per_layer[0]] == [10] * LAYERS


def test_a_layer_beyond_the_last():
    with pytest.raises(ConfigError, match="layer 9 does not exist; the model has layers 0 to 3"):
        LazyPipeline(tiny_model(), schedule=Stages({9: 0.5}))


_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64), "layers"),
        (OPTConfig(ffn_dim=48, word_embed_proj_dim=32, **_SMALL), "position_embeddings"),
        (MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64), "Mamba"),
        (FalconConfig(**_SMALL), "layers"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_an_unsupported_family_is_named_with_the_reason(config, reason: str):
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        LazyPipeline.from_preset("paper", model)
    assert type(model).__name__ in str(caught.value)


def test_an_encoder_decoder_is_refused():
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        LazyPipeline.from_preset("paper", T5ForConditionalGeneration(config))


def test_a_model_on_meta():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(intermediate_size=48, **_SMALL))
    with pytest.raises(UnsupportedModelError, match="meta"):
        LazyPipeline.from_preset("paper", model)


def test_a_cache_of_another_model(pipe):
    cache = pipe.new_cache()
    pipe.generate(random_ids(1, 9)[0], past_key_values=cache, **GREEDY)
    other = LazyPipeline.from_preset("paper", tiny_model("qwen3"))
    with pytest.raises(CacheError, match="another model"):
        other.generate(random_ids(1, 30)[0], past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == 11


def test_a_cache_in_use_by_another_generation(pipe):
    cache = pipe.new_cache()
    with cache.claim("generation"), pytest.raises(CacheError, match="in use"):
        pipe.generate(random_ids(1, 9)[0], past_key_values=cache, **GREEDY)
    pipe.generate(random_ids(1, 9)[0], past_key_values=cache, **GREEDY)


def test_a_cache_of_another_batch_size(pipe):
    cache = pipe.new_cache()
    pipe.generate(random_ids(1, 9)[0], past_key_values=cache, **GREEDY)
    with pytest.raises(CacheError, match="marks for 2 prompts, the batch has 1 rows"):
        pipe.generate(random_ids(2, 20), past_key_values=cache, **GREEDY)


@pytest.mark.parametrize("cache", [DynamicCache(), None], ids=["dynamic", "none"])
def test_a_cache_of_another_kind(pipe, cache):
    with torch.no_grad(), pipe.attached() as model, pytest.raises(CacheError, match=r"new_cache\(\)"):
        model(random_ids(1, 9), past_key_values=cache)


def test_generate_with_a_cache_of_another_kind(pipe):
    with pytest.raises(CacheError, match="DynamicCache"):
        pipe.generate(random_ids(1, 9)[0], past_key_values=DynamicCache(), **GREEDY)


def test_a_lazy_cache_without_its_pipeline(pipe):
    with torch.no_grad(), pytest.raises(CacheError, match="attached"):
        tiny_model()(random_ids(1, 9), past_key_values=pipe.new_cache())


def test_attaching_twice(pipe):
    with pipe.attached(), pytest.raises(AttachError, match="already"):
        pipe.generate(random_ids(1, 9)[0], **GREEDY)


def test_gradient_mode_on():
    model = tiny_model.__wrapped__("llama").requires_grad_(True)
    pipe = LazyPipeline.from_preset("paper", model)
    with pipe.attached(), pytest.raises(InputError, match="no_grad"):
        model(random_ids(1, 9), past_key_values=pipe.new_cache())


def test_an_exception_inside_a_layer_leaves_no_trace(pipe, monkeypatch):
    cache, ids = pipe.new_cache(), random_ids(1, 20)
    mlp = tiny_model().get_decoder().layers[2].mlp
    with torch.no_grad(), pipe.attached() as model:
        model(ids[:, :12], past_key_values=cache, logits_to_keep=1)
        expected = cache.fork()
        with monkeypatch.context() as patch:
            patch.setattr(mlp, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
            with pytest.raises(RuntimeError, match="out of memory"):
                model(ids[:, 12:], past_key_values=cache, logits_to_keep=1)
        got = model(ids[:, 12:], past_key_values=cache, logits_to_keep=1).logits
        assert torch.equal(got, model(ids[:, 12:], past_key_values=expected, logits_to_keep=1).logits)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("hook", ["on_prefill_start", "on_layer_end", "on_step_end", "on_generate_end"])
def test_an_interrupt_or_a_failing_callback_in_the_middle_of_generate(pipe, hook, error):
    class Interrupt(Callback):
        pass

    def fail(self, event):
        if getattr(event, "layer", 1) == 1:
            raise error

    setattr(Interrupt, hook, fail)
    cache = pipe.new_cache()
    pipe.callbacks = (Interrupt(),)
    with pytest.raises(error):
        pipe.generate(random_ids(1, 9)[0], past_key_values=cache, **GREEDY)
    pipe.callbacks = ()
    seen = cache.get_seq_length()
    assert seen == {"on_prefill_start": 0, "on_layer_end": 0, "on_step_end": 9, "on_generate_end": 11}[hook]
    pipe.generate(random_ids(1, 12)[0], past_key_values=cache, **GREEDY)


def test_an_interrupt_in_decode_leaves_the_prompt_in_the_cache(pipe):
    class Interrupt(Callback):
        def on_layer_end(self, event):
            if not event.is_prefill and event.layer == 1:
                raise KeyboardInterrupt

    cache = pipe.new_cache()
    pipe.callbacks = (Interrupt(),)
    with pytest.raises(KeyboardInterrupt):
        pipe.generate(random_ids(1, 9)[0], past_key_values=cache, **GREEDY)
    pipe.callbacks = ()
    assert cache.get_seq_length() == 9
    pipe.generate(random_ids(1, 12)[0], past_key_values=cache, **GREEDY)


def test_an_error_inside_a_stream_reaches_the_reader(pipe):
    class Fail(Callback):
        def on_layer_end(self, event):
            if not event.is_prefill:
                raise ValueError("a hook failed")

    streaming = LazyPipeline.from_config(
        pipe.config, tiny_model(), word_tokenizer(["a", "long", "report", "of", "sales"]), callbacks=[Fail()]
    )
    stream = streaming.stream("a long report of sales", **GREEDY)
    with pytest.raises(ValueError, match="a hook failed"):
        list(stream)
    with pytest.raises(ValueError, match="a hook failed"):
        stream.result  # noqa: B018


def test_a_cache_in_use_by_a_generation_of_another_thread(pipe):
    inside, go_on, cache = threading.Event(), threading.Event(), pipe.new_cache()

    class Hold(Callback):
        def on_layer_end(self, event):
            inside.set()
            assert go_on.wait(30)

    ids = random_ids(1, 9)[0]
    holding = LazyPipeline.from_config(pipe.config, tiny_model.__wrapped__("llama"), callbacks=[Hold()])
    thread = threading.Thread(target=holding.generate, args=(ids,), kwargs={"past_key_values": cache, **GREEDY})
    thread.start()
    try:
        assert inside.wait(30)
        with pytest.raises(CacheError, match="in use by another generation"):
            pipe.generate(ids, past_key_values=cache, **GREEDY)
    finally:
        go_on.set()
        thread.join()
    assert cache.get_seq_length() == 11


def test_a_protected_substring_that_is_not_there():
    pipe = LazyPipeline(
        tiny_model(), word_tokenizer(["a", "long", "report", "of", "sales"]), protect=Protect(spans=["profit"])
    )
    with pytest.raises(InputError, match="'profit' does not occur in the prompt"):
        pipe.generate("a long report of sales", **GREEDY)


def test_logits_of_pruned_positions(pipe):
    ids, cache = random_ids(1, 20), pipe.new_cache()
    with torch.no_grad(), pipe.attached() as model:
        with pytest.raises(InputError, match=r"20 positions of row 0, but 10 of them were pruned.*spans.*nan"):
            model(ids, past_key_values=cache)
        assert cache.get_seq_length() == 0
        last = model(ids, past_key_values=cache, logits_to_keep=1).logits
    with torch.no_grad(), pipe.attached(missing="nan") as model:
        logits = model(ids, past_key_values=pipe.new_cache()).logits[0]
    assert int(logits.isnan().any(-1).sum()) == 10
    torch.testing.assert_close(logits[-1], last[0, 0], rtol=0, atol=1e-12)
    spans = LazyPipeline(tiny_model(), schedule=Stages({1: 0.5}), protect=Protect(spans=[(0, 20)]))
    with torch.no_grad(), spans.attached() as model:
        marks = [PromptMarks(protected=((0, 20),))]
        assert not model(ids, past_key_values=spans.new_cache(marks=marks)).logits.isnan().any()


def test_a_protected_range_beyond_the_prompt():
    pipe = LazyPipeline(tiny_model(), protect=Protect(spans=[(2, 40)]))
    with pytest.raises(InputError, match=r"\(2, 40\).*20 tokens"):
        pipe.generate(random_ids(1, 20)[0], **GREEDY)


def test_a_recipe_has_no_model():
    recipe = LazyPipeline(scorer=LastTokenAttention(), schedule=Constant(0.5), cache=AuxCache())
    for call in (lambda: recipe.generate([3]), lambda: recipe.attached().__enter__()):
        with pytest.raises(ConfigError, match="bind"):
            call()


def test_a_mask_that_is_not_two_dimensional(pipe):
    with torch.no_grad(), pipe.attached() as model, pytest.raises(InputError, match="2-D"):
        model(
            random_ids(1, 5),
            attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.bool),
            past_key_values=pipe.new_cache(),
        )


def test_positions_that_do_not_rise(pipe):
    with torch.no_grad(), pipe.attached() as model, pytest.raises(InputError, match="rise"):
        model(random_ids(1, 3), position_ids=torch.tensor([[0, 2, 1]]), past_key_values=pipe.new_cache())


def test_cropping_more_than_there_is(pipe):
    cache = pipe.new_cache()
    for columns in (-1, 2):
        with pytest.raises(InputError, match="crop"):
            cache.crop(columns)


@pytest.mark.parametrize(
    ("name", "near"),
    [("h10", "h100-sxm"), ("h20", "h200"), ("rtx-4900", "rtx-4090"), ("h1", None), ("tpu", None)],
)
def test_the_name_that_was_meant_is_one_that_begins_so_or_the_nearest(name: str, near: str | None):
    message = unknown("device", name, ["h200", "rtx-4090", "h100-sxm"])
    assert message.startswith(f"unknown device {name!r}.")
    assert (f"Did you mean {near!r}?" in message) if near else ("Did you mean" not in message)
