"""The serving engine: replies of a batch are those of calls of their own, whatever joins, leaves or waits."""

import threading
import time
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lazyllm import (
    AuxCache,
    CacheError,
    Callback,
    ConfigError,
    DenseCache,
    DropCache,
    EvictingCache,
    InputError,
    KeyNorm,
    LastTokenAttention,
    LazyCache,
    LazyPipeline,
    PolicyError,
    Scorer,
    Stages,
    Uniform,
    UpdateNorm,
    WindowAttention,
)
from lazyllm.errors import Cancelled, Closed, DocumentGone, QueueFull, TooLong
from lazyllm.serving import engine as engine_module
from lazyllm.serving.engine import Engine
from lazyllm.serving.jobs import Delta, Depths, DocumentLoaded, JobEnd, JobFailed, ReplyEnd, Sampling
from lazyllm.serving.sampling import Sampler
from lazyllm.serving.texts import ReplyText
from tests.jobs import Listener, engine_of, job, run, soon
from tests.talks import DOCUMENT, WORDS, pipeline, tokenizer
from tests.tiny import LAYERS, random_ids, tiny_model

POLICIES = {
    "aux": {"scorer": WindowAttention(window=4), "schedule": Stages({1: 0.6, 3: 0.3}), "cache": AuxCache()},
    "bounded": {
        "scorer": LastTokenAttention(),
        "schedule": Stages({1: 0.5, 2: 0.3}),
        "cache": AuxCache(max_revived=3, revive_every=3),
    },
    "drop": {"scorer": KeyNorm(), "schedule": Stages({2: 0.4}), "cache": DropCache()},
    "dense": {"scorer": Uniform(), "schedule": Stages({}), "cache": DenseCache()},
    "updates": {"scorer": UpdateNorm(), "schedule": Stages({1: 0.5}), "cache": AuxCache()},
}


@pytest.fixture(autouse=True)
def replies_have_the_length_they_may_have():
    """Tiny models say their end token by chance."""
    model = tiny_model("llama")
    before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    yield
    model.generation_config.eos_token_id = before


def pipe_of(policy="aux", family="llama", **more):
    return LazyPipeline(tiny_model(family), tokenizer(), **{**POLICIES[policy], **more})


def prompt_of(pipe, length, seed=0):
    return pipe.encode(random_ids(1, length, seed)[0])


def alone(pipe, prompt, most):
    return pipe.generate(prompt, do_sample=False, max_new_tokens=most).token_ids


class Gate(Callback):
    """Lets a test look on while a layer of a prefill of many tokens waits."""

    def __init__(self, tokens):
        self.tokens, self.reached, self.go_on = tokens, threading.Event(), threading.Event()

    def on_prefill_start(self, event):
        if sum(event.new_tokens) >= self.tokens:
            self.reached.set()
            assert self.go_on.wait(60)


# -- what comes out ---------------------------------------------------------------------------------


@given(
    policy=st.sampled_from(list(POLICIES)),
    asked=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=6),
    piece=st.sampled_from([3, 8, 512]),
    running=st.integers(1, 4),
)
def test_greedy_replies_of_a_batch_are_those_of_calls_of_their_own(policy, asked, piece, running):
    pipe = pipe_of(policy)
    prompts = [(prompt_of(pipe, length, seed), most) for seed, (length, most) in enumerate(asked)]
    with engine_of(pipe, piece=piece, running=running) as engine:
        listeners = [Listener() for _ in prompts]
        for (prompt, most), listener in zip(prompts, listeners, strict=True):
            engine.submit(job(prompt, most), listener)
        for listener in listeners:
            assert isinstance(listener.wait(), JobEnd)
    for (prompt, most), listener in zip(prompts, listeners, strict=True):
        assert listener.tokens() == alone(pipe, prompt, most)


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma3_text", "mixtral"])
def test_families_of_other_kinds_batch_as_well(family):
    pipe = pipe_of("bounded", family)
    prompts = [prompt_of(pipe, length, length) for length in (30, 7, 18)]
    with engine_of(pipe, piece=5) as engine:
        listeners = [Listener() for _ in prompts]
        for prompt, listener in zip(prompts, listeners, strict=True):
            engine.submit(job(prompt, 8), listener)
        for prompt, listener in zip(prompts, listeners, strict=True):
            listener.wait()
            assert listener.tokens() == alone(pipe, prompt, 8)


def test_policies_share_the_engine_and_keep_their_own_batches():
    first, second = pipe_of("aux"), pipe_of("drop")
    prompt = prompt_of(first, 30)
    with engine_of(first, second, piece=4) as engine:
        listeners = {name: Listener() for name in ("first", "second")}
        for name, listener in listeners.items():
            engine.submit(job(prompt, 9, policy=name), listener)
        for listener in listeners.values():
            listener.wait()
    assert listeners["first"].tokens() == alone(first, prompt, 9)
    assert listeners["second"].tokens() == alone(second, prompt, 9)


def test_an_event_comes_for_every_token_and_one_at_the_end():
    pipe = pipe_of()
    with engine_of(pipe) as engine:
        listener = run(engine, job(prompt_of(pipe, 20), 5))
    kinds = [type(event) for event in listener.events]
    assert kinds == [Delta] * 5 + [ReplyEnd, JobEnd]
    assert listener.of(ReplyEnd)[0].reason == "length"
    assert all(len(delta.token_ids) == 1 for delta in listener.of(Delta))
    assert len(listener.threads) == 1
    assert threading.get_ident() not in listener.threads


def test_the_text_is_the_tokenizers_and_ends_before_a_stop_string():
    pipe = pipe_of()
    prompt = prompt_of(pipe, 20)
    whole = pipe.generate(prompt, do_sample=False, max_new_tokens=8)
    words = whole.text.split()
    stop = f"{words[3]} {words[4]}"
    with engine_of(pipe) as engine:
        plain = run(engine, job(prompt, 8))
        stopped = run(engine, job(prompt, 8, stop=(stop,)))
    assert plain.text() == whole.text
    assert stopped.text() == whole.text[: whole.text.index(stop)]
    assert stopped.of(ReplyEnd)[0].reason == "stop"
    assert stopped.tokens() == whole.token_ids[: len(stopped.tokens())]
    assert len(stopped.tokens()) <= 5


def test_an_end_token_ends_a_reply():
    pipe = pipe_of()
    prompt = prompt_of(pipe, 20)
    ended = alone(pipe, prompt, 8)[2]
    tiny_model("llama").generation_config.eos_token_id = [ended]
    with engine_of(pipe) as engine:
        listener = run(engine, job(prompt, 8))
    assert listener.tokens() == alone(pipe, prompt, 8)
    assert listener.tokens()[-1] == ended
    assert listener.of(ReplyEnd)[0].reason == "stop"


def test_logprobs_are_the_models_own():
    pipe = pipe_of("dense")
    prompt = prompt_of(pipe, 12)
    with engine_of(pipe) as engine:
        listener = run(engine, job(prompt, 4, top_logprobs=3))
    ids = torch.tensor([prompt.token_ids + listener.tokens()])
    expected = tiny_model()(ids).logits[0, 11:-1].log_softmax(-1)
    told = [delta.logprobs[0] for delta in listener.of(Delta)]
    for known, row in zip(told, expected, strict=True):
        assert known.logprob == pytest.approx(float(row[known.token_id]), abs=1e-5)
        assert [other.token_id for other in known.top] == row.topk(3).indices.tolist()
        assert known.top[0].text == tokenizer().decode([known.top[0].token_id])


def test_several_replies_prefill_once_and_draw_as_jobs_of_their_own_would():
    pipe = pipe_of()
    prompt = prompt_of(pipe, 30)
    prefills = []

    class Count(Callback):
        def on_prefill_start(self, event):
            prefills.append(event)

    counting = pipe_of()
    counting.callbacks = (Count(),)
    with engine_of(counting) as engine:
        together = run(engine, job(prompt, 7, replies=3, temperature=1.0, seed=5))
        assert len(prefills) == 1
        for number in range(3):
            single = run(engine, job(prompt, 7, temperature=1.0, seed=5 + number))
            assert together.tokens(number) == single.tokens()
    assert len({tuple(together.tokens(number)) for number in range(3)}) > 1
    assert together.wait(JobEnd).usage.reply_tokens == 21


# -- who waits for whom -----------------------------------------------------------------------------


def test_replies_go_on_while_a_long_prompt_is_computed():
    pipe = pipe_of()
    with engine_of(pipe, piece=4) as engine:
        order = []
        short, long = Listener(), Listener()
        engine.submit(job(prompt_of(pipe, 8), 60), lambda event: (order.append("short"), short(event)))
        short.wait(Delta)
        engine.submit(job(prompt_of(pipe, 150, 1), 2), lambda event: (order.append("long"), long(event)))
        long.wait()
        short.wait()
    assert order[: order.index("long")].count("short") > 5
    assert short.tokens() == alone(pipe, prompt_of(pipe, 8), 60)
    assert long.tokens() == alone(pipe, prompt_of(pipe, 150, 1), 2)


def test_a_much_shorter_prompt_does_not_wait_for_a_long_one():
    gate = Gate(100)
    pipe = pipe_of("updates")
    pipe.callbacks = (gate,)
    plain = pipe_of("updates")
    with engine_of(pipe, piece=8) as engine:
        order = []
        long, short = Listener(), Listener()
        engine.submit(job(prompt_of(plain, 120), 3), lambda event: (order.append("long"), long(event)))
        assert gate.reached.wait(60)
        engine.submit(job(prompt_of(plain, 20, 1), 3), lambda event: (order.append("short"), short(event)))
        gate.go_on.set()
        short.wait()
        long.wait()
    assert order[0] == "short"
    assert short.tokens() == alone(plain, prompt_of(plain, 20, 1), 3)
    assert long.tokens() == alone(plain, prompt_of(plain, 120), 3)


def test_a_prompt_of_like_length_waits_for_its_turn():
    gate = Gate(100)
    pipe = pipe_of()
    pipe.callbacks = (gate,)
    with engine_of(pipe, piece=8) as engine:
        order = []
        first, second = Listener(), Listener()
        engine.submit(job(prompt_of(pipe, 120), 2), lambda event: (order.append("first"), first(event)))
        assert gate.reached.wait(60)
        engine.submit(job(prompt_of(pipe, 60, 1), 2), lambda event: (order.append("second"), second(event)))
        gate.go_on.set()
        first.wait()
        second.wait()
    assert order[0] == "first"


def test_no_more_replies_run_than_may():
    pipe = pipe_of()
    most = []

    class Watch(Callback):
        def on_step_end(self, event):
            most.append(0 if event.is_prefill else len(event.new_tokens))

    pipe.callbacks = (Watch(),)
    with engine_of(pipe, running=3) as engine:
        listeners = [Listener() for _ in range(7)]
        for seed, listener in enumerate(listeners):
            engine.submit(job(prompt_of(pipe, 10, seed), 12, replies=1 + seed % 2), listener)
        for listener in listeners:
            listener.wait()
    assert max(most) == 3


# -- who is refused, and who is given up --------------------------------------------------------------


def test_the_queue_has_an_end():
    gate = Gate(40)
    pipe = pipe_of()
    pipe.callbacks = (gate,)
    with engine_of(pipe, waiting=2) as engine:
        listeners = [Listener() for _ in range(3)]
        engine.submit(job(prompt_of(pipe, 50), 2), listeners[0])
        assert gate.reached.wait(60)
        for listener in listeners[1:]:
            engine.submit(job(prompt_of(pipe, 30), 2), listener)
        assert engine.stats.waiting == 2
        with pytest.raises(QueueFull, match="2 jobs wait already") as refused:
            engine.submit(job(prompt_of(pipe, 30), 2), Listener())
        assert refused.value.retry_seconds >= 1
        gate.go_on.set()
        for listener in listeners:
            assert isinstance(listener.wait(), JobEnd)


@pytest.mark.parametrize("phase", ["waiting", "prefill", "decode"])
def test_a_job_that_is_given_up_is_gone_at_once_and_others_go_on(phase):
    gate = Gate(100)
    pipe = pipe_of()
    pipe.callbacks = (gate,)
    if phase != "prefill":
        gate.go_on.set()
    with engine_of(pipe, piece=4, running=1 if phase == "waiting" else 8) as engine:
        other, listener = Listener(), Listener()
        engine.submit(job(prompt_of(pipe, 12), 40), other)
        other.wait(Delta)
        ticket = engine.submit(job(prompt_of(pipe, 110, 1), 90), listener)
        if phase == "prefill":
            assert gate.reached.wait(60)
        if phase == "decode":
            listener.wait(Delta, 2)
            held = [weakref.ref(reply.cache) for reply in engine._running() if reply.task.tokens == 110]
        ticket.cancel()
        gate.go_on.set()
        assert isinstance(listener.wait().error, Cancelled)
        if phase == "waiting":
            assert not listener.tokens()
            assert not other.done
        other.wait()
        if phase == "decode":
            assert held
            assert all(cache() is None for cache in held)
        assert other.tokens() == alone(pipe, prompt_of(pipe, 12), 40)
        soon(lambda: engine.stats.jobs == {"cancelled": 1, "done": 1})
        soon(lambda: (engine.stats.running, engine.stats.kv_bytes, engine.stats.aux_bytes) == (0, 0, 0))
    assert listener.events[-1] is listener.of(JobFailed)[-1]


def test_what_cannot_be_done_is_refused_at_once():
    pipe = pipe_of()
    prompt = prompt_of(pipe, 20)
    with engine_of(pipe, running=2) as engine:
        with pytest.raises(TooLong, match=r"the prompt has 20 tokens and the reply may have 240, that is 260 in all"):
            engine.submit(job(prompt, 240), Listener())
        with pytest.raises(InputError, match=r"unknown policy 'frist'\. Did you mean 'first'"):
            engine.submit(job(prompt, policy="frist"), Listener())
        with pytest.raises(InputError, match="a job has 1 to 2 replies here, not 3"):
            engine.submit(job(prompt, replies=3), Listener())
        with pytest.raises(DocumentGone, match="there is no document 'doc-1'"):
            engine.submit(job(prompt, document="doc-1"), Listener())
        with pytest.raises(InputError, match="token id 96 is none of this model, which has 0 to 95"):
            engine.submit(job(pipe.encode([4, 96])), Listener())
        with pytest.raises(InputError, match="token id 1000 is none"):
            engine.submit(job(prompt, logit_bias={1000: 1.0}), Listener())
        assert isinstance(run(engine, job(prompt, 2)).events[-1], JobEnd)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"temperature": -0.1}, "temperature is a number from 0 to 2, not -0.1"),
        ({"temperature": float("nan")}, "temperature is a number from 0 to 2, not nan"),
        ({"top_p": 1.5}, "top_p is a number from 0 to 1, not 1.5"),
        ({"max_tokens": 0}, "max_tokens is a number from 1 to"),
        ({"top_logprobs": 21}, "top_logprobs is a number from 0 to 20, not 21"),
        ({"logit_bias": {3: 101}}, "logit_bias of token 3 is a number from -100 to 100"),
        ({"stop": ("",)}, "a stop string cannot be empty"),
    ],
)
def test_numbers_out_of_range_are_refused_with_the_range(fields, said):
    with pytest.raises(InputError, match=said):
        Sampling(**fields)


def test_an_engine_needs_pipelines_of_one_model():
    with pytest.raises(ConfigError, match="pipelines of one model"):
        Engine({})
    with pytest.raises(ConfigError, match="pipelines of one model"):
        Engine({"one": pipe_of(), "other": pipe_of(family="qwen3")})


def test_a_reply_without_a_limit_ends_with_the_positions():
    pipe = pipe_of("dense")
    with engine_of(pipe) as engine:
        listener = run(engine, job(prompt_of(pipe, 240), None))
    assert len(listener.tokens()) == 256 - 240
    assert listener.of(ReplyEnd)[0].reason == "length"


class Poisoned(Scorer):
    """Fails for prompts that begin with token 5."""

    def score(self, context):
        scores = torch.rand(context.tokens.numel(), generator=torch.Generator().manual_seed(context.context_tokens))
        failing = context.token_ids is not None and int(context.token_ids[0]) == 5 and context.context_tokens > 32
        return scores * float("nan") if failing else scores


def test_a_reply_that_fails_in_a_step_fails_alone():
    pipe = pipe_of(scorer=Poisoned())
    good, bad = prompt_of(pipe, 30), pipe.encode([5, *random_ids(1, 29)[0].tolist()])
    with engine_of(pipe) as engine:
        listeners = [Listener(), Listener()]
        engine.submit(job(good, 12), listeners[0])
        engine.submit(job(bad, 12), listeners[1])
        assert isinstance(listeners[1].wait().error, PolicyError)
        listeners[0].wait()
        soon(lambda: engine.stats.jobs == {"done": 1, "failed": 1})
    assert listeners[0].tokens() == alone(pipe, good, 12)
    assert 1 <= len(listeners[1].tokens()) < 12


def test_a_listener_that_fails_loses_its_job_alone(caplog):
    pipe = pipe_of()

    def broken(event):
        raise RuntimeError("gone")

    with engine_of(pipe) as engine:
        good = Listener()
        engine.submit(job(prompt_of(pipe, 12), 20), broken)
        engine.submit(job(prompt_of(pipe, 12), 20), good)
        assert isinstance(good.wait(), JobEnd)
        assert run(engine, job(prompt_of(pipe, 5), 2)).done
        assert engine.stats.running == 0
    assert "a listener failed" in caplog.text


def test_closing_lets_replies_end_and_refuses_the_rest():
    pipe = pipe_of()
    engine = Engine({"only": pipe}, engine_module.EngineLimits(running=1, prefix_bytes=0))
    running, waiting = Listener(), Listener()
    engine.submit(job(prompt_of(pipe, 12), 60), running)
    running.wait(Delta)
    engine.submit(job(prompt_of(pipe, 12), 5), waiting)
    engine.close()
    assert isinstance(running.wait(), JobEnd)
    assert len(running.tokens()) == 60
    assert isinstance(waiting.wait().error, Closed)
    assert not engine.is_open
    with pytest.raises(Closed):
        engine.submit(job(prompt_of(pipe, 12)), Listener())


def test_closing_at_once_ends_what_runs():
    pipe = pipe_of()
    engine = Engine({"only": pipe}, engine_module.EngineLimits(prefix_bytes=0))
    running = Listener()
    engine.submit(job(prompt_of(pipe, 12), 200), running)
    running.wait(Delta)
    engine.close(timeout=0)
    assert isinstance(running.wait().error, Closed)


def test_free_memory_is_given_back_once_when_there_is_nothing_to_do(monkeypatch):
    given_back = []
    monkeypatch.setattr(engine_module, "give_back_free_memory", lambda: given_back.append(engine.stats.running))
    monkeypatch.setattr(engine_module, "IDLE_SECONDS", 0.05)
    pipe = pipe_of()
    with engine_of(pipe) as engine:
        for jobs in (0, 1, 2):
            if jobs:
                run(engine, job(prompt_of(pipe, 12), 20))
                soon(lambda jobs=jobs: len(given_back) >= jobs)
            time.sleep(0.3)
            assert given_back == [0] * jobs


def test_other_threads_may_use_the_pipeline_meanwhile():
    pipe = pipe_of()
    prompt = prompt_of(pipe, 25)
    expected = alone(pipe, prompt, 6)
    with engine_of(pipe) as engine:
        listener = Listener()
        engine.submit(job(prompt_of(pipe, 12), 60), listener)
        listener.wait(Delta)
        assert alone(pipe, prompt, 6) == expected
        listener.wait()
    assert listener.tokens() == alone(pipe, prompt_of(pipe, 12), 60)


# -- what it costs -------------------------------------------------------------------------------------


def test_depths_tell_how_deep_every_token_of_the_prompt_is():
    pipe = pipe_of()
    prompt = prompt_of(pipe, 40)
    cache = pipe.new_cache()
    result = pipe.generate(prompt, do_sample=False, max_new_tokens=10, past_key_values=cache)
    with engine_of(pipe, piece=6) as engine:
        listener = run(engine, job(prompt, 10, trace=True))
    told = listener.of(Depths)
    known = {}
    for event in told:
        assert event.layers == LAYERS
        for token, depth in zip(event.tokens, event.depths, strict=True):
            assert depth > known.get(token, -1)
            known[token] = depth
    assert len(told[0].tokens) == 40
    assert [known[token] for token in range(40)] == cache.rows[0].ledger.depth[:40].tolist()
    usage = listener.wait(JobEnd).usage
    assert usage.computed_fraction == pytest.approx(result.stats.prefill_computed_fraction)
    assert usage.computed_fraction == pytest.approx(sum(told[0].depths) / (40 * LAYERS))
    assert usage.revived_tokens == sum(len(event.tokens) for event in told[1:]) > 0
    assert 0 <= usage.queued_seconds <= usage.ttft_seconds <= usage.seconds
    assert (usage.prompt_tokens, usage.cached_tokens, usage.reply_tokens) == (40, 0, 10)


def test_a_further_turn_finds_what_the_one_before_has_computed():
    pipe = pipe_of()
    prompt = prompt_of(pipe, 40)
    with engine_of(pipe, prefix_bytes=10**8) as engine:
        first = run(engine, job(prompt, 5))
        turn = pipe.encode(prompt.token_ids + first.tokens() + random_ids(1, 6, 3)[0].tolist())
        usage = run(engine, job(turn, 5)).wait(JobEnd).usage
        assert usage.cached_tokens == 44
        assert usage.computed_fraction < 0.5
        assert engine.stats.prefix_entries == 1
        assert engine.stats.cached_tokens == 44


def test_a_policy_that_cannot_take_tokens_up_again_keeps_nothing_of_earlier_prompts():
    pipe = pipe_of("drop")
    prompt = prompt_of(pipe, 40)
    with engine_of(pipe, prefix_bytes=10**8) as engine:
        one, other = run(engine, job(prompt, 5)), run(engine, job(prompt, 5))
        assert other.wait(JobEnd).usage.cached_tokens == 0
        assert engine.stats.prefix_entries == 0
    assert one.tokens() == other.tokens()


def test_questions_to_a_loaded_document_compute_what_they_need():
    pipe = pipeline()
    document = pipe.load([DOCUMENT])
    expected = document.fork().ask("w3 w5 ?", do_sample=False, max_new_tokens=6).token_ids
    with engine_of(pipe, piece=7) as engine:
        loading = Listener()
        engine.load([DOCUMENT], loading)
        loaded = loading.wait()
        assert (loaded.tokens, loaded.depth, loaded.layers) == (len(document), document.loaded.depth, LAYERS)
        name = loaded.document
        asked = job(engine.document(name).prompt("w3 w5 ?"), 6, document=name)
        first = run(engine, asked)
        assert first.tokens() == expected
        assert first.wait(JobEnd).usage.cached_tokens == len(document)
        again = run(engine, asked)
        assert again.wait(JobEnd).usage.computed_fraction < first.wait(JobEnd).usage.computed_fraction
        assert engine.stats.documents == 1
        assert engine.document(name).cache.columns == len(document)
        with pytest.raises(InputError, match="does not begin with document"):
            engine.submit(job(prompt_of(pipe, 80), 2, document=name), Listener())


def test_a_document_is_asked_by_the_policy_that_loaded_it():
    pipe = pipeline()
    with engine_of(pipe, LazyPipeline.from_preset("dense", pipe.model, pipe.tokenizer)) as engine:
        loading = Listener()
        engine.load([DOCUMENT], loading, policy="first")
        name = loading.wait().document
        asked = engine.document(name).prompt("w3 w5 ?")
        with pytest.raises(InputError, match=f"{name!r} was loaded by the policy 'first', and is asked by 'second'"):
            engine.submit(job(asked, 6, document=name, policy="second"), Listener())


def test_documents_leave_when_there_is_no_room():
    pipe = pipeline()
    held = pipe.load([DOCUMENT])
    size = held.cache.kv_bytes + held.cache.aux_bytes
    with engine_of(pipe, document_bytes=int(2.5 * size)) as engine:
        names = []
        for _ in range(3):
            listener = Listener()
            engine.load([DOCUMENT], listener)
            names.append(listener.wait(DocumentLoaded).document)
        with pytest.raises(DocumentGone, match="no document"):
            engine.document(names[0])
        assert engine.stats.documents == 2
        assert engine.stats.document_bytes <= 2.5 * size
    with engine_of(pipe, document_bytes=size // 2) as engine:
        listener = Listener()
        engine.load([DOCUMENT], listener)
        assert "there is room for" in str(listener.wait(JobFailed).error)


def test_policies_that_keep_nothing_load_no_documents():
    pipe = LazyPipeline(tiny_model(), tokenizer(), **POLICIES["drop"])
    with engine_of(pipe) as engine, pytest.raises(InputError, match="keeps no tokens that wait"):
        engine.load([DOCUMENT], Listener())


# -- rows side by side ---------------------------------------------------------------------------------


def test_caches_side_by_side_need_the_same_model_and_policy():
    pipe, other, evicting = pipe_of(), pipe_of(family="qwen3"), LazyPipeline(tiny_model(), cache=EvictingCache())
    caches = [one.new_cache() for one in (pipe, other, evicting)]
    for one, cache in zip((pipe, other, evicting), caches, strict=True):
        one.generate(random_ids(1, 9)[0], max_new_tokens=2, do_sample=False, past_key_values=cache)
    for index in (1, 2):
        with pytest.raises(CacheError, match="side by side need the same model, adapters and policy"):
            LazyCache.beside([caches[0], caches[index]])


def test_each_row_counts_its_own_columns():
    pipe = pipe_of()
    caches = [pipe.new_cache() for _ in range(2)]
    for cache, length in zip(caches, (9, 20), strict=True):
        pipe.generate(random_ids(1, length)[0], max_new_tokens=2, do_sample=False, past_key_values=cache)
    batch = LazyCache.beside(caches)
    with torch.no_grad(), pipe.attached() as model:
        for step in range(2):
            positions = torch.tensor([[10 + step], [21 + step]])
            model(torch.tensor([[5], [6]]), position_ids=positions, past_key_values=batch)
    assert [cache.columns for cache in caches] == [12, 23]
    assert batch.columns == 23
    caches[0].crop(-1)
    assert caches[0].columns == len(caches[0].rows[0].ledger) == 11
    with pytest.raises(InputError, match="-11 to 0, not -12"):
        batch.crop(-12)


# -- one token ------------------------------------------------------------------------------------------


def test_a_draw_takes_the_likeliest_tokens_by_their_probability():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    draws = [Sampler(Sampling(temperature=1, top_p=0.9, seed=seed)).draw(logits) for seed in range(3000)]
    shares = torch.bincount(torch.tensor(draws), minlength=4) / 3000
    assert shares[3] == 0
    assert torch.allclose(shares[:3], torch.tensor([0.5, 0.3, 0.15]) / 0.95, atol=0.03)


def test_a_seed_repeats_a_draw_and_no_seed_does_not():
    logits = torch.zeros(1000)

    def drawn(seed):
        sampler = Sampler(Sampling(seed=seed))
        return [sampler.draw(logits) for _ in range(5)]

    assert drawn(3) == drawn(3) != drawn(4)
    assert drawn(None) != drawn(None)


def test_penalties_and_biases_change_what_is_likeliest():
    logits = torch.tensor([2.0, 1.5, 0.0])
    greedy = {"temperature": 0}
    presence = Sampler(Sampling(**greedy, presence_penalty=1.0))
    assert [presence.draw(logits) for _ in range(3)] == [0, 1, 0]
    frequency = Sampler(Sampling(**greedy, frequency_penalty=0.3))
    assert [frequency.draw(logits) for _ in range(4)] == [0, 0, 1, 0]
    biased = Sampler(Sampling(**greedy, logit_bias={2: 50.0, 0: -1.0}))
    assert [biased.draw(logits) for _ in range(2)] == [2, 2]
    assert not presence.greedy
    assert Sampler(Sampling(**greedy)).greedy


# -- text -----------------------------------------------------------------------------------------------


@given(
    tokens=st.lists(st.integers(14, 17), max_size=20),
    stops=st.lists(st.sampled_from([WORDS[3], f"{WORDS[4]} {WORDS[5]}", "w1", "nothing"]), max_size=2),
)
def test_text_never_takes_back_what_it_told_and_ends_before_the_first_stop(tokens, stops):
    known = tokenizer()
    text, told = ReplyText(known, stops), ""
    for token in tokens:
        told += text.add(token)
        if text.stopped:
            break
    told += text.end()
    whole = known.decode(text.token_ids)
    places = [whole.index(stop) for stop in stops if stop in whole]
    assert told == (whole[: min(places)] if places else whole)
    assert text.stopped == bool(places)


class HalfCharacters:
    """Two tokens make one character."""

    def decode(self, ids, skip_special_tokens=False):
        return "é" * (len(ids) // 2) + "\ufffd" * (len(ids) % 2)


def test_half_a_character_waits_for_its_other_half():
    text = ReplyText(HalfCharacters())
    assert [text.add(token) for token in range(3)] == ["", "é", ""]
    assert text.end() == "\ufffd"
