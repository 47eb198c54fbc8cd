"""Documents that wait for questions: what they cost, that the laws hold, and what is refused."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lazyllm import (
    AccumulatedAttention,
    AttentionMass,
    AuxCache,
    BudgetCache,
    CacheError,
    ConfigError,
    Constant,
    DenseCache,
    DropCache,
    EvictingCache,
    Funnel,
    InputError,
    LastTokenAttention,
    LateInteraction,
    LazyPipeline,
    OffloadedAux,
    QuantizedAux,
    QuantizedKV,
    Stages,
    TokenTrace,
    WindowAttention,
)
from lazyllm.caches.saved import DOCUMENT
from lazyllm.callbacks import Callback
from lazyllm.models.names import CACHE_NAMES
from tests.histories import Moving
from tests.replay import replay
from tests.test_saved import same_cache
from tests.tiny import EAGER_ONLY, FAMILIES, LAYERS, tiny_model, word_tokenizer

WORDS = [f"w{number}" for number in range(70)]
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
LOGITS = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
SINGLE = {"rtol": 1e-6, "atol": 1e-5}
"""transformers gives logits out in float32."""
MOVING = {"scorer": Moving(), "schedule": Stages({2: 0.6, 3: 0.3}), "cache": AuxCache()}


def words(start: int, count: int) -> str:
    return " ".join(WORDS[(start + 7 * index) % len(WORDS)] for index in range(count))


TEXT, OTHER = words(0, 40), words(3, 30)
QUESTION, SECOND = "w1 w9 w33 w2", "w60 w61 w8"


def new_pipe(family="llama", *, template=True, model=None, **policies) -> LazyPipeline:
    tokenizer = word_tokenizer(WORDS)
    if not template:
        tokenizer.chat_template = None
    kernel = "eager" if family in EAGER_ONLY else "sdpa"
    return LazyPipeline(
        model or tiny_model(family, kernel), tokenizer, **{**MOVING, **policies}, callbacks=[TokenTrace()]
    )


def work_of(pipe: LazyPipeline, tokens: int) -> Counter:
    """How often each layer has computed each of the first tokens."""
    return Counter(
        (event.layer, token)
        for step in pipe.callbacks[0].steps
        for event in step
        for token in event.rows[0].computed.tolist()
        if token < tokens
    )


# -- loading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "depth", "expected"),
    [
        (Stages({2: 0.6, 3: 0.3}), None, 2),
        (Constant(0.5, start=1), None, 1),
        (Funnel([AttentionMass(start=0), AttentionMass(start=1)]), None, 1),
        (Constant(1.0), None, LAYERS),
        (Stages({2: 0.6}), 0, 0),
        (Stages({2: 0.6}), LAYERS, LAYERS),
    ],
)
def test_a_document_is_loaded_as_deep_as_every_question_needs_it(schedule, depth, expected):
    pipe = new_pipe(scorer=LateInteraction(), schedule=schedule)
    document = pipe.load(TEXT, depth=depth)
    row = document.cache.rows[0]
    assert document.loaded.depth == expected
    assert document.loaded.computed_fraction == document.computed_fraction == expected / LAYERS
    assert row.ledger.depth.tolist() == [expected] * len(document)
    assert [len(store) for store in row.stores] == [len(document)] * expected + [0] * (LAYERS - expected)
    assert len(row.frontier) == (len(document) if expected < LAYERS else 0)
    assert document.loaded.tokens == len(document) == 2 + 40  # "user :" stands before it
    assert document.loaded.bytes_per_token * len(document) == document.cache.kv_bytes + document.cache.aux_bytes


def test_several_texts_stand_behind_each_other():
    pipe = new_pipe()
    document = pipe.load([TEXT, f"\n {OTHER} \n"], system="w5 w6", layout="w7 {documents} w8 {question} w9")
    assert document.text == f"system : w5 w6 user : w7 {TEXT}\n\n{OTHER}"
    assert document.prompt(QUESTION).text == f"{document.text} w8 {QUESTION} w9 assistant :"


# -- asking ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("depth", [0, 1, 2, LAYERS])
def test_questions_replay(family, depth):
    """Law 5: one dense forward with exactly the masks of loading and asking gives the same logits, twice over."""
    pipe = new_pipe(family)
    document = pipe.load(TEXT, depth=depth)
    loading = list(pipe.callbacks[0].steps)
    for question in (QUESTION, SECOND):
        result = document.ask(question, **LOGITS)
        asked = document.prompt(question).token_ids
        ids = torch.tensor([*asked, *result.token_ids[:-1]])
        expected, _ = replay(pipe.model, ids, pipe.callbacks[0].steps, 0)
        got = torch.stack([logits[0] for logits in result.output.logits])
        torch.testing.assert_close(got.double(), expected[len(asked) - 1 :], **SINGLE)
        pipe.callbacks[0].steps = loading + without_questions(pipe.callbacks[0].steps[len(loading) :], len(document))
        loading = list(pipe.callbacks[0].steps)


def without_questions(steps, tokens):
    """The steps of a question as they concern the document, whose other tokens were taken back."""
    return [[kept(event, tokens) for event in step] for step in steps]


def kept(event, tokens):
    row = event.rows[0]
    own = {name: seen[seen < tokens] for name in ("visible", "computed", "attended") for seen in [getattr(row, name)]}
    return replace(event, rows=(replace(row, **own, first_new=tokens),))


@pytest.mark.parametrize(
    "policies",
    [
        {"scorer": LateInteraction(pool=3), "schedule": AttentionMass(share=0.4, start=1)},
        {"scorer": LateInteraction(pool=3), "schedule": Stages({1: 0.5, 3: 0.3})},
        {"scorer": LastTokenAttention(), "schedule": Stages({2: 0.6, 3: 0.3})},
        {"scorer": WindowAttention(window=4), "schedule": Stages({2: 0.5})},
        {"scorer": AccumulatedAttention(), "schedule": Stages({2: 0.5})},
        {"cache": AuxCache(attend="cached")},
        {"cache": OffloadedAux(where="disk")},
    ],
    ids=str,
)
def test_the_answer_is_that_of_a_prompt_whose_question_was_known(policies):
    pipe = new_pipe(**policies)
    document = pipe.load(TEXT)
    later = document.ask(QUESTION, **LOGITS)
    known = pipe.generate(document.prompt(QUESTION), **LOGITS)
    assert later.token_ids == known.token_ids
    for got, expected in zip(later.output.logits, known.output.logits, strict=True):
        torch.testing.assert_close(got, expected, **SINGLE)


@pytest.mark.parametrize("depth", [0, 1, LAYERS])
def test_keep_ratio_one_answers_as_the_unmodified_model(depth):
    pipe = new_pipe(schedule=Constant(1.0))
    document = pipe.load(TEXT, depth=depth)
    for question in (QUESTION, SECOND):
        ids = torch.tensor([document.prompt(question).token_ids])
        stock = pipe.model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
        assert document.ask(question, **GREEDY).token_ids == stock[0, ids.shape[1] :].tolist()


def test_no_token_is_computed_twice_and_later_questions_compute_less():
    pipe = new_pipe()
    document = pipe.load(TEXT)
    shares = [document.computed_fraction]
    for question in (QUESTION, SECOND, QUESTION):
        document.ask(question, **GREEDY)
        shares.append(document.computed_fraction)
    assert shares == sorted(shares)
    assert shares[0] < shares[1] < 1
    assert document.cache.columns == len(document)
    assert set(work_of(pipe, len(document)).values()) == {1}
    first, again = (document.fork().ask(QUESTION, **GREEDY).stats for _ in range(2))
    fresh = pipe.load(TEXT).ask(QUESTION, **GREEDY).stats
    assert first.flops == again.flops < fresh.flops


def test_a_fork_goes_its_own_way():
    pipe = new_pipe()
    document = pipe.load(TEXT)
    twin = document.fork()
    twin.ask(QUESTION, **GREEDY)
    assert document.computed_fraction < twin.computed_fraction
    expected = pipe.load(TEXT).ask(SECOND, **LOGITS)
    assert torch.equal(torch.stack(document.ask(SECOND, **LOGITS).output.logits), torch.stack(expected.output.logits))


@given(depth=st.integers(0, LAYERS), steps=st.integers(0, 9))
def test_a_question_that_fails_leaves_the_document(depth, steps):
    class Failing(Callback):
        left = steps

        def on_layer_end(self, event):
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("no more")

    pipe = new_pipe()
    document = pipe.load(TEXT, depth=depth)
    failing = LazyPipeline.from_config(pipe.config, pipe.model, pipe.tokenizer, callbacks=[Failing()])
    asked = document.fork()
    asked.pipe = failing
    with pytest.raises(RuntimeError, match="no more"):
        asked.ask(QUESTION, **GREEDY)
    assert asked.cache.columns == len(document)
    if steps < LAYERS:  # the first step failed, so nothing of it stays
        got, expected = (one.cache.rows[0].state() for one in (asked, document))
        assert got.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in got.items())
    asked.pipe = pipe
    asked.ask(QUESTION, **GREEDY)


def test_one_question_at_a_time():
    """A second one is refused before it touches what the first one is using."""
    document = new_pipe().load(TEXT)

    class Asking(Callback):
        def on_layer_end(self, event):
            with pytest.raises(CacheError, match="another question"):
                document.ask(SECOND, **GREEDY)

    expected = document.fork().ask(QUESTION, **GREEDY)
    assert document.ask(QUESTION, callbacks=[Asking()], **GREEDY).token_ids == expected.token_ids
    assert document.ask(SECOND, **GREEDY).token_ids


def test_a_cache_that_evicts_is_as_it_was_after_a_question():
    pipe = new_pipe(cache=EvictingCache(scorer=WindowAttention(window=4), budget=10))
    document = pipe.load(TEXT, depth=LAYERS)
    before = {name: tensor.clone() for name, tensor in document.cache.rows[0].state().items()}
    replies = [document.ask(QUESTION, **GREEDY).token_ids for _ in range(2)]
    assert replies[0] == replies[1]
    after = document.cache.rows[0].state()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_the_system_message_is_protected_where_the_pipeline_protects_it():
    pipe = new_pipe(protect={"system": True})
    document = pipe.load(TEXT, system="w5 w6")
    assert document.prompt(QUESTION).marks.protected == ((2, 4),)


def test_a_question_is_the_query_unless_another_is_named():
    pipe = new_pipe(scorer=LateInteraction(), schedule=Constant(0.5, start=1))
    document = pipe.load(TEXT)
    marks = document.prompt(QUESTION).marks
    assert marks.query == ((len(document), len(document) + 4),)
    assert marks.asked
    assert document.prompt(QUESTION, query="w33 w2").marks.query == ((len(document) + 2, len(document) + 4),)
    assert new_pipe().load(TEXT).prompt(QUESTION).marks.query == ()  # a scorer that asks for no query


def test_a_question_is_streamed():
    pipe = new_pipe()
    document = pipe.load(TEXT)
    stream = document.stream(QUESTION, **GREEDY)
    assert "".join(stream).split() == pipe.tokenizer.decode(stream.result.token_ids, skip_special_tokens=True).split()
    assert stream.result.token_ids == pipe.load(TEXT).ask(QUESTION, **GREEDY).token_ids
    assert document.cache.columns == len(document)


def test_several_replies_to_one_question_leave_one_row():
    document = new_pipe().load(TEXT)
    replies = document.ask(QUESTION, **GREEDY, num_beams=3, num_return_sequences=2)
    assert len(replies) == 2
    assert len(document.cache.rows) == 1
    assert document.cache.columns == len(document)
    assert document.ask(SECOND, **GREEDY).token_ids


# -- without a template --------------------------------------------------------------------------------


def test_without_a_chat_template_the_layout_is_the_prompt():
    pipe = new_pipe(template=False)
    document = pipe.load(TEXT, layout="w1 {documents} w2 {question} w3")
    assert document.prompt(QUESTION).text == f"w1 {TEXT} w2 {QUESTION} w3"
    assert document.ask(QUESTION, **GREEDY).token_ids
    with pytest.raises(InputError, match="chat template"):
        pipe.load(TEXT, system="w1")


# -- several documents -------------------------------------------------------------------------------


def test_joined_documents_replay_and_keep_their_positions():
    pipe = new_pipe()
    first = pipe.load(TEXT)
    second = pipe.load(OTHER, start=first.end + 5)
    steps = pipe.callbacks[0].steps
    joined = first.join(second)
    shift = len(first)
    steps[1] = [
        replace(
            event,
            rows=tuple(
                replace(row, computed=row.computed + shift, attended=row.attended + shift, visible=row.visible + shift)
                for row in event.rows
            ),
        )
        for event in steps[1]
    ]
    result = joined.ask(QUESTION, **LOGITS)
    asked = joined.prompt(QUESTION).token_ids
    positions = torch.arange(len(asked) + 3)
    positions[shift:] += 5
    ids = torch.tensor([*asked, *result.token_ids[:-1]])
    expected, _ = replay(pipe.model, ids, steps, 0, positions)
    got = torch.stack([logits[0] for logits in result.output.logits])
    torch.testing.assert_close(got.double(), expected[len(asked) - 1 :], **SINGLE)
    assert joined.text == f"user : {TEXT}\n\n{OTHER}"
    assert first.cache.columns == shift
    assert joined.cache.columns == len(joined) == shift + len(second)


@pytest.mark.parametrize(
    "cache", [AuxCache(), QuantizedAux(), QuantizedKV(), OffloadedAux(), BudgetCache(tokens=20, layer=2)], ids=str
)
def test_documents_that_nothing_has_computed_join_wherever_they_were(cache):
    pipe = new_pipe(cache=cache)
    joined = pipe.load(TEXT, depth=0).join(pipe.load(OTHER, start=100, depth=0), pipe.load(TEXT, start=1, depth=0))
    whole = pipe.load([TEXT, OTHER, TEXT], depth=0)
    same_cache(joined.cache, whole.cache)
    assert joined.ask(QUESTION, **GREEDY).token_ids == whole.ask(QUESTION, **GREEDY).token_ids


def test_what_cannot_be_joined_is_refused():
    pipe = new_pipe()
    first = pipe.load(TEXT)
    with pytest.raises(
        InputError, match=f"positions 1 to 30 cannot stand behind one that ends at 41.*start={first.end}"
    ):
        first.join(pipe.load(OTHER, start=1))
    with pytest.raises(InputError, match="positions 0 to 41"):
        first.join(pipe.load(TEXT, depth=0))
    with pytest.raises(InputError, match="frame"):
        first.join(pipe.load(OTHER, start=60, system="w1"))
    other = new_pipe(cache=AuxCache(attend="cached"))
    with pytest.raises(CacheError, match="same policy"):
        first.join(other.load(OTHER, start=60))
    strange = new_pipe("qwen2")
    with pytest.raises(CacheError, match="one model"):
        first.join(strange.load(OTHER, start=60))
    with pytest.raises(InputError, match="begins at position 60"):
        pipe.load(OTHER, start=60).ask(QUESTION)


# -- files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("cache", [AuxCache(), QuantizedAux(), QuantizedKV(), OffloadedAux(where="disk")], ids=str)
def test_an_opened_document_answers_as_the_saved_one(mapped, cache, tmp_path):
    pipe = new_pipe(cache=cache)
    document = pipe.load([TEXT, OTHER], system="w5 w6")
    document.ask(SECOND, **GREEDY)
    path = document.save(tmp_path / "a document")
    content = path.read_bytes()
    opened = pipe.open(path, mapped=mapped)
    same_cache(opened.cache, document.cache)
    assert (opened.text, opened.frame, opened.loaded) == (document.text, document.frame, None)
    for question in (QUESTION, SECOND):
        got, expected = (one.ask(question, **LOGITS) for one in (opened, document))
        assert torch.equal(torch.stack(got.output.logits), torch.stack(expected.output.logits))
    assert path.read_bytes() == content  # what is mapped is never written to
    path.unlink()
    assert opened.ask(QUESTION, **GREEDY).token_ids


def test_a_joined_document_is_saved_with_its_pieces(tmp_path):
    pipe = new_pipe()
    first = pipe.load(TEXT)
    joined = first.join(pipe.load(OTHER, start=first.end))
    opened = pipe.open(joined.save(tmp_path / "both"))
    assert opened.text == joined.text
    later = pipe.open(pipe.load(OTHER, start=first.end).save(tmp_path / "part"))
    assert first.join(later).ask(QUESTION, **GREEDY).token_ids == opened.ask(QUESTION, **GREEDY).token_ids


def test_files_that_hold_no_such_document_are_refused(tmp_path):
    pipe = new_pipe()
    document = pipe.load(TEXT)
    path = document.save(tmp_path / "a document")
    with pytest.raises(CacheError, match="fingerprint"):
        new_pipe("qwen2").open(path)
    with pytest.raises(CacheError, match="cache policy"):
        new_pipe(cache=AuxCache(decode="reuse")).open(path)
    with pytest.raises(CacheError, match="no document"):
        pipe.open(document.cache.save(tmp_path / "a cache"))
    with pytest.raises(CacheError, match="there is no"):
        pipe.open(tmp_path / "nothing")
    other = LazyPipeline.from_config(pipe.config, pipe.model, word_tokenizer(WORDS[1:]))
    with pytest.raises(CacheError, match="another tokenizer"):
        other.open(path)
    data = path.read_bytes()
    for damaged in (data[:-40], data[:200], data.replace(b"w14", b"w15", 1), b""):
        path.write_bytes(damaged)
        with pytest.raises(CacheError):
            pipe.open(path)
    path.write_bytes(data)
    assert pipe.open(path).text == document.text


def test_a_note_is_part_of_what_is_checked(tmp_path):
    pipe = new_pipe()
    path = pipe.load(TEXT).save(tmp_path / "a document")
    _, note = pipe.load_noted_cache(path)
    assert json.loads(note)["frame"] == {"layout": "{documents}\n\n{question}", "system": None, "chat": True}
    assert DOCUMENT.encode() in path.read_bytes()


# -- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "got none"),
        ("  \n", {}, "document 0"),
        ([TEXT, ""], {}, "document 1"),
        ([TEXT, 3], {}, "of type int"),
        (TEXT, {"layout": "{documents}"}, "'{documents}'"),
        (TEXT, {"layout": "{question} {documents}"}, "behind it"),
        (TEXT, {"start": -1}, "not at -1"),
        (TEXT, {"start": 250}, "positions up to 289, the model has 256"),
        (words(0, 300), {}, "302 tokens"),
    ],
)
def test_bad_documents_are_refused(texts, options, message):
    with pytest.raises(InputError, match=message):
        new_pipe().load(texts, **options)


def test_a_cache_that_keeps_nothing_waiting_is_refused():
    with pytest.raises(ConfigError, match="DropCache"):
        new_pipe(cache=DropCache()).load(TEXT)
    with pytest.raises(ConfigError, match="depth 9 of 4"):
        new_pipe().load(TEXT, depth=9)
    assert new_pipe(cache=DropCache()).load(TEXT, depth=LAYERS).ask(QUESTION, **GREEDY).token_ids
    assert new_pipe(cache=DenseCache()).load(TEXT).loaded.depth == 2


def test_bad_questions_are_refused():
    document = new_pipe().load(TEXT)
    for question in ("", " \n"):
        with pytest.raises(InputError, match="the question"):
            document.ask(question)
    for name in CACHE_NAMES:
        with pytest.raises(InputError, match=f"its own cache; give {name} to"):
            document.ask(QUESTION, **{name: document.cache})
    with pytest.raises(InputError, match="positions for 256"):
        document.ask(words(0, 230))
    with pytest.raises(InputError, match="encoded prompt"):
        document.pipe.generate(document.prompt(QUESTION), query="w1")
    assert document.cache.columns == len(document)


def test_a_pipeline_without_a_tokenizer_cannot_load():
    with pytest.raises(InputError, match="needs a tokenizer"):
        LazyPipeline(tiny_model(), **MOVING).load(TEXT)


@pytest.mark.parametrize(
    "template", ["{{ messages[0].content | upper }}", "{{ messages[0].content[::-1] }}", "{{ raise_exception('no') }}"]
)
def test_a_template_that_changes_or_refuses_messages_is_an_error(template):
    pipe = new_pipe()
    pipe.tokenizer.chat_template = template
    with pytest.raises(InputError, match="chat template"):
        pipe.load(TEXT)
