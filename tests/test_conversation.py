"""Conversations: what is new is computed, nothing else changes, and a turn is all or nothing."""

import errno
import json
import threading
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from lazyllm import (
    AttachError,
    AuxCache,
    CacheError,
    Callback,
    Constant,
    Conversation,
    DropCache,
    EvictingCache,
    InputError,
    LastTokenAttention,
    LazyPipeline,
    Random,
    Stages,
    TokenTrace,
    WindowAttention,
)
from lazyllm.caches.saved import DOCUMENT as CACHE_DOCUMENT
from lazyllm.contexts import conversation
from lazyllm.contexts.prefixes import held_ids
from lazyllm.models.names import CACHE_NAMES
from tests.talks import (
    DOCUMENT,
    FORGETFUL,
    GREEDY,
    PRUNING,
    REFUSES,
    TOOLS_FIRST,
    TOOLS_LAST,
    TURNS,
    WORDS,
    depths,
    pipeline,
    tokenizer,
)
from tests.test_saved import files_of_at_most
from tests.tiny import tiny_model

DENSE = {"scorer": LastTokenAttention(), "schedule": Constant(1.0), "cache": AuxCache()}
TOOLS = [{"name": "w50"}, {"name": "w51"}]


def talked(turns: int = 2, **options) -> Conversation:
    chat = pipeline().conversation(documents=DOCUMENT, **options)
    for number in range(turns):
        chat.ask(f"w{number} w{number + 1} ?", **GREEDY)
    return chat


def same(one: Conversation, other: Conversation) -> None:
    assert one.messages == other.messages
    assert one.turns == other.turns
    assert torch.equal(held_ids(one.cache), held_ids(other.cache))
    assert torch.equal(depths(one), depths(other))


# -- what a turn computes ----------------------------------------------------------------------------


def test_a_turn_computes_what_is_new_and_what_it_revives():
    chat = pipeline().conversation(documents=DOCUMENT)
    first = chat.ask("w1 w2 ?", **GREEDY)
    held = chat.cache.columns
    second = chat.ask("w3 ?", **GREEDY)
    assert first.stats.reused_tokens == 0
    assert second.stats.reused_tokens == held == first.stats.prompt_tokens + 3
    new = second.stats.prompt_tokens - held
    assert second.stats.tokens_per_layer[0][0].computed == new == len(["w0", "end", "user", ":", "w3", "?"]) + 3
    assert second.stats.revived_tokens > 0
    assert [turn.rewritten_tokens for turn in chat.turns] == [0, 0]


def test_no_layer_computes_a_token_twice_over_turns():
    trace, chat = TokenTrace(), pipeline().conversation(documents=DOCUMENT, system="w60 w61")
    for text in ("w1 ?", "w2 w3 ?", "w4 ?"):
        chat.ask(text, callbacks=[trace], **GREEDY)
    work = [(event.layer, token) for step in trace.steps for event in step for token in event.rows[0].computed.tolist()]
    assert len(work) == len(set(work)) == int(depths(chat).sum())


@pytest.mark.parametrize("template", [TURNS, FORGETFUL], ids=["turns", "forgetful"])
def test_at_keep_one_a_reply_is_that_of_the_whole_prompt(template: str):
    pipe = pipeline(template, **DENSE)
    chat = pipe.conversation(documents=[DOCUMENT, "w8 w9"], system="w60 w61")
    for text in ("w1 w2 ?", "w3", "w4 w5 ."):
        before = chat.messages
        reply = chat.ask(text, **GREEDY)
        asked = f"{DOCUMENT}\n\nw8 w9\n\n{text}" if len(before) == 1 else text
        fresh = pipe.generate([*before, {"role": "user", "content": asked}], **GREEDY)
        assert reply.token_ids == fresh.token_ids


def test_documents_open_the_first_question_and_the_system_message_stands_alone():
    chat = pipeline().conversation(documents=[f" {DOCUMENT}\n", "w8 w9"], system="w60")
    assert chat.messages == [{"role": "system", "content": "w60"}]
    reply = chat.ask("  w1 ?\n", **GREEDY)
    assert chat.messages == [
        {"role": "system", "content": "w60"},
        {"role": "user", "content": f"{DOCUMENT}\n\nw8 w9\n\nw1 ?"},
        {"role": "assistant", "content": reply.text},
    ]
    assert chat.turns[0].asked == {"role": "user", "content": "w1 ?"}
    assert chat.turns[0].stats == reply.stats


@pytest.mark.parametrize("several", [False, True])
def test_loaded_documents_are_gone_on_from(several: bool, tmp_path):
    pipe = pipeline()
    framed = {"system": "w60", "layout": "w70 {documents} w71 {question} w72"}
    loaded = pipe.load(DOCUMENT, **framed)
    if several:
        loaded = loaded.join(pipe.load("w8 w9", start=loaded.end, **framed))
    held, before = loaded.cache.columns, loaded.cache.rows[0].ledger.depth.clone()
    chat = pipe.conversation(documents=[loaded])
    reply = chat.ask("w1 ?", **GREEDY)
    assert reply.stats.reused_tokens == held == len(loaded)
    assert reply.stats.revived_tokens > 0
    text = f"{DOCUMENT}\n\nw8 w9" if several else DOCUMENT
    first = [{"role": "system", "content": "w60"}, {"role": "user", "content": f"w70 {text} w71 w1 ? w72"}]
    assert chat.messages[:2] == first
    assert torch.equal(loaded.cache.rows[0].ledger.depth, before), "the document itself stays as it is"
    again = pipe.load_conversation(chat.save(tmp_path / "chat"))
    one, other = (talk.ask("w2 ?", **GREEDY) for talk in (chat, again))
    assert one.token_ids == other.token_ids
    assert chat.turns[1].rewritten_tokens == 0
    for options in ({"documents": loaded, "system": "w1"}, {"documents": [loaded, "w1"]}):
        with pytest.raises(InputError, match="opens a conversation by itself"):
            pipe.conversation(**options)


def test_the_tokens_of_a_loaded_document_stay_what_they_are_beside_any_question():
    pipe = pipeline()
    loaded = pipe.load(f"{DOCUMENT} w1", layout="{documents}2 {question}")  # tokenised as a whole, it would end in w12
    chat = pipe.conversation(documents=loaded)
    assert chat.ask("w3 ?", **GREEDY).stats.reused_tokens == len(loaded)
    prompt = loaded.prompt("w3 ?").token_ids
    assert held_ids(chat.cache)[: len(prompt)].tolist() == prompt
    chat.ask("w4 ?", **GREEDY)
    assert chat.turns[1].rewritten_tokens == 0


def test_documents_with_positions_between_them_fill_the_context_sooner():
    pipe = pipeline()
    loaded = pipe.load(DOCUMENT).join(pipe.load("w8 w9", start=200))
    chat = pipe.conversation(documents=loaded)
    needed = 202 + len(["w1", "?", "end", "assistant", ":"])
    with pytest.raises(InputError, match=rf"has {needed} tokens, the reply may take max_new_tokens={257 - needed}"):
        chat.ask("w1 ?", max_new_tokens=257 - needed)
    assert chat.ask("w1 ?", max_new_tokens=256 - needed, do_sample=False).stats.reused_tokens == len(loaded)


def test_the_time_to_the_first_token_begins_with_the_call(monkeypatch):
    chat, encode = talked(0), conversation.encode_turn

    def slow(*arguments, **options):
        time.sleep(0.3)
        return encode(*arguments, **options)

    monkeypatch.setattr(conversation, "encode_turn", slow)
    assert chat.ask("w1 ?", **GREEDY).stats.ttft_seconds > 0.3
    assert chat.turns[0].stats.ttft_seconds > 0.3


# -- what a template changes -------------------------------------------------------------------------


def test_a_template_that_rewrites_earlier_replies_costs_what_stands_behind():
    chat = pipeline(FORGETFUL).conversation(documents=DOCUMENT)
    first = chat.ask("w1 ?", **GREEDY)
    held = chat.cache.columns
    second = chat.ask("w2 ?", **GREEDY)
    assert second.stats.reused_tokens == first.stats.prompt_tokens
    assert chat.turns[1].rewritten_tokens == held - first.stats.prompt_tokens == 3
    assert (
        held_ids(chat.cache)[: second.stats.prompt_tokens].tolist()
        == tokenizer()(f"user : {DOCUMENT} w1 ? end assistant : end user : w2 ? end assistant :").input_ids
    )


def test_a_reply_that_is_not_written_as_it_was_generated_counts_as_rewritten():
    chat = pipeline(**DENSE).conversation()
    special = [tokenizer().unk_token_id]  # left out of the text
    chat.ask("w1 ?", prefix_allowed_tokens_fn=lambda *_: special, **GREEDY)
    assert chat.messages[-1]["content"] == ""
    reply = chat.ask("w2 ?", **GREEDY)
    assert chat.turns[1].rewritten_tokens == 3
    fresh = pipeline(**DENSE).generate(chat.messages[:-1], **GREEDY)
    assert reply.token_ids == fresh.token_ids


def test_a_template_that_raises_leaves_the_conversation_as_it_was():
    chat = pipeline(REFUSES).conversation()
    chat.ask("w1 ?", **GREEDY)
    before, cache = chat.messages, chat.cache
    for ask in (chat.ask, chat.stream):
        with pytest.raises(InputError, match="only short chats"):
            ask("w2 ?", **GREEDY)
    assert chat.messages == before
    assert chat.cache is cache


# -- what is protected and what asks -----------------------------------------------------------------


@pytest.mark.parametrize("template", [TOOLS_FIRST, TOOLS_LAST], ids=["first", "last"])
def test_system_message_and_tools_are_never_pruned(template: str):
    trace = TokenTrace()
    pipe = pipeline(template, scorer=Random(3), schedule=Stages({1: 0.2}), cache=AuxCache())
    assert not pipe.config.protect.system
    chat = pipe.conversation(documents=DOCUMENT, system="w60 w61", tools=TOOLS)
    for text in ("w1 ?", "w2 ?"):
        trace.steps.clear()
        chat.ask(text, callbacks=[trace], **GREEDY)
        words = tokenizer().convert_ids_to_tokens(held_ids(chat.cache).tolist())
        visible = {words[token] for token in trace.steps[0][1].rows[0].visible.tolist()}
        assert {"tools", "w50", "w51", "w60", "w61"} <= visible
        assert len(visible & set(DOCUMENT.split())) < len(set(DOCUMENT.split())), "the document is pruned"


def test_tools_may_be_functions_and_their_results_messages():
    def w50(w1: int) -> int:
        """Says w50.

        Args:
            w1: a number.
        """
        return w1

    named = TOOLS_FIRST.replace("tool.name", "tool.function.name")
    chat = pipeline(named).conversation(tools=[w50])
    assert chat.opening.tools[0]["function"]["name"] == "w50"
    chat.ask("w1 ?", **GREEDY)
    chat.ask({"role": "tool", "content": "w7"}, **GREEDY)
    assert [message["role"] for message in chat.messages] == ["user", "assistant", "tool", "assistant"]
    with pytest.raises(InputError, match="cannot be described"):
        pipeline(named).conversation(tools=[lambda undescribed: undescribed])
    with pytest.raises(InputError, match="begins with a user's message, not with one of role 'tool'"):
        pipeline(named).conversation().ask({"role": "tool", "content": "w7"}, **GREEDY)


@pytest.mark.parametrize("text", ["w1 w2 ?", "assistant", ":", "w60", DOCUMENT.split()[0]])
def test_the_query_is_the_new_text_wherever_else_it_stands(text: str):
    pipe = pipeline(TOOLS_FIRST)
    seen = []

    class Look(Callback):
        def on_prefill_start(self, event):
            seen.append(1)

    chat = pipe.conversation(documents=DOCUMENT, system="w60 w61", tools=TOOLS)
    for _ in range(2):
        chat.ask(text, callbacks=[Look()], **GREEDY)
        marks, stats = chat.cache.rows[0].marks, chat.turns[-1].stats
        behind = len(tokenizer()("end assistant :").input_ids)
        end = stats.prompt_tokens - behind
        assert marks.query == ((end - len(text.split()), end),)
        assert marks.asked == ("?" in text)


def test_questions_are_looked_for_in_a_long_text_and_not_in_documents():
    text = f"{' '.join(WORDS[:60] * 3)}\n\nw1 w2 ?"
    chat = pipeline().conversation(documents="w3 w4 ?\n\nw5 w6")
    chat.ask(text, max_new_tokens=1, do_sample=False)
    end = chat.turns[0].stats.prompt_tokens - 3
    assert chat.cache.rows[0].marks.query == ((end - 3, end),)


def test_a_query_may_be_named():
    chat = pipeline().conversation(documents=DOCUMENT)
    chat.ask("w1 w2 w3 ?", query="w2 w3", **GREEDY)
    end = chat.turns[0].stats.prompt_tokens - 4
    assert chat.cache.rows[0].marks.query == ((end - 2, end),)


# -- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "  \n", {"role": "user", "content": " "}], ids=repr)
def test_a_blank_question(text):
    with pytest.raises(InputError, match="empty"):
        talked(0).ask(text, **GREEDY)


@pytest.mark.parametrize(
    "message", [{"content": "w1"}, {"role": "user"}, {"role": "user", "content": ["w1"]}, 3], ids=repr
)
def test_a_message_of_no_known_kind(message):
    with pytest.raises(InputError, match="has a role and a content"):
        talked(0).ask(message, **GREEDY)


def test_a_tokenizer_without_template():
    for pipe in (pipeline(None), LazyPipeline(tiny_model(), **PRUNING)):
        with pytest.raises(InputError, match="needs a tokenizer with a chat template"):
            pipe.conversation()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"documents": [" "]}, "document 0 holds"),
        ({"documents": ["w1", 3]}, "document 1 is of type int"),
        ({"documents": None}, "document 0 is of type NoneType"),
        ({"system": ""}, "the system message holds"),
        ({"overflow": "wrap"}, "'error' or 'slide', not 'wrap'"),
    ],
    ids=str,
)
def test_a_beginning_that_cannot_be(options: dict, message: str):
    with pytest.raises(InputError, match=message):
        pipeline().conversation(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[({name: None}, f"leave out {name}") for name in CACHE_NAMES],
        ({"prefixes": None}, "leave out prefixes"),
        ({"num_beams": 3}, "these options make 3"),
        ({"num_return_sequences": 2, "do_sample": True}, "these options make 2"),
        ({"query": "w88 w89"}, "does not occur"),
        ({"query": 0}, "cannot be used"),
    ],
    ids=str,
)
def test_options_that_cannot_be(options: dict, message: str):
    chat = talked(1)
    cache = chat.cache
    with pytest.raises(InputError, match=message):
        chat.ask("w1 ?", **{**GREEDY, **options})
    assert chat.cache is cache
    chat.ask("w1 ?", **GREEDY)


# -- a full context ----------------------------------------------------------------------------------


def test_a_full_context_is_refused_before_anything_runs():
    chat = pipeline().conversation(documents=DOCUMENT)
    chat.ask("w1 ?", **GREEDY)
    cache, needed = chat.cache, chat.turns[0].stats.prompt_tokens + 4 + 4 + 2 + 2
    with pytest.raises(
        InputError, match=rf"has {needed} tokens.*max_new_tokens={257 - needed}.*positions for 256; .*slide"
    ):
        chat.ask("w2 ?", max_new_tokens=257 - needed, do_sample=False)
    assert chat.cache is cache
    chat.ask("w2 ?", max_new_tokens=256 - needed, do_sample=False)


def test_the_oldest_turns_leave_a_context_that_slides():
    pipe = pipeline()
    chat = pipe.conversation(documents=DOCUMENT, system="w60 w61", overflow="slide")
    texts = [" ".join(WORDS[number : number + 30]) + " ?" for number in range(8)]
    for text in texts:
        chat.ask(text, **GREEDY)
    forgotten = [turn.forgotten_turns for turn in chat.turns]
    assert forgotten[0] == 0 < forgotten[-1]
    assert forgotten == sorted(forgotten)
    assert len(chat.turns) == 8
    assert chat.messages[0] == {"role": "system", "content": "w60 w61"}
    assert chat.messages[1]["content"] == f"{DOCUMENT}\n\n{texts[forgotten[-1]]}"
    for before, turn in zip(chat.turns, chat.turns[1:], strict=False):
        if turn.forgotten_turns > before.forgotten_turns:
            assert turn.rewritten_tokens > 0
            assert turn.stats.reused_tokens >= 44, "system message and document stay"
    assert all(turn.stats.prompt_tokens + 4 <= 256 for turn in chat.turns)
    chat.undo()
    assert chat.messages[1]["content"] == f"{DOCUMENT}\n\n{texts[forgotten[-2]]}"


def test_a_question_that_is_too_long_by_itself_does_not_slide():
    chat = pipeline().conversation(documents=DOCUMENT, overflow="slide")
    chat.ask("w1 ?", **GREEDY)
    with pytest.raises(InputError, match=r"with this question alone the conversation has 2\d\d tokens"):
        chat.ask(" ".join(WORDS * 3)[:800], max_new_tokens=60)
    assert len(chat.messages) == 2


# -- undo and fork -----------------------------------------------------------------------------------


def test_undo_takes_back_the_last_turn_and_keeps_the_document():
    chat = talked(2)
    expected = talked(1)
    removed = chat.undo()
    assert removed[0] == {"role": "user", "content": "w1 w2 ?"}
    assert chat.messages == expected.messages
    held = held_ids(chat.cache).tolist()
    assert held[: expected.cache.columns] == held_ids(expected.cache).tolist()
    assert len(held) == expected.cache.columns + len(["w0", "end", "user", ":"])
    chat.undo()
    assert chat.cache.columns == len(["user", ":"]) + 40
    assert chat.messages == []
    with pytest.raises(InputError, match="no turn to take back"):
        chat.undo()
    assert chat.ask("w9 ?", **GREEDY).stats.reused_tokens == 42


def test_undone_turns_do_not_count_as_rewritten():
    chat = talked(2)
    chat.undo()
    chat.ask("w5 w6 ?", **GREEDY)
    assert chat.turns[-1].rewritten_tokens == 0


def test_forks_go_on_by_themselves():
    chat = talked(1)
    twin = chat.fork()
    same(chat, twin)
    first = chat.ask("w1 w2 ?", **GREEDY)
    second = twin.ask("w1 w2 ?", **GREEDY)
    assert first.token_ids == second.token_ids
    assert first.stats.tokens_per_layer == second.stats.tokens_per_layer
    twin.undo()
    twin.undo()
    assert len(chat.turns) == 2


# -- all or nothing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [AuxCache(), DropCache(), EvictingCache(scorer=WindowAttention(window=2), budget=9)])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("hook", ["on_prefill_start", "on_layer_end", "on_step_end", "on_generate_end"])
@pytest.mark.parametrize("ask", ["ask", "stream"])
def test_an_exception_in_any_phase_leaves_the_conversation_as_it_was(cache, error, hook, ask):
    class Interrupt(Callback):
        pass

    def fail(self, event):
        if getattr(event, "layer", 1) == 1:
            raise error

    setattr(Interrupt, hook, fail)
    chat = pipeline(**{**PRUNING, "cache": cache}).conversation(documents=DOCUMENT)
    chat.ask("w1 ?", **GREEDY)
    twin, held = chat.fork(), chat.cache
    with pytest.raises(error):
        list(getattr(chat, ask)("w2 w3 ?", callbacks=[Interrupt()], **GREEDY))
    assert chat.cache is held
    same(chat, twin)
    assert chat.ask("w2 w3 ?", **GREEDY).token_ids == twin.ask("w2 w3 ?", **GREEDY).token_ids


def test_an_exception_in_decode_leaves_the_conversation_as_it_was():
    class Interrupt(Callback):
        steps = 0

        def on_step_end(self, event):
            self.steps += 1
            if self.steps == 3:
                raise KeyboardInterrupt

    chat = talked(1)
    twin = chat.fork()
    with pytest.raises(KeyboardInterrupt):
        chat.ask("w2 ?", callbacks=[Interrupt()], **GREEDY)
    same(chat, twin)


# -- streams -----------------------------------------------------------------------------------------


def test_a_stream_yields_what_ask_returns():
    chat, twin = talked(1), talked(1)
    stream = chat.stream("w2 ?", **GREEDY)
    pieces = list(stream)
    reply = twin.ask("w2 ?", **GREEDY)
    assert "".join(pieces).strip() == reply.text == stream.result.text
    assert chat.messages == twin.messages
    assert held_ids(chat.cache).tolist() == held_ids(twin.cache).tolist()


class Wait(Callback):
    """Waits at a layer of a phase until it may go on."""

    def __init__(self, *, prefill: bool) -> None:
        self.prefill = prefill
        self.inside, self.go_on = threading.Event(), threading.Event()

    def on_layer_end(self, event):
        if event.is_prefill == self.prefill:
            self.inside.set()
            assert self.go_on.wait(30)


def close(stream, wait: Wait) -> None:
    """Closes a stream while its generation stands where `wait` has it."""
    assert wait.inside.wait(30)
    stream._stop.pulled = True
    wait.go_on.set()
    stream.close()


def test_a_stream_that_is_closed_early_keeps_the_reply_so_far():
    chat, wait = talked(1), Wait(prefill=False)
    stream = chat.stream("w2 ?", callbacks=[wait], **{**GREEDY, "max_new_tokens": 50})
    close(stream, wait)
    assert 1 <= len(stream.result.token_ids) < 50
    assert chat.messages[-1] == {"role": "assistant", "content": stream.result.text}
    assert chat.turns[-1].stats.new_tokens == len(stream.result.token_ids)
    chat.ask("w3 ?", **GREEDY)
    assert chat.turns[-1].rewritten_tokens == 0
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 3


def test_leaving_the_loop_closes_the_stream():
    chat = talked(1)
    for _ in chat.stream("w2 ?", **{**GREEDY, "max_new_tokens": 100}):
        break
    assert 1 <= chat.turns[-1].stats.new_tokens <= 100
    chat.ask("w3 ?", **GREEDY)


def test_a_stream_that_is_closed_before_there_is_a_token_was_no_turn():
    chat, wait = talked(1), Wait(prefill=True)
    twin = chat.fork()
    stream = chat.stream("w2 ?", callbacks=[wait], **GREEDY)
    close(stream, wait)
    with pytest.raises(InputError, match="before the reply had a token"):
        stream.result  # noqa: B018
    same(chat, twin)
    chat.ask("w2 ?", **GREEDY)


def test_a_conversation_takes_one_turn_at_a_time():
    chat, wait = talked(1), Wait(prefill=True)
    stream = chat.stream("w2 ?", callbacks=[wait], **GREEDY)
    assert wait.inside.wait(30)
    for act in (lambda: chat.ask("w3 ?", **GREEDY), lambda: chat.stream("w3 ?", **GREEDY), chat.undo):
        with pytest.raises(CacheError, match="middle of a turn"):
            act()
    assert len(chat.fork().turns) == 1, "a fork goes on from the last whole turn"
    wait.go_on.set()
    assert stream.result.token_ids
    assert len(chat.turns) == 2


# -- threads -----------------------------------------------------------------------------------------


def test_conversations_of_two_threads_take_turns():
    pipe = pipeline()
    texts = [f"w{number} ?" for number in range(4)]

    def run(name: str) -> list[list[int]]:
        chat = pipe.conversation(documents=f"{DOCUMENT} {name}")
        return [chat.ask(text, **GREEDY).token_ids for text in texts]

    expected = {name: run(name) for name in ("w70", "w71")}
    got: dict[str, list[list[int]]] = {}
    threads = [threading.Thread(target=lambda name=name: got.update({name: run(name)})) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got == expected


def test_a_pipeline_is_made_while_another_thread_runs_the_model():
    chat, wait = talked(0), Wait(prefill=True)
    stream = chat.stream("w2 ?", callbacks=[wait], **GREEDY)
    assert wait.inside.wait(30)
    made: list[LazyPipeline] = []
    thread = threading.Thread(target=lambda: made.append(pipeline()))
    thread.start()
    assert not made
    wait.go_on.set()
    thread.join(60)
    assert made
    assert stream.result.token_ids


def test_a_thread_that_has_the_model_attached_is_not_left_to_wait_for_itself():
    pipe = pipeline()
    chat = pipe.conversation()
    with pipe.attached():
        for act in (chat.ask, chat.stream, pipe.generate, pipe.stream):
            with pytest.raises(AttachError, match="already"):
                act("w1 ?", **GREEDY)
    chat.ask("w1 ?", **GREEDY)


# -- files -------------------------------------------------------------------------------------------


def test_a_loaded_conversation_goes_on_as_the_saved_one(tmp_path):
    chat = talked(2, system="w60", tools=TOOLS, overflow="slide")
    path = chat.save(tmp_path / "chat")
    loaded = pipeline().load_conversation(path)
    same(chat, loaded)
    assert (loaded.opening, loaded.overflow) == (chat.opening, chat.overflow)
    one, other = chat.ask("w5 ?", **GREEDY), loaded.ask("w5 ?", **GREEDY)
    assert one.token_ids == other.token_ids
    assert one.stats.tokens_per_layer == other.stats.tokens_per_layer


def test_a_conversation_without_a_turn_is_saved_for_its_model(tmp_path):
    path = talked(0).save(tmp_path / "chat")
    assert pipeline().load_conversation(path).turns == ()
    other = LazyPipeline(tiny_model("qwen2"), tokenizer(), **PRUNING)
    with pytest.raises(CacheError, match="fingerprint"):
        other.load_conversation(path)


def test_a_file_of_a_conversation_is_one_of_its_cache_too(tmp_path):
    chat = talked(1)
    cache = pipeline().load_cache(chat.save(tmp_path / "chat"))
    assert cache.columns == chat.cache.columns
    with pytest.raises(CacheError, match="holds no conversation: it holds a cache alone"):
        pipeline().load_conversation(cache.save(tmp_path / "cache"))
    with pytest.raises(CacheError, match="holds no conversation"):
        pipeline().load_conversation(cache.save(tmp_path / "cache", note='{"kind": "something else"}'))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """The bytes of a saved conversation, and a place for changed ones."""
    folder = tmp_path_factory.mktemp("damaged")
    return talked(1).save(folder / "whole").read_bytes(), folder / "changed"


@given(st.data())
def test_a_file_that_is_cut_or_changed_is_refused(damaged, data):
    content, path = damaged
    place = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[place] ^= data.draw(st.integers(1, 255))
    for wrong in (content[:place], bytes(changed)):
        path.write_bytes(wrong)
        if wrong.split() != content.split():  # one space for another changes nothing
            with pytest.raises(CacheError):
                pipeline().load_conversation(path)


def test_an_edited_text_is_refused(tmp_path):
    path = talked(1).save(tmp_path / "chat")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name).clone() for name in file.offset_keys()}
    document = json.loads(metadata[CACHE_DOCUMENT])
    document["note"] = document["note"].replace("w0 w1 ?", "w0 w2 ?")
    save_file(tensors, path, {**metadata, CACHE_DOCUMENT: json.dumps(document)})
    with pytest.raises(CacheError, match="was changed after it was saved"):
        pipeline().load_conversation(path)


def test_a_full_disk_leaves_the_old_file(tmp_path):
    chat = talked(1)
    before = chat.save(tmp_path / "chat").read_bytes()
    chat.ask("w5 ?", **GREEDY)
    with files_of_at_most(4096), pytest.raises(CacheError, match="cannot be saved as"):
        chat.save(tmp_path / "chat")
    assert (tmp_path / "chat").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["chat"]


def test_a_failing_write_says_why(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lazyllm.caches.saved.save_file", fail)
    with pytest.raises(CacheError, match="No space left on device"):
        talked(1).save(tmp_path / "chat")
