"""Every kind of generation transformers has: the unmodified model's tokens at keep ratio 1, the laws under pruning."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, WatermarkingConfig
from transformers.generation import BaseStreamer

from lazyllm import (
    AuxCache,
    Callback,
    DropCache,
    EvictingCache,
    InputError,
    LazyCache,
    LazyPipeline,
    Protect,
    Random,
    Stages,
    TokenTrace,
    WindowAttention,
)
from lazyllm.caches.arrival import Arrival
from lazyllm.callbacks import LayerEnd, RowTrace
from lazyllm.generation.clock import TokenClock
from lazyllm.generation.options import REFUSED
from lazyllm.models.names import CACHE
from tests.histories import CACHES, FORGETTING_CACHES, policies
from tests.replay import replay
from tests.tiny import LAYERS, VOCABULARY, random_ids, tiny_model, word_tokenizer

GREEDY = {"do_sample": False, "eos_token_id": -1}
PRUNING = {"scorer": WindowAttention(window=4), "schedule": Stages({1: 0.6, 3: 0.3})}
PROMPT = random_ids(1, 9)[0].repeat(3)
"""Says everything three times, so that a look into the prompt finds candidates."""


def draft_model() -> torch.nn.Module:
    return tiny_model("llama", layers=2, seed=3)


def wider_model() -> torch.nn.Module:
    """One with a token more."""
    config = type(tiny_model().config)(**{**tiny_model().config.to_dict(), "vocab_size": VOCABULARY + 1})
    torch.manual_seed(5)
    return type(tiny_model())(config).to(torch.float64).eval()


class Ban(LogitsProcessor):
    """Bans what the tokens so far say is banned."""

    def __call__(self, input_ids, scores):
        return scores.masked_fill(torch.arange(scores.shape[-1]) % 7 == input_ids[:, -1:] % 7, -torch.inf)


def allowed(row, ids) -> list[int]:
    return [token for token in range(3, VOCABULARY) if (token + len(ids) + row) % 5]


SAMPLED = [
    {"temperature": 1.3, "top_k": 20},
    {"top_p": 0.8, "repetition_penalty": 1.2},
    {"min_p": 0.1},
    {"typical_p": 0.7, "renormalize_logits": True},
    {"num_return_sequences": 3},
    {"num_return_sequences": 2, "prefill_chunk_size": 4},
    {"num_beams": 3, "num_return_sequences": 2},
]
DETERMINISTIC = [
    {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5, "early_stopping": True},
    {"num_beams": 2, "prefill_chunk_size": 4},
    {"repetition_penalty": 1.4},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[5], [6, 7]]},
    {"sequence_bias": {(11,): 8.0, (12, 13): 4.0}},
    {"suppress_tokens": [9, 10, 11]},
    {"forced_eos_token_id": 2},
    {"eos_token_id": list(range(3, 40)), "min_new_tokens": 5},
    {"eos_token_id": list(range(3, 40))},
    {"prefix_allowed_tokens_fn": allowed},
    {"prefix_allowed_tokens_fn": allowed, "num_beams": 2},
    {"logits_processor": LogitsProcessorList([Ban()])},
    {"prefill_chunk_size": 4},
    {"max_time": 3600.0},
    {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 5},
    {"encoder_repetition_penalty": 1.5},
    {"watermarking_config": WatermarkingConfig(bias=2.5, seeding_scheme="selfhash")},
]
MODES = [{"do_sample": True, **options} for options in SAMPLED] + DETERMINISTIC
ASSISTED = [
    {"prompt_lookup_num_tokens": 4},
    {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, "do_sample": True, "temperature": 0.7},
    {"assistant_model": draft_model},
    {"assistant_model": draft_model, "do_sample": True},
    {"prompt_lookup_num_tokens": 4, "repetition_penalty": 1.3},
]


def called(options: dict) -> dict:
    """The options, with models made."""
    return {name: value() if name == "assistant_model" else value for name, value in options.items()}


def stock_tokens(model, prompts: list[torch.Tensor], options: dict, seed: int = 7) -> list[list[int]]:
    """What the unmodified model replies, without what stands behind an end token."""
    width = max(prompt.numel() for prompt in prompts)
    ids = torch.stack([torch.nn.functional.pad(prompt, (width - prompt.numel(), 0)) for prompt in prompts])
    mask = torch.stack([(torch.arange(width) >= width - prompt.numel()).long() for prompt in prompts])
    torch.manual_seed(seed)
    replies = model.generate(ids, attention_mask=mask, **options)[:, width:].tolist()
    ends = options["eos_token_id"] if isinstance(options["eos_token_id"], list) else [options["eos_token_id"]]
    stops = [next((at + 1 for at, token in enumerate(reply) if token in ends), len(reply)) for reply in replies]
    return [reply[:stop] for reply, stop in zip(replies, stops, strict=True)]


def lazy_tokens(pipe: LazyPipeline, prompts, options: dict, seed: int = 7) -> list[list[int]]:
    torch.manual_seed(seed)
    results = pipe.generate(prompts, **options)
    return [result.token_ids for result in (results if isinstance(results, list) else [results])]


@contextmanager
def widths(model) -> Iterator[list[int]]:
    """How many tokens the first layer computes, call by call."""
    seen: list[int] = []
    hook = model.get_decoder().layers[0].register_forward_hook(lambda _, __, output: seen.append(output.shape[1]))
    try:
        yield seen
    finally:
        hook.remove()


# -- keep ratio 1 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", MODES, ids="-".join)
@pytest.mark.parametrize("prompts", [[15], [6, 15, 9]], ids=["one", "batch"])
def test_at_keep_one_every_mode_gives_the_tokens_of_the_unmodified_model(options, prompts):
    model = tiny_model()
    given = [random_ids(1, length, seed)[0] for seed, length in enumerate(prompts)]
    options = {**GREEDY, "max_new_tokens": 8, **options}
    lazy = lazy_tokens(LazyPipeline.from_preset("dense", model), given, options)
    assert lazy == stock_tokens(model, given, options)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "qwen3_moe"])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids="-".join)
def test_other_families_do_too(family, options):
    model = tiny_model(family, "eager" if family == "gemma2" else "sdpa")
    options = {**GREEDY, "max_new_tokens": 8, **options}
    assert lazy_tokens(LazyPipeline.from_preset("dense", model), PROMPT, options) == stock_tokens(
        model, [PROMPT], options
    )


@pytest.mark.parametrize("options", ASSISTED, ids="-".join)
def test_assisted_decoding_at_keep_one_gives_the_tokens_of_the_unmodified_model(options):
    model = tiny_model()
    options = {**GREEDY, "max_new_tokens": 12, **called(options)}
    assert lazy_tokens(LazyPipeline.from_preset("dense", model), PROMPT, options) == stock_tokens(
        model, [PROMPT], options
    )


def test_candidates_may_come_from_a_model_with_another_tokenizer():
    model, words = tiny_model(), [f"w{number}" for number in range(VOCABULARY - 6)]
    options = {**GREEDY, "eos_token_id": VOCABULARY, "max_new_tokens": 10}
    options |= {"assistant_model": wider_model(), "assistant_tokenizer": word_tokenizer([*reversed(words), "x"])}
    tokenizer = word_tokenizer(words)
    stock = stock_tokens(model, [PROMPT], {**options, "tokenizer": tokenizer})
    assert lazy_tokens(LazyPipeline.from_preset("dense", model, tokenizer), PROMPT, options) == stock


def test_a_loop_of_the_callers_is_run():
    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        for _ in range(4):
            new = input_ids.shape[1] - kwargs[CACHE].get_seq_length()
            output = model(**model.prepare_inputs_for_generation(input_ids, next_sequence_length=new, **kwargs))
            kwargs = model._update_model_kwargs_for_generation(output, kwargs)
            input_ids = torch.cat([input_ids, output.logits[:, -1:].argmax(-1)], dim=1)
            stopping_criteria(input_ids, None)
        return input_ids

    pipe = LazyPipeline(tiny_model(), cache=AuxCache(), **PRUNING)
    plain = pipe.generate(PROMPT, max_new_tokens=4, **GREEDY)
    assert pipe.generate(PROMPT, max_new_tokens=4, custom_generate=loop, **GREEDY).token_ids == plain.token_ids


def test_scores_and_logits_are_those_of_the_unmodified_model():
    model = tiny_model()
    options = {**GREEDY, "max_new_tokens": 5, "return_dict_in_generate": True}
    options |= {"output_scores": True, "output_logits": True, "repetition_penalty": 1.3}
    stock = model.generate(PROMPT[None], **options)
    lazy = LazyPipeline.from_preset("dense", model).generate(PROMPT, **options).output
    assert torch.equal(torch.stack(lazy.scores), torch.stack(stock.scores))
    assert torch.equal(torch.stack(lazy.logits), torch.stack(stock.logits))
    assert isinstance(getattr(lazy, CACHE), LazyCache)


# -- one prompt, several rows ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"num_return_sequences": 4, "do_sample": True}, {"num_beams": 4, "do_sample": False}],
    ids=["replies", "beams"],
)
@pytest.mark.parametrize("chunk", [None, 5])
def test_a_prompt_is_prefilled_once_however_many_rows_it_has(options, chunk):
    pipe = LazyPipeline.from_preset("dense", tiny_model())
    with widths(pipe.model) as seen:
        result = pipe.generate(PROMPT, max_new_tokens=4, eos_token_id=-1, prefill_chunk_size=chunk, **options)
    chunks = [27] if chunk is None else [5, 5, 5, 5, 5, 2]
    assert seen[: len(chunks)] == chunks
    assert all(width <= 4 for width in seen[len(chunks) :])
    stats = (result[0] if isinstance(result, list) else result).stats
    done = sum(seen) * LAYERS
    assert stats.computed_fraction == pytest.approx(done / (LAYERS * 4 * (27 + 3)))
    assert sum(layer.computed for step in stats.tokens_per_layer for layer in step) == done


def test_rows_that_say_the_same_go_on_as_one():
    model = tiny_model()
    pipe = LazyPipeline.from_preset("dense", model)
    with widths(model) as seen:
        pipe.generate(PROMPT, num_return_sequences=3, do_sample=True, top_k=1, max_new_tokens=4, eos_token_id=-1)
    assert seen == [27, 1, 1, 1]


def test_two_prompts_that_are_the_same_are_two():
    """Each may have marks of its own."""
    pipe = LazyPipeline.from_preset("dense", tiny_model())
    with widths(pipe.model) as seen:
        pipe.generate([PROMPT, PROMPT], max_new_tokens=1, **GREEDY)
    assert seen == [54]


@given(policies(), st.one_of(CACHES, FORGETTING_CACHES), st.integers(1, 20))
def test_several_replies_are_those_of_as_many_prompts(chosen, cache, length):
    pipe = LazyPipeline(tiny_model(), cache=cache, **chosen)
    prompt, options = random_ids(1, length)[0], {"do_sample": True, "max_new_tokens": 4, "eos_token_id": -1}
    together = lazy_tokens(pipe, prompt, {**options, "num_return_sequences": 3})
    assert together == lazy_tokens(pipe, [prompt] * 3, options)


@given(policies(), st.one_of(CACHES, FORGETTING_CACHES), st.integers(1, 20), st.sampled_from([None, 3]))
def test_beams_are_those_of_rows_that_share_nothing(chosen, cache, length, chunk):
    pipe = LazyPipeline(tiny_model(), cache=cache, **chosen)
    prompt = random_ids(1, length)[0]
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "prefill_chunk_size": chunk}
    shared = lazy_tokens(pipe, prompt, options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Arrival, "same", lambda self, row, other: False)
        assert shared == lazy_tokens(pipe, prompt, options)


def test_a_conversation_branches_into_several_replies():
    model = tiny_model()
    pipe = LazyPipeline.from_preset("dense", model)
    cache, options = pipe.new_cache(), {"do_sample": True, "eos_token_id": -1}
    first = pipe.generate(PROMPT, past_key_values=cache, max_new_tokens=3, **options)
    prompt = [*PROMPT.tolist(), *first.token_ids, 8, 9]
    options |= {"max_new_tokens": 4, "num_return_sequences": 3}
    with pytest.raises(InputError, match="streamer"):
        pipe.generate(prompt, past_key_values=cache, num_beams=3, streamer=Pieces(), max_new_tokens=1)
    assert cache.batch_size == 1, "what is refused leaves the cache as it was"
    with widths(model) as seen:
        replies = lazy_tokens(pipe, prompt, {**options, "past_key_values": cache})
    assert seen[0] == 3
    assert replies == stock_tokens(model, [torch.tensor(prompt)], options)
    assert cache.batch_size == 3


def test_rows_with_other_marks_are_no_longer_one():
    pipe = LazyPipeline(tiny_model(), cache=AuxCache(), **PRUNING)
    cache = pipe.new_cache()
    pipe.generate(PROMPT, past_key_values=cache, max_new_tokens=1, **GREEDY)
    cache.reorder_cache(torch.tensor([0, 0]))
    assert cache.rows[0] is cache.rows[1]
    marks = [pipe.encode(PROMPT, query=(0, 2)).marks, pipe.encode(PROMPT, query=(4, 6)).marks]
    cache.mark_prompts(marks)
    assert [row.marks for row in cache.rows] == marks


def test_bytes_of_rows_that_are_one_count_once():
    pipe = LazyPipeline(tiny_model(), cache=AuxCache(), **PRUNING)
    alone, together = pipe.new_cache(), pipe.new_cache()
    pipe.generate(PROMPT, past_key_values=alone, max_new_tokens=1, **GREEDY)
    pipe.generate(PROMPT, past_key_values=together, max_new_tokens=1, num_beams=3, **GREEDY)
    assert (together.kv_bytes, together.aux_bytes) == (alone.kv_bytes, alone.aux_bytes)


# -- candidates --------------------------------------------------------------------------------------


class TracedCache(LazyCache):
    """Keeps of a trace what a crop leaves."""

    def __init__(self, policy, trace: TokenTrace) -> None:
        super().__init__(policy)
        self.trace, self.cropped = trace, 0

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.cropped += -tokens_to_remove
        length = len(self.rows[0].ledger)
        self.trace.steps = [[self.without(event, length) for event in step] for step in self.trace.steps]

    @staticmethod
    def without(event: LayerEnd, length: int) -> LayerEnd:
        (row,) = event.rows
        parts = [part[part < length] for part in (row.visible, row.computed, row.attended)]
        return LayerEnd(event.layer, event.layers, event.is_prefill, (RowTrace(*parts, row.first_new),))


@given(policies(), CACHES, st.sampled_from([0, 1, 2, 3]))
def test_candidates_keep_the_laws(chosen, cache, mode):
    """No layer-token is computed twice, and a replay with the same masks gives the same logits."""
    trace = TokenTrace()
    pipe = LazyPipeline(tiny_model(), cache=cache, callbacks=[trace], **chosen)
    held = TracedCache(pipe.config.cache, trace)
    options = {**GREEDY, "max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True}
    result = pipe.generate(PROMPT, past_key_values=held, **{**options, **called(ASSISTED[mode])})
    work = [(event.layer, token) for step in trace.steps for event in step for token in event.rows[0].computed.tolist()]
    assert len(work) == len(set(work))
    ids = torch.tensor([*PROMPT.tolist(), *result.token_ids])[: held.columns]
    expected, _ = replay(pipe.model, ids, trace.steps, 0)
    got = torch.cat(result.output.logits)[: len(ids) - len(PROMPT) + 1]
    torch.testing.assert_close(got, expected[len(PROMPT) - 1 :].float(), rtol=1e-4, atol=1e-4)


@given(policies(), st.sampled_from([AuxCache(decode="reuse"), DropCache(), DropCache(attend="cached")]))
def test_where_decode_steps_select_nothing_candidates_change_no_token(chosen, cache):
    pipe = LazyPipeline(tiny_model(), cache=cache, **chosen)
    plain = pipe.generate(PROMPT, max_new_tokens=10, **GREEDY)
    for options in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": draft_model()}):
        assisted = pipe.generate(PROMPT, max_new_tokens=10, **GREEDY, **options)
        assert assisted.token_ids == plain.token_ids
        assert assisted.stats.kv_bytes == plain.stats.kv_bytes


@given(policies(), st.one_of(CACHES, FORGETTING_CACHES))
def test_candidates_are_no_part_of_the_prefill(chosen, cache):
    pipe = LazyPipeline(tiny_model(), cache=cache, **chosen)
    plain, assisted = (
        pipe.generate(PROMPT, max_new_tokens=6, **GREEDY, **options)
        for options in ({}, {"prompt_lookup_num_tokens": 4})
    )
    assert assisted.stats.prefill_steps == plain.stats.prefill_steps == 1
    assert assisted.stats.tokens_per_layer[0] == plain.stats.tokens_per_layer[0]
    assert assisted.token_ids[0] == plain.token_ids[0]


def test_the_reply_stays_protected_when_candidates_come():
    trace = TokenTrace()
    pipe = LazyPipeline(tiny_model(), scorer=Random(5), schedule=Stages({1: 0.05}), cache=AuxCache(), callbacks=[trace])
    cache = pipe.new_cache()
    pipe.generate(PROMPT, past_key_values=cache, prompt_lookup_num_tokens=4, max_new_tokens=8, **GREEDY)
    assert cache.rows[0].reply_start == 27
    for step in trace.steps[1:]:
        new = step[1].rows[0]
        assert set(range(27, new.first_new)) <= set(new.visible.tolist())


def test_a_step_of_several_tokens_counts_them_all():
    """Every fourth token selects, with the first step at which it is certain."""
    selected = []

    class Selects(Callback):
        def on_layer_end(self, event):
            if event.layer == 1:
                selected.append(event.rows[0].choice is not None)

    pipe = LazyPipeline(
        tiny_model(),
        scorer=Random(1),
        schedule=Stages({1: 0.2}),
        cache=AuxCache(revive_every=4),
        protect=Protect(generated=False),
        callbacks=[Selects()],
    )
    cache = pipe.new_cache()
    with torch.no_grad(), pipe.attached() as model, cache.replying([], 10):
        for start, stop in ((0, 10), (10, 13), (13, 16), (16, 17), (17, 19), (19, 22), (22, 23)):
            model(random_ids(1, 23)[:, start:stop], past_key_values=cache, logits_to_keep=1)
    assert selected == [True, False, True, False, True, False, True], "the first new ones are 1, 4, 7, 8, 10 and 13"
    assert [cache.rows[0].reply_start, cache.prompt_columns] == [10, None]


@pytest.mark.parametrize("options", ASSISTED[:1] + ASSISTED[2:3], ids="-".join)
def test_candidates_continue_a_cache(options):
    """transformers gives the whole sequence once more; what is held is not computed again."""
    model, options = tiny_model(), {**GREEDY, "max_new_tokens": 10, **called(options)}
    pipe = LazyPipeline.from_preset("dense", model)
    cache = pipe.new_cache()
    first = pipe.generate(PROMPT, past_key_values=cache, **{**options, "max_new_tokens": 5})
    prompt = torch.tensor([*PROMPT.tolist(), *first.token_ids, *PROMPT[:9].tolist()])
    with widths(model) as seen:
        second = lazy_tokens(pipe, prompt, {**options, "past_key_values": cache})
    assert seen[0] == prompt.numel() - (27 + 5 - 1)
    assert second == stock_tokens(model, [prompt], options)


def test_evicting_caches_take_candidates():
    pipe = LazyPipeline(tiny_model(), cache=EvictingCache(budget=9, when="decode", every=3), **PRUNING)
    result = pipe.generate(PROMPT, prompt_lookup_num_tokens=4, max_new_tokens=8, **GREEDY)
    assert len(result.token_ids) == 8


def test_time_per_token_is_per_token_and_not_per_step():
    clock = TokenClock(torch.device("cpu"))
    for length in (11, 15, 21):
        clock(torch.zeros(1, length), None)
    assert clock.seconds_per_token == (clock.times[-1] - clock.times[0]) / 10


# -- a prompt is what was given as one ---------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 13])
def test_every_chunk_of_a_prompt_is_prefill(chunk):
    """Also one of a single token."""
    trace = TokenTrace()
    pipe = LazyPipeline(tiny_model(), cache=AuxCache(max_revived=0), callbacks=[trace], **PRUNING)
    stats = pipe.generate(PROMPT, prefill_chunk_size=chunk, max_new_tokens=3, **GREEDY).stats
    assert stats.prefill_steps == -(-27 // chunk)
    assert [step[0].is_prefill for step in trace.steps] == [True] * stats.prefill_steps + [False] * 2


@given(policies(), st.one_of(CACHES, FORGETTING_CACHES), st.booleans())
def test_a_reply_goes_on_in_another_call_as_it_would_have(chosen, cache, with_candidates):
    pipe = LazyPipeline(tiny_model(), cache=cache, **chosen)
    held, whole = pipe.new_cache(), pipe.generate(PROMPT, max_new_tokens=7, **GREEDY)
    first = pipe.generate(PROMPT, past_key_values=held, max_new_tokens=3, **GREEDY)
    options = {"prompt_lookup_num_tokens": 1, "max_new_tokens": 1} if with_candidates else {"max_new_tokens": 4}
    second = pipe.generate([*PROMPT.tolist(), *first.token_ids], past_key_values=held, **GREEDY, **options)
    assert first.token_ids + second.token_ids == whole.token_ids[: 3 + len(second.token_ids)]
    assert second.stats.prefill_steps == 0


def test_a_prompt_that_was_cropped_and_is_given_again_is_a_prompt():
    """Of which one token is missing, too."""
    words = [f"w{number}" for number in range(VOCABULARY - 6)]
    pipe = LazyPipeline(tiny_model(), word_tokenizer(words), cache=AuxCache(), **PRUNING)
    cache, prompt = pipe.new_cache(), " ".join(words[:20])
    pipe.generate(prompt, past_key_values=cache, query="w1 w2", max_new_tokens=4, **GREEDY)
    cache.crop(19 - cache.columns)
    again = pipe.generate(prompt, past_key_values=cache, query="w7 w8", max_new_tokens=4, **GREEDY)
    assert again.stats.prefill_steps == 1
    assert cache.rows[0].marks.query == ((7, 9),)
    assert cache.rows[0].reply_start == 20


def test_after_a_failure_the_cache_knows_of_no_prompt():
    class Fails(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise RuntimeError("boom")

    pipe = LazyPipeline(tiny_model(), cache=AuxCache(), **PRUNING)
    cache = pipe.new_cache()
    with pytest.raises(RuntimeError, match="boom"):
        pipe.generate(
            PROMPT, past_key_values=cache, logits_processor=LogitsProcessorList([Fails()]), max_new_tokens=2, **GREEDY
        )
    assert cache.prompt_columns is None
    assert cache.columns == 27


# -- ends, streams -----------------------------------------------------------------------------------


@pytest.fixture
def tokenizer():
    return word_tokenizer(["abcdef", *(f"w{number}" for number in range(VOCABULARY - 7))])


def test_stop_strings_need_no_tokenizer_of_the_caller(tokenizer):
    model = tiny_model()
    pipe = LazyPipeline.from_preset("dense", model, tokenizer)
    options = {**GREEDY, "eos_token_id": VOCABULARY + 1, "max_new_tokens": 8}
    plain = pipe.generate([PROMPT, PROMPT[:5]], **options)
    stop = tokenizer.decode(plain[0].token_ids[2:3])
    assert stop not in plain[1].text.split()
    stopped = pipe.generate([PROMPT, PROMPT[:5]], stop_strings=[f"{stop}"], **options)
    assert stopped[0].token_ids == plain[0].token_ids[:3], "and no padding behind it"
    assert stopped[1].token_ids == plain[1].token_ids


def test_stop_strings_without_a_tokenizer_are_refused():
    with pytest.raises(InputError, match="stop_strings needs a tokenizer"):
        LazyPipeline.from_preset("dense", tiny_model()).generate(PROMPT, stop_strings="a", **GREEDY)


class Pieces(BaseStreamer):
    def __init__(self):
        self.pieces: list[list[int]] = []

    def put(self, value):
        self.pieces.append(value.flatten().tolist())

    def end(self):
        self.pieces.append([])


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 4}], ids=["plain", "candidates"])
def test_a_streamer_hears_every_token(options):
    pipe = LazyPipeline(tiny_model(), cache=AuxCache(), **PRUNING)
    streamer = Pieces()
    result = pipe.generate(PROMPT, streamer=streamer, max_new_tokens=6, **GREEDY, **options)
    prompt, *pieces = streamer.pieces
    assert prompt == PROMPT.tolist()
    assert [token for piece in pieces for token in piece] == result.token_ids


# -- refused by name ---------------------------------------------------------------------------------

REFUSED_VALUES = {
    "inputs": PROMPT[None],
    "input_ids": PROMPT[None],
    "inputs_embeds": torch.zeros(1, 3, 32),
    "attention_mask": torch.ones(1, 27),
    "logits_to_keep": 5,
    "use_cache": False,
    "cache_implementation": "static",
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "num_beam_groups": 2,
    "constraints": [object()],
    "force_words_ids": [[5]],
    "guidance_scale": 1.5,
    "token_healing": True,
    "assistant_early_exit": 2,
    "use_mtp": True,
    "speculation_type": "dflash",
    "output_hidden_states": True,
    "output_attentions": True,
}


def test_every_refusal_is_tried():
    assert list(REFUSED_VALUES) == [refusal.name for refusal in REFUSED]


def test_the_page_names_every_refusal():
    page = (Path(__file__).parents[1] / "docs" / "generation.md").read_text()
    table = page.split("## What is refused")[1].split("\n## ")[0]
    assert all(f"`{refusal.name}" in table for refusal in REFUSED)


@pytest.mark.parametrize("name", REFUSED_VALUES)
def test_what_cannot_be_is_refused_by_name_before_the_model_runs(name):
    model = tiny_model()
    pipe = LazyPipeline(model, cache=AuxCache(), **PRUNING)
    with widths(model) as seen, pytest.raises(InputError, match=f"cannot take {name}="):
        pipe.generate(PROMPT, max_new_tokens=2, **{name: REFUSED_VALUES[name]})
    assert not seen


@pytest.mark.parametrize("name", ["use_cache", "guidance_scale"])
def test_a_generation_config_is_looked_into(name):
    pipe = LazyPipeline(tiny_model(), cache=AuxCache(), **PRUNING)
    with pytest.raises(InputError, match=f"cannot take {name}="):
        pipe.generate(PROMPT, generation_config=GenerationConfig(**{name: REFUSED_VALUES[name]}))


@pytest.mark.parametrize("harmless", [{"num_beam_groups": 1}, {"guidance_scale": 1.0}, {"use_cache": True}], ids=str)
def test_what_changes_nothing_is_taken(harmless):
    pipe = LazyPipeline(tiny_model(), cache=AuxCache(), **PRUNING)
    plain = pipe.generate(PROMPT, max_new_tokens=2, **GREEDY)
    assert pipe.generate(PROMPT, max_new_tokens=2, **GREEDY, **harmless).token_ids == plain.token_ids


@pytest.mark.parametrize("said", [{"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_what_the_model_itself_says_about_caches_is_not_followed(said, monkeypatch):
    model = tiny_model()
    pipe = LazyPipeline(model, cache=AuxCache(), **PRUNING)
    plain = pipe.generate(PROMPT, max_new_tokens=4, **GREEDY)
    for name, value in said.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert pipe.generate(PROMPT, max_new_tokens=4, **GREEDY).token_ids == plain.token_ids


def test_code_of_a_hub_is_refused():
    with pytest.raises(InputError, match="custom_generate='some/where'"):
        LazyPipeline.from_preset("dense", tiny_model()).generate(PROMPT, custom_generate="some/where")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_new_token": 3}, "max_new_token"),
        ({"num_return_sequences": 2, "do_sample": False}, "num_return_sequences"),
        ({"num_beams": 2, "streamer": Pieces()}, "streamer"),
        ({"max_length": 5}, "max_length"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_transformers_refuses_is_an_error_of_ours(options, reason):
    with pytest.raises(InputError, match=reason):
        LazyPipeline.from_preset("dense", tiny_model()).generate(PROMPT, **options)


def test_an_error_while_the_model_runs_stays_what_it_is():
    class Fails(Callback):
        def on_layer_end(self, event):
            raise ValueError("boom")

    pipe = LazyPipeline(tiny_model(), callbacks=[Fails()], cache=AuxCache(), **PRUNING)
    with pytest.raises(ValueError, match=r"^boom$") as raised:
        pipe.generate(PROMPT, max_new_tokens=2, **GREEDY)
    assert type(raised.value) is ValueError


def test_candidates_are_for_one_row_and_come_from_another_model():
    pipe = LazyPipeline.from_preset("dense", tiny_model())
    with pytest.raises(InputError, match="one prompt"):
        pipe.generate([PROMPT, PROMPT], prompt_lookup_num_tokens=3)
    with pytest.raises(InputError, match="one prompt"):
        pipe.generate(PROMPT, prompt_lookup_num_tokens=3, num_return_sequences=2, do_sample=True)
    with pytest.raises(InputError, match="own model"):
        pipe.generate(PROMPT, assistant_model=tiny_model())
