"""Scorers that look back from the query: their formulas, the query itself, and the memory they read."""

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lazyllm import (
    AttentionMass,
    AuxCache,
    Blockwise,
    Callback,
    Combined,
    Constant,
    DropCache,
    Funnel,
    InputError,
    LastTokenAttention,
    LateInteraction,
    LazyPipeline,
    LexicalOverlap,
    PolicyError,
    Pooled,
    Protect,
    Random,
    ScoreContext,
    Scorer,
    SinkRecent,
    TokenTrace,
    TwoHop,
    prompts,
)
from lazyllm.caches.memory import StateMemory
from lazyllm.prompts import LONGEST_QUESTION, find_questions
from tests.histories import History, new_history
from tests.tiny import random_ids, tiny_model, word_tokenizer

GREEDY = {"do_sample": False, "eos_token_id": -1, "max_new_tokens": 4}
FUNNEL = Funnel((AttentionMass(share=0.6, ceiling=0.8), AttentionMass(share=0.5, ceiling=0.6, start=2)))


# -- formulas -------------------------------------------------------------------------------------------


@st.composite
def contexts(draw) -> ScoreContext:
    """Random states and ids of a context of which some tokens were pruned, and a query."""
    length = draw(st.integers(2, 24))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    query = torch.tensor(sorted(draw(st.sets(st.integers(0, length - 1), min_size=1, max_size=4))))
    visible = torch.tensor(sorted(draw(st.sets(st.integers(0, length - 1), min_size=1)) | set(query.tolist())))
    order = torch.randperm(length, generator=generator)
    states = torch.randn(length, 6, generator=generator, dtype=torch.float64)
    memory = StateMemory()
    memory.append(order, states[order])
    return ScoreContext(
        layer=0,
        tokens=visible,
        positions=visible,
        context_tokens=length,
        query=query,
        computed=torch.arange(length),
        states=states,
        attention=None,
        memory=memory,
        token_ids=torch.randint(0, 6, (length,), generator=generator),
    )


def near(index: int, width: int, length: int) -> range:
    return range(max(0, index - width // 2), min(length, index + width // 2 + 1))


def split(context: ScoreContext) -> tuple[list[int], list[int]]:
    """Query tokens, and the visible others."""
    query = context.query.tolist()
    return query, [token for token in context.tokens.tolist() if token not in query]


def spread_over(context: ScoreContext, scores: dict[int, float]) -> list[float]:
    return [scores.get(token, 0.0) for token in context.tokens.tolist()]


def deviation(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))


def naive_late_interaction(context: ScoreContext, pool: int, temperature: float) -> list[float]:
    query, text = split(context)
    rows = {token: context.states[token].tolist() for token in (*query, *text)}
    for dimension in range(len(rows[query[0]])):
        column = [rows[token][dimension] for token in text]
        mean, spread = sum(column) / len(column), deviation(column)
        for row in rows.values():
            row[dimension] = (row[dimension] - mean) / spread
    scores = dict.fromkeys(text, 0.0)
    for asking in query:
        cosines = []
        for token in text:
            dot = sum(left * right for left, right in zip(rows[asking], rows[token], strict=True))
            cosines.append(dot / math.hypot(*rows[asking]) / math.hypot(*rows[token]))
        mean, spread = sum(cosines) / len(cosines), deviation(cosines)
        powers = [math.exp((cosine - mean) / spread / temperature) for cosine in cosines]
        for index, token in enumerate(text):
            scores[token] += max(powers[other] for other in near(index, pool, len(text))) / sum(powers)
    return spread_over(context, scores)


def naive_lexical_overlap(context: ScoreContext, pool: int) -> list[float]:
    query, text = split(context)
    ids = [int(context.token_ids[token]) for token in text]
    asked = {int(context.token_ids[token]) for token in query}
    rarity = [math.log(len(ids) / ids.count(one)) if one in asked else 0.0 for one in ids]
    scores = {}
    for index, token in enumerate(text):
        window = [rarity[other] for other in near(index, pool, len(text))]
        scores[token] = sum(window) / len(window)
    return spread_over(context, scores)


def close(scores: torch.Tensor, expected: list[float], tolerance: float = 1e-10) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(scores.double(), wanted, rtol=tolerance, atol=tolerance)


POOLS = st.sampled_from([1, 3, 7])


@given(contexts(), POOLS, st.sampled_from([0.5, 1.0, 3.0]))
def test_late_interaction_is_its_formula(context: ScoreContext, pool: int, temperature: float):
    scorer = LateInteraction(pool=pool, temperature=temperature)
    scores = scorer.score(context)
    query, text = split(context)
    if len(text) > 2:
        close(scores, naive_late_interaction(context, pool, temperature))
    if text:
        assert scores.sum() >= len(query) - 1e-9
    assert torch.equal(scorer.score(context), scores)


@given(contexts(), POOLS)
def test_lexical_overlap_is_its_formula(context: ScoreContext, pool: int):
    scores = LexicalOverlap(pool=pool).score(context)
    close(scores, naive_lexical_overlap(context, pool), 1e-5)


@given(contexts(), st.integers(1, 5), st.sampled_from([0.0, 0.25, 2.0]))
def test_two_hop_asks_again_with_the_best_tokens_of_the_first_hop(context: ScoreContext, tokens: int, weight: float):
    def share(scores: list[float]) -> list[float]:
        return [score / sum(scores) for score in scores] if sum(scores) else scores

    query, visible = context.query.tolist(), context.tokens.tolist()
    inner = Remembering(pool=3)
    scores = TwoHop(inner, tokens, weight).score(context)
    first = share(inner.score(context).tolist())
    best = sorted(zip(first, visible, strict=True), reverse=True)[:tokens]
    found = sorted(token for _, token in best)
    second_hop = ScoreContext(**{**vars(context), "query": torch.tensor(found)})
    second = share(inner.score(second_hop).tolist())
    second = [max(second) if token in found else score for token, score in zip(visible, second, strict=True)]
    close(scores, [one + weight * other for one, other in zip(first, share(second), strict=True)])
    assert context.query.tolist() == query


class Remembering(LateInteraction):
    """A query scorer whose scores of query tokens are 0 too, but never all equal."""

    def score(self, context: ScoreContext) -> torch.Tensor:
        shift = (context.query.double().mean() * 7 + 3) % 5
        return ((context.tokens * 13 + 5) % 17).double() + shift * (context.tokens % 3)


@given(contexts(), POOLS, st.sampled_from(["max", "mean"]))
def test_pooled_joins_the_scores_of_neighbours(context: ScoreContext, width: int, by: str):
    scores = Random(3).score(context).tolist()
    windows = [[scores[other] for other in near(index, width, len(scores))] for index in range(len(scores))]
    expected = [max(window) if by == "max" else sum(window) / len(window) for window in windows]
    close(Pooled(Random(3), width, by).score(context), expected)


@given(contexts(), st.integers(1, 6), st.sampled_from(["max", "mean"]))
def test_blockwise_gives_a_token_the_score_of_its_block(context: ScoreContext, size: int, by: str):
    scores = dict(zip(context.tokens.tolist(), Random(3).score(context).tolist(), strict=True))
    expected = []
    for token in scores:
        block = [score for other, score in scores.items() if other // size == token // size]
        expected.append(max(block) if by == "max" else sum(block) / len(block))
    close(Blockwise(Random(3), size, by).score(context), expected)


@given(contexts())
def test_combined_is_a_weighted_sum_of_standardised_scores(context: ScoreContext):
    parts = {Random(3): 0.5, SinkRecent(): 2.0}
    expected = [0.0] * context.tokens.numel()
    for scorer, weight in parts.items():
        scores = scorer.score(context).tolist()
        for index, score in enumerate(scores):
            expected[index] += weight * (score - min(scores)) / (deviation(scores) or 1.0)
    combined = Combined(tuple(parts.items())).score(context)
    close(combined, expected)
    assert combined.min() >= 0


PURE = [
    LateInteraction(pool=3),
    LexicalOverlap(pool=3),
    TwoHop(LateInteraction(), tokens=2),
    Pooled(LateInteraction(), 3),
    Blockwise(LexicalOverlap(), 4, "mean"),
    Combined([(LateInteraction(), 1.0), (Random(), 0.5)]),
]


@given(contexts(), st.sampled_from(PURE))
def test_the_same_context_gives_the_same_scores_and_is_left_as_it_was(context: ScoreContext, scorer: Scorer):
    before = {name: value.clone() for name, value in vars(context).items() if isinstance(value, torch.Tensor)}
    remembered = context.states_of(torch.arange(context.context_tokens)).clone()
    scores = scorer.score(context).clone()
    assert torch.equal(scorer.score(context), scores)
    assert all(torch.equal(getattr(context, name), value) for name, value in before.items())
    assert torch.equal(context.states_of(torch.arange(context.context_tokens)), remembered)


def test_a_composed_scorer_needs_what_its_parts_need():
    plain = Pooled(Random())
    assert not plain.needs_attention
    assert not plain.needs_memory
    assert plain.reads_query is None
    both = Combined([(Pooled(LastTokenAttention()), 1.0), (Blockwise(TwoHop(LateInteraction(query=7))), 1.0)])
    assert both.needs_attention
    assert both.needs_memory
    assert both.reads_query == 7


def test_scores_of_equal_states_and_of_a_query_alone_are_finite():
    tokens = torch.arange(6)
    memory = StateMemory()
    memory.append(tokens, torch.ones(6, 4))
    for query in (tokens[-2:], tokens):
        context = ScoreContext(0, tokens, tokens, 6, query, tokens, torch.ones(6, 4), None, memory, torch.ones(6))
        for scorer in (LateInteraction(), LexicalOverlap(), TwoHop(LateInteraction(), tokens=2)):
            assert scorer.score(context).isfinite().all()


# -- batches, and what happens to the cache -------------------------------------------------------------


def prefill(history: History, ids: torch.Tensor) -> None:
    history.step(ids)


def continued(history: History, ids: torch.Tensor) -> torch.Tensor:
    """Logits [b, t, vocabulary] of decode steps."""
    return torch.cat([history.step(ids[:, [token]])[:, -1:] for token in range(ids.shape[1])], dim=1)


SCORER = LateInteraction(query=4, pool=3)
MEMORY_POLICIES = {"scorer": SCORER, "schedule": FUNNEL, "protect": Protect(sinks=1)}


def fresh(cache: AuxCache | None = None) -> History:
    return new_history(tiny_model(), cache=cache or AuxCache(), **MEMORY_POLICIES)


@pytest.mark.parametrize("cache", [AuxCache(), AuxCache(max_revived=2), AuxCache(max_revived=3, revive_every=2)])
def test_a_batch_row_equals_its_solo_run(cache: AuxCache):
    ids = random_ids(3, 40)
    prompts = [ids[0].tolist(), ids[1, :25].tolist(), ids[2, :9].tolist()]
    queries = [5, (3, 6), (0, 2)]
    pipe = LazyPipeline(tiny_model(), cache=cache, **MEMORY_POLICIES)
    together = pipe.generate(prompts, query=queries, **GREEDY)
    for prompt, query, result in zip(prompts, queries, together, strict=True):
        alone = pipe.generate(prompt, query=query, **GREEDY)
        assert result.token_ids == alone.token_ids
        for step, expected in zip(result.stats.tokens_per_layer, alone.stats.tokens_per_layer, strict=True):
            assert [(layer.visible, layer.computed) for layer in step] == [
                (layer.visible, layer.computed) for layer in expected
            ]


def test_crop_makes_the_memory_that_of_a_run_that_never_saw_the_rest():
    ids = random_ids(1, 40)
    cropped, plain = fresh(AuxCache(decode="reuse")), fresh(AuxCache(decode="reuse"))
    for history in (cropped, plain):
        prefill(history, ids[:, :24])
        continued(history, ids[:, 24:26])
    continued(cropped, random_ids(1, 3, seed=5))
    cropped.cache.crop(-3)
    cropped.mask, cropped.ids = plain.mask, [list(plain.ids[0])]
    for row, other in zip(cropped.cache.rows, plain.cache.rows, strict=True):
        assert row.memories.keys() == other.memories.keys() == {0, 1}
        for layer, memory in row.memories.items():
            assert torch.equal(memory._tokens.read(), other.memories[layer]._tokens.read())
            assert torch.equal(memory._states.read(), other.memories[layer]._states.read())
    got, expected = (history.step(ids[:, 26:]) for history in (cropped, plain))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12, equal_nan=True)


def test_beams_continue_like_runs_of_their_own():
    ids, order = random_ids(3, 26), torch.tensor([2, 0, 2])
    beams = fresh()
    prefill(beams, ids)
    continued(beams, random_ids(3, 2, seed=1))
    tails = random_ids(3, 2, seed=1)[order]
    beams.cache.reorder_cache(order)
    beams.mask, beams.ids = beams.mask[order], [list(beams.ids[row]) for row in order]
    tail = random_ids(3, 4, seed=2)
    got = continued(beams, tail)
    for row, source in enumerate(order.tolist()):
        own = fresh()
        prefill(own, ids[[source]])
        continued(own, tails[[row]])
        torch.testing.assert_close(got[[row]], continued(own, tail[[row]]), rtol=0, atol=1e-10)


def test_beams_that_share_a_parent_do_not_share_a_memory():
    history = fresh()
    prefill(history, random_ids(2, 20))
    parent = history.cache.rows[1]
    left, right = parent.memory(0), parent.copy().memory(0)
    before = right.gather(torch.arange(20)).clone()
    left.crop(3)
    assert len(right) == 20
    assert torch.equal(right.gather(torch.arange(20)), before)


def test_a_follow_up_turn_looks_back_at_every_token():
    ids = random_ids(1, 40)
    spy = Spy(pool=3, query=4, seen=[])
    history = new_history(tiny_model(), scorer=spy, schedule=Constant(0.4), cache=AuxCache())
    prefill(history, ids[:, :24])
    continued(history, ids[:, 24:28])
    history.step(ids[:, 28:])
    context, scores = history.pipe.config.scorer.seen[-1]
    assert context.tokens.tolist() == list(range(40))
    assert context.query.tolist() == list(range(36, 40))
    expected = first_layer_states(ids)
    torch.testing.assert_close(context.states_of(torch.arange(40)), expected, rtol=0, atol=1e-10)
    close(scores, naive_late_interaction(ScoreContext(**{**vars(context), "states": expected}), 3, 1.0), 1e-8)


def first_layer_states(ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return tiny_model()(ids, output_hidden_states=True).hidden_states[1][0]


class Spy(LateInteraction):
    """Keeps what it was shown and what it said."""

    seen: list

    def score(self, context: ScoreContext) -> torch.Tensor:
        scores = super().score(context)
        self.seen.append((context, scores))
        return scores


@pytest.mark.parametrize("layer", range(4))
def test_a_failing_step_restores_the_memory(layer: int):
    class Boom(Callback):
        def on_layer_end(self, event):
            if event.layer == layer:
                raise RuntimeError("boom")

    ids = random_ids(1, 31)
    history, plain = fresh(), fresh()
    for one in (history, plain):
        prefill(one, ids[:, :24])
    before = {depth: memory.copy() for depth, memory in history.cache.rows[0].memories.items()}
    mask = torch.ones(1, 28, dtype=torch.long)
    with (
        pytest.raises(RuntimeError, match="boom"),
        torch.no_grad(),
        history.pipe.attached(callbacks=[Boom()], missing="nan") as model,
    ):
        model(ids[:, 24:28], attention_mask=mask, past_key_values=history.cache)
    for depth, memory in history.cache.rows[0].memories.items():
        assert torch.equal(memory._tokens.read(), before[depth]._tokens.read())
        assert torch.equal(memory._states.read(), before[depth]._states.read())
    torch.testing.assert_close(history.step(ids[:, 24:]), plain.step(ids[:, 24:]), rtol=0, atol=0, equal_nan=True)


def test_a_failed_step_with_embeddings_does_not_hide_the_token_ids():
    scorer = LexicalOverlap(query=3, pool=1)
    pipe = LazyPipeline(tiny_model(), scorer=scorer, schedule=Constant(0.5), cache=AuxCache())
    cache, ids = pipe.new_cache(), random_ids(1, 30)
    with torch.no_grad(), pipe.attached() as model:
        model(ids[:, :20], past_key_values=cache, logits_to_keep=1)
        embeddings = model.get_input_embeddings()(ids[:, 20:])
        with pytest.raises(InputError, match="inputs_embeds"):
            model(inputs_embeds=embeddings, past_key_values=cache, logits_to_keep=1)
        model(ids[:, 20:], past_key_values=cache, logits_to_keep=1)
    assert cache.get_seq_length() == 30


def test_only_scorers_that_look_back_keep_states():
    for scorer, kept in ((Random(), False), (SCORER, True)):
        history = new_history(tiny_model(), scorer=scorer, schedule=Constant(0.5), cache=DropCache())
        prefill(history, random_ids(1, 12))
        assert history.cache.aux_bytes == kept * 12 * 32 * 8


# -- the query ------------------------------------------------------------------------------------------

WORDS = [f"w{index}" for index in range(60)]
TEXT = " ".join(WORDS[7 * index % 50] for index in range(60))
RARE = "w55 w56 w57"


@pytest.fixture(scope="module")
def pipe() -> LazyPipeline:
    tokenizer = word_tokenizer([*WORDS, "?", "."])
    return LazyPipeline(
        tiny_model(), tokenizer, scorer=LateInteraction(pool=3), schedule=Constant(0.1), cache=AuxCache()
    )


def words_of(pipe: LazyPipeline, prompt, query=None) -> str:
    """The words at the token ranges of the query."""
    encoded = pipe.encode(prompt, query=query)
    return " | ".join(pipe.tokenizer.decode(encoded.token_ids[slice(*part)]) for part in encoded.marks.query)


def test_auto_is_the_question_of_the_last_user_turn(pipe):
    document = f"{TEXT} {TEXT} {TEXT}"
    assert len(document) > LONGEST_QUESTION
    chat = [
        {"role": "system", "content": "w1 w2"},
        {"role": "user", "content": f"{document}\n\nw3 w4 ?"},
        {"role": "assistant", "content": "w5 w6"},
        {"role": "user", "content": f"{document}\n\n{RARE} ?"},
    ]
    assert words_of(pipe, chat) == f"{RARE} ?"
    assert words_of(pipe, chat, "auto") == f"{RARE} ?"
    assert words_of(pipe, [*chat[:3], {"role": "user", "content": "w8 w9"}]) == "w8 w9"


def test_auto_without_a_chat_is_a_lone_question_and_the_end(pipe):
    assert words_of(pipe, f"{RARE} ?\n\n{TEXT}") == f"{RARE} ? | {' '.join(TEXT.split()[-32:])}"
    assert words_of(pipe, "w1 w2 w3") == "w1 w2 w3"


def test_a_named_substring_is_its_last_occurrence(pipe):
    prompt = f"{RARE} {TEXT} {RARE} {TEXT}"
    encoded = pipe.encode(prompt, query=RARE)
    assert encoded.marks.query == ((63, 66),)
    assert words_of(pipe, prompt, RARE) == RARE


def test_a_token_range_and_a_number_are_taken_as_they_are(pipe):
    assert pipe.encode(TEXT, query=(3, 9)).marks.query == ((3, 9),)
    assert pipe.encode(TEXT, query=5).marks.query == ((55, 60),)
    assert pipe.encode(TEXT, query=99).marks.query == ((0, 60),)


class Watch(Spy):
    """Shows which query each row was scored with."""


def scored_queries(prompt, query, scorer_query="auto", **options) -> list[list[int]]:
    scorer = Watch(query=scorer_query, pool=3, seen=[])
    tokenizer = word_tokenizer([*WORDS, "?", "."])
    made = LazyPipeline(tiny_model(), tokenizer, scorer=scorer, schedule=Constant(0.1), cache=AuxCache())
    made.generate(prompt, query=query, **{**GREEDY, **options})
    return [context.query.tolist() for context, _ in made.config.scorer.seen]


@pytest.mark.parametrize(
    ("query", "expected"),
    [((3, 9), range(3, 9)), (" ".join(TEXT.split()[20:24]), range(20, 24)), (5, range(55, 60)), (None, range(28, 60))],
)
def test_the_scorer_asks_with_the_query_in_prefill_and_with_the_last_tokens_in_decode(query, expected):
    queries = scored_queries(TEXT, query)
    assert queries[0] == list(expected)
    assert [query[-1] for query in queries[1:]] == [60, 61, 62]
    assert all(len(query) == 32 for query in queries[1:])


def test_a_number_of_last_tokens_in_the_scorer():
    queries = scored_queries(TEXT, None, scorer_query=6)
    assert queries == [list(range(stop - 6, stop)) for stop in range(60, 64)]


def test_a_batch_takes_one_query_each_or_one_for_all():
    prompts = [TEXT, " ".join(TEXT.split()[:40])]
    assert scored_queries(prompts, [(3, 9), (1, 2)], max_new_tokens=1) == [[3, 4, 5, 6, 7, 8], [1]]
    assert scored_queries(prompts, (3, 5), max_new_tokens=1) == [[3, 4], [3, 4]]


@pytest.mark.parametrize("scorer", [LateInteraction(pool=3), LexicalOverlap(pool=1), Random(), LastTokenAttention()])
def test_query_tokens_are_never_pruned(scorer: Scorer):
    trace = TokenTrace()
    made = LazyPipeline(tiny_model(), scorer=scorer, schedule=Constant(0.05), cache=AuxCache(), callbacks=[trace])
    made.generate(random_ids(1, 60)[0], query=(11, 17), **GREEDY)
    for step in trace.steps:
        assert set(range(11, 17)) <= set(step[-1].rows[0].visible.tolist())
    assert trace.steps[0][-1].rows[0].visible.numel() == 7


@pytest.mark.parametrize("system", [True, False])
def test_the_system_message_may_be_protected(system: bool):
    chat = [{"role": "system", "content": "w1 w2 w3"}, {"role": "user", "content": TEXT}]
    trace = TokenTrace()
    made = LazyPipeline(
        tiny_model(), word_tokenizer(WORDS), scorer=SinkRecent(0), schedule=Constant(0.1), cache=AuxCache(),
        protect=Protect(system=system), callbacks=[trace],
    )  # fmt: skip
    assert made.encode(chat).marks.protected == (((2, 5),) if system else ())
    made.generate(chat, **GREEDY)
    seen = [set(range(2, 5)) & set(step[-1].rows[0].visible.tolist()) for step in trace.steps]
    assert seen == [set(range(2, 5)) if system else set()] * len(trace.steps)


DOCUMENT = "The meeting was long. Nobody remembers who came. " * 20
QUESTION = "Who came to the meeting?"
LONG_END = "That was all that could be said about the meeting, and everybody went home."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Sum it up.", ["Sum it up."]),
        (f"{DOCUMENT}\n\n{QUESTION}", [QUESTION]),
        (f"{DOCUMENT}\n\nSum it up.", ["Sum it up."]),
        (f"{DOCUMENT}\n{QUESTION}", [QUESTION]),
        (f"{DOCUMENT}{QUESTION}", [QUESTION]),
        (f"{QUESTION}\n\n{DOCUMENT}\n\nThe end.", [QUESTION, "The end."]),
        (f"{QUESTION}\n\n{DOCUMENT}", [QUESTION, "Nobody remembers who came."]),
        (f"{DOCUMENT}\n\n{QUESTION}\n\n{DOCUMENT}\n\nThe end.", [QUESTION, "The end."]),
        (f"{QUESTION} Be brief.\n\n{DOCUMENT}\n\nThe end.", [f"{QUESTION} Be brief.", "The end."]),
        (f"{QUESTION}\n\n{DOCUMENT}\n\n{LONG_END}", [QUESTION]),
        (f"{QUESTION} {LONG_END}\n\n{DOCUMENT}\n\nSum it up.", [f"{QUESTION} {LONG_END}", "Sum it up."]),
        (f"Sum it up.\n\n{DOCUMENT}\n\n{LONG_END}", ["Sum it up.", LONG_END]),
        ("\n\n".join([DOCUMENT, "a?", "b?", "c?"]), ["a?", "b?", "c?"]),
        ("\n\n".join([DOCUMENT, "a?", "b?", "c?", "d?"]), ["d?"]),
        ("x" * 1000, ["x" * LONGEST_QUESTION]),
    ],
    ids=[
        "short",
        "end",
        "order",
        "line",
        "sentence",
        "first",
        "first, long end",
        "middle",
        "remark",
        "text at the end",
        "question in a text",
        "order first",
        "few",
        "many",
        "huge",
    ],
)
def test_find_questions(text: str, expected: list[str]):
    assert [text[start:stop] for start, stop in find_questions(text)] == expected


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        (f"{RARE} ?", True),
        (f"{TEXT}\n\n{RARE} ?\nw1 .", True),
        (f"{RARE} ?\n\n{TEXT}", True),
        (TEXT, False),
        (f"w1 ? {TEXT} {TEXT} {TEXT}", False),
        (ask(f"{TEXT} {TEXT} {TEXT}\n\n{RARE} ?"), True),
        (ask(f"{TEXT} {TEXT} {TEXT}\n\n{RARE} \uff1f"), True),
        (ask(f"{TEXT} {TEXT} {TEXT}\n\n{RARE} \u061f"), True),
        (ask(f"{TEXT} {TEXT} {TEXT}\n\n{RARE} ."), False),
        ([*ask(f"{RARE} ?"), {"role": "assistant", "content": "w1"}, *ask(f"{RARE} .")], False),
        ([3, 4, 5], False),
    ],
    ids=["text", "end", "first", "no question", "a mark far off", "chat", "full-width", "Arabic", "order",
         "earlier turn", "ids"],
)  # fmt: skip
@pytest.mark.parametrize("query", [None, "auto", 5])
def test_a_prompt_asks_where_a_question_would_stand(pipe, prompt, asked: bool, query):
    assert pipe.encode(prompt, query=query).marks.asked is asked


@pytest.mark.parametrize("query", [(1, 3), "w1"])
def test_a_prompt_with_a_named_query_asks(pipe, query):
    assert pipe.encode("w0 w1 w2", query=query).marks.asked


def test_a_prompt_asks_whatever_the_scorer_reads():
    made = LazyPipeline(tiny_model(), word_tokenizer([*WORDS, "?"]), scorer=Random())
    asks, plain = made.encode(f"{TEXT}\n\n{RARE} ?").marks, made.encode(TEXT).marks
    assert (asks.asked, asks.query) == (True, ())
    assert (plain.asked, plain.query) == (False, ())


# -- units of the text ----------------------------------------------------------------------------------

UNITS = "w1 w2 .\nw3 w4 ? w5\n\nw6 w7 .\n"


def test_lines_sentences_and_paragraphs_are_told_by_their_first_tokens(pipe):
    assert pipe.encode(UNITS).marks.starts == {
        "line": (0, 3, 7),
        "sentence": (0, 3, 6, 7),
        "paragraph": (0, 7),
    }  # fmt: skip
    assert pipe.encode([3, 4, 5]).marks.starts == {}


@pytest.mark.parametrize(("scorer", "looks"), [(LexicalOverlap(), 0), (Blockwise(Random(), "sentence"), 1)])
def test_units_are_looked_for_once_and_only_when_they_are_read(scorer: Scorer, looks: int, monkeypatch):
    looked, find = [], prompts._starts
    monkeypatch.setattr(prompts, "_starts", lambda known: looked.append(known) or find(known))
    made = LazyPipeline(
        tiny_model(), word_tokenizer([*WORDS, "?", "."]), scorer=scorer, schedule=Constant(0.5), cache=AuxCache()
    )
    made.generate(UNITS * 3, **GREEDY)
    assert len(looked) == looks


def test_marks_are_equal_and_can_be_written_down_whether_their_units_were_read_or_not(pipe):
    read, fresh = pipe.encode(UNITS).marks, pipe.encode(UNITS).marks
    assert read.starts["line"] == (0, 3, 7)
    assert "line" in repr(read)
    for marks in (read, fresh):
        written = pickle.dumps(marks)
        assert pickle.loads(written) == marks == pipe.encode(UNITS).marks
        assert b"w3 w4" not in written
    assert pipe.encode("w1 w2 .").marks != read


@pytest.mark.parametrize(
    ("unit", "kept"), [("line", {6, 7, 8, 9}), ("sentence", {8, 9}), ("paragraph", set(range(6, 12)))]
)
def test_units_stay_or_go_together(unit: str, kept: set[int]):
    """With room for the unit that holds the rarest word of the query, and for the last token."""
    trace = TokenTrace()
    made = LazyPipeline(
        tiny_model(), word_tokenizer([*WORDS, "?", "."]), scorer=Blockwise(LexicalOverlap(query="w9", pool=1), unit),
        schedule=Constant((len(kept) + 1) / 15), cache=AuxCache(decode="reuse"), callbacks=[trace],
    )  # fmt: skip
    made.generate("w1 w2 .\nw3 w4 .\n\nw5 ? w9 .\nw6 .\n\nw7 w8 w9", **GREEDY)
    assert set(trace.steps[0][1].rows[0].visible.tolist()) == kept | {14}


@pytest.mark.parametrize("written", [True, False], ids=["as text", "as token ids"])
def test_a_further_turn_keeps_the_units_of_the_turns_before(written: bool):
    made = LazyPipeline(
        tiny_model(), word_tokenizer([*WORDS, "?", "."]), scorer=Blockwise(Random(), "line"), schedule=Constant(0.5),
        cache=AuxCache(decode="reuse"),
    )  # fmt: skip
    cache = made.new_cache()
    reply = made.generate(UNITS, past_key_values=cache, max_new_tokens=3, do_sample=False, eos_token_id=-1)
    assert cache.rows[0].marks.starts["line"] == (0, 3, 7)
    ids = [*made.encode(UNITS).token_ids, *reply.token_ids]
    more = f"{UNITS}w8 w9 w10\nw8 w9\nw1" if written else [*ids, *ids[:3]]
    made.generate(more, past_key_values=cache, **GREEDY)
    assert cache.rows[0].marks.starts["line"][:4] == (0, 3, 7, 10)


def test_units_of_a_text_that_is_not_known_are_refused():
    made = LazyPipeline(tiny_model(), scorer=Blockwise(Random(), "line"), schedule=Constant(0.5), cache=AuxCache())
    with pytest.raises(InputError, match="blocks by line need a text prompt"):
        made.generate(random_ids(1, 20)[0], **GREEDY)


# -- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "must not be empty"),
        ("w59 w59", "'w59 w59' does not occur in the prompt"),
        ((50, 90), r"query token range \(50, 90\) reaches beyond the prompt's 60 tokens"),
        ((9, 9), "start < stop"),
        (0, "at least one, not 0"),
        (-3, "at least one, not -3"),
        (2.5, "no known kind"),
        ([3, 4], "2 queries for 1 prompts"),
        ([], "0 queries for 1 prompts"),
    ],
    ids=str,
)
def test_a_query_that_cannot_be_used(pipe, query, message: str):
    with pytest.raises(InputError, match=message):
        pipe.generate(TEXT, query=query, **GREEDY)


def test_a_wrong_number_of_queries_for_a_batch(pipe):
    with pytest.raises(InputError, match="3 queries for 2 prompts"):
        pipe.generate([TEXT, TEXT], query=[1, 2, 3], **GREEDY)


def test_a_named_query_of_token_ids(pipe):
    with pytest.raises(InputError, match="needs a text prompt"):
        pipe.generate([3, 4, 5], query="w1", **GREEDY)


def test_lexical_overlap_needs_token_ids():
    made = LazyPipeline(tiny_model(), scorer=LexicalOverlap(query=3), schedule=Constant(0.5), cache=AuxCache())
    embeddings = tiny_model().get_input_embeddings()(random_ids(1, 20))
    cache = made.new_cache()
    with torch.no_grad(), made.attached() as model, pytest.raises(InputError, match="inputs_embeds"):
        model(inputs_embeds=embeddings, past_key_values=cache, logits_to_keep=1)
    assert cache.get_seq_length() == 0


def test_late_interaction_works_on_embeddings():
    made = LazyPipeline(tiny_model(), scorer=SCORER, schedule=Constant(0.5), cache=AuxCache())
    ids = random_ids(1, 20)
    with torch.no_grad(), made.attached() as model:
        left = model(ids, past_key_values=made.new_cache(), logits_to_keep=1).logits
        embeddings = model.get_input_embeddings()(ids)
        right = model(inputs_embeds=embeddings, past_key_values=made.new_cache(), logits_to_keep=1).logits
    assert torch.equal(left, right)


@pytest.mark.parametrize("scorer", [LateInteraction(), LexicalOverlap(), TwoHop(LateInteraction())], ids=str)
@pytest.mark.parametrize("start", [0, 1])
def test_a_context_shorter_than_the_query_window_runs_dense(scorer: Scorer, start: int):
    ids = random_ids(1, 12)
    made = LazyPipeline(tiny_model(), scorer=scorer, schedule=AttentionMass(0.1, start=start), cache=AuxCache())
    expected = tiny_model().generate(ids, do_sample=False, eos_token_id=None, max_new_tokens=4)[0, 12:].tolist()
    assert made.generate(ids[0], **GREEDY).token_ids == expected


def test_all_tokens_protected_runs_dense():
    ids = random_ids(1, 12)
    made = LazyPipeline(
        tiny_model(),
        scorer=SCORER,
        schedule=AttentionMass(0.1),
        cache=AuxCache(max_revived=1),
        protect=Protect(sinks=99),
    )
    expected = tiny_model().generate(ids, do_sample=False, eos_token_id=None, max_new_tokens=4)[0, 12:].tolist()
    assert made.generate(ids[0], **GREEDY).token_ids == expected


class Negative(Scorer):
    """Below zero for some."""

    def score(self, context: ScoreContext) -> torch.Tensor:
        return context.tokens.double() - 1


def test_a_share_of_negative_scores_is_refused():
    made = LazyPipeline(tiny_model(), scorer=Negative(), schedule=AttentionMass(0.5), cache=AuxCache())
    cache = made.new_cache()
    with pytest.raises(PolicyError, match=r"not negative, got -1; use a fixed keep ratio"):
        made.generate(random_ids(1, 20)[0], past_key_values=cache, **GREEDY)
    assert cache.get_seq_length() == cache.aux_bytes == 0
