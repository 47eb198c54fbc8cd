"""The instruments that judge quality: tasks hold what they promise, and the measures measure it."""

import random
from dataclasses import make_dataclass, replace

import pytest
import torch
from pydantic import create_model

from lazyllm import (
    AuxCache,
    Blockwise,
    Combined,
    Constant,
    InputError,
    LastTokenAttention,
    LateInteraction,
    LazyConfig,
    LazyPipeline,
    Protect,
    Random,
    Stages,
    TokenTrace,
)
from lazyllm.config import preset_names
from lazyllm.evaluation.compare import line_of
from lazyllm.evaluation.curves import CURVES, curve_points
from lazyllm.evaluation.digest import digest
from lazyllm.evaluation.fidelity import divergence, token_agreement, top1_agreement
from lazyllm.evaluation.plots import plot_kept, plot_quality
from lazyllm.evaluation.quality import (
    STOCK,
    Contender,
    Verdict,
    dense_run,
    forced_logits,
    judge,
)
from lazyllm.evaluation.tasks import TASKS, Item, Maker, make_items
from tests.tiny import VOCABULARY, tiny_model, word_tokenizer

WORDS = [f"w{index}" for index in range(60)]
TOKENS = 1500


@pytest.fixture
def tokenizer():
    return word_tokenizer([*WORDS, "?"])


def text_of(item: Item) -> str:
    return item.prompt if isinstance(item.prompt, str) else item.prompt[-1]["content"]


def words(seed: int, count: int) -> list[str]:
    return random.Random(seed).choices(WORDS, k=count)


def item(seed: int = 0, **fields) -> Item:
    given = {"reference": "w1 w2 w3", "answers": ("w1",), "new_tokens": 5, **fields}
    return Item("made", " ".join(words(seed, 40)), **given)


def pipeline(tokenizer, **policies) -> LazyPipeline:
    return LazyPipeline(tiny_model(), tokenizer, **policies)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("chats", [True, False])
def test_a_task_has_its_length_its_answer_and_its_evidence(tokenizer, name: str, chats: bool):
    if not chats:
        tokenizer.chat_template = None
    maker = Maker(tokenizer, TOKENS)
    first, second = make_items(name, maker, 2)
    assert make_items(name, maker, 1) == [first]
    assert first.prompt != second.prompt
    for one in (first, second):
        assert 0.6 * TOKENS < maker.count(text_of(one)) <= 1.1 * TOKENS
        whole = one.prompt if isinstance(one.prompt, str) else "".join(turn["content"] for turn in one.prompt)
        assert all(passage in whole for passage in one.evidence)
        assert not one.answers or one.is_right(one.reference)
        if name in ("needle", "follow-up", "later", "squad", "records", "table", "german"):
            assert any(one.is_right(passage) for passage in one.evidence)


@pytest.mark.parametrize(
    ("layout", "place"), [("question last", 1.0), ("question in the middle", 0.5), ("question first", 0.0)]
)
def test_the_question_stands_where_it_should(tokenizer, layout, place: float):
    (one,) = make_items("needle", Maker(tokenizer, TOKENS, layout), 1)
    text = text_of(one)
    found = text.index("What is the secret number")
    assert abs(found / len(text) - place) < 0.3


def test_an_unknown_task_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"'neddle'.*Did you mean 'needle'"):
        make_items("neddle", Maker(tokenizer, TOKENS), 1)


def test_an_answer_is_right_whatever_case_and_punctuation():
    one = item(answers=("New York-City", "1066"))
    assert one.is_right("It was new york-city.")
    assert one.is_right("(1066)!")
    assert not one.is_right("New Jersey")


@pytest.mark.parametrize("recent", [10, 20, 40])
def test_recall_is_the_share_of_the_evidence_that_stays(tokenizer, recent: int):
    spread = words(0, 40)
    one = Item("made", " ".join(spread), "", evidence=(" ".join(spread[20:40]),))
    pipe = pipeline(
        tokenizer, scorer="SinkRecent(sinks=0)", schedule=Constant(recent / 40, start=1), protect=Protect(recent=1)
    )
    assert judge(Contender(pipe, "recent"), one).recall == min(recent, 20) / 20
    assert judge(Contender(pipe, "recent"), item()).recall is None


def test_the_loss_is_that_of_the_reference_after_the_prompt(tokenizer):
    pipe = pipeline(tokenizer, cache="DenseCache")
    one = item()
    prompt, reference = (tokenizer(text)["input_ids"] for text in (one.prompt, one.reference))
    with torch.no_grad():
        logits = tiny_model()(torch.tensor([prompt + reference])).logits[0, len(prompt) - 1 : -1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(reference))
    for contender in (Contender(pipe, "dense"), Contender(pipe, STOCK, is_stock=True)):
        verdict = judge(contender, one)
        assert verdict.loss == pytest.approx(float(expected), rel=1e-5)
        assert verdict.computed_fraction == 1.0
        expected_reply = pipe.generate(one.prompt, max_new_tokens=5, do_sample=False).token_ids
        assert verdict.reply == expected_reply[: len(verdict.reply)]


def test_a_reply_goes_on_from_what_was_said(tokenizer):
    one = item(said="w7 w8 w9", answers=("none",))
    pipe = pipeline(tokenizer, cache="DenseCache")
    whole = tokenizer(f"{one.prompt} {one.said}")["input_ids"]
    expected = pipe.generate(whole, max_new_tokens=5, do_sample=False, eos_token_id=-1).token_ids
    plain = judge(Contender(pipe, "dense"), Item("made", f"{one.prompt} {one.said}", one.reference, one.answers, (), 5))
    for contender in (Contender(pipe, "dense"), Contender(pipe, STOCK, is_stock=True)):
        verdict = judge(contender, one)
        assert verdict.reply == expected
        assert verdict.loss == pytest.approx(plain.loss, rel=1e-5)


@pytest.mark.parametrize("policies", [{"schedule": Constant(1.0)}, {"schedule": Stages({1: 0.5, 3: 0.3})}])
def test_a_question_that_is_asked_later_is_judged_as_one_that_was_known(tokenizer, policies):
    """Where nothing is chosen before the layer in which the text waits, it is the same."""
    trace = TokenTrace()
    pipe = LazyPipeline(tiny_model(), tokenizer, scorer=LastTokenAttention(), **policies, callbacks=[trace])
    known = replace(item(answers=()), prompt=" ".join(words(0, 60)) + "\n\nw1 ?")
    expected = judge(Contender(pipe, "known"), known)
    trace.steps.clear()
    got = judge(Contender(pipe, "later"), replace(known, waits=True))
    assert got.reply == expected.reply
    assert got.loss == pytest.approx(expected.loss, abs=1e-9)
    assert got.computed_fraction == pytest.approx(expected.computed_fraction)
    depths = {len(step) for step in trace.steps}
    assert depths == ({4} if policies["schedule"] == Constant(1.0) else {1, 4})
    stock = judge(Contender(pipe, STOCK, is_stock=True), replace(known, waits=True))
    assert stock.loss == judge(Contender(pipe, STOCK, is_stock=True), known).loss


def test_a_second_turn_goes_on_where_the_first_one_stopped(tokenizer):
    one = item(follow_up="w7 w8", answers=("none",))
    pipe = pipeline(tokenizer, cache="DenseCache")
    first = pipe.generate(one.prompt, max_new_tokens=5, do_sample=False, eos_token_id=-1).token_ids
    end = tokenizer.eos_token_id
    said = first[: first.index(end)] if end in first else first
    between = tokenizer("user : w7 w8 assistant :")["input_ids"]
    whole = tokenizer(one.prompt)["input_ids"] + said + between
    expected = pipe.generate(whole, max_new_tokens=5, do_sample=False, eos_token_id=-1).token_ids
    for contender in (Contender(pipe, "dense"), Contender(pipe, STOCK, is_stock=True)):
        assert judge(contender, one).reply == expected


def test_the_query_of_a_second_turn_is_its_question(tokenizer, monkeypatch):
    asked = []
    spy = LateInteraction(pool=3)
    monkeypatch.setattr(
        LateInteraction, "score", lambda self, context: asked.append(context) or torch.zeros(context.tokens.shape)
    )
    pipe = pipeline(tokenizer, scorer=spy, schedule=Constant(0.5, start=1), cache=AuxCache(decode="reuse"))
    judge(Contender(pipe, "late"), item(follow_up="w7 w8"))
    ids = asked[-1].token_ids
    assert tokenizer.decode(ids[asked[-1].query]) == "w7 w8"
    assert asked[-1].context_tokens > asked[0].context_tokens


def test_units_of_a_text_are_known_in_a_second_turn_too(tokenizer):
    pipe = pipeline(tokenizer, scorer=Blockwise(Random(), "sentence"), schedule=Constant(0.5, start=1))
    verdict = judge(Contender(pipe, "sentences"), item(follow_up="w7 w8"))
    assert verdict.follow_up_seconds is not None


def test_a_pruned_pipeline_is_judged_on_what_it_computes(tokenizer):
    pipe = pipeline(tokenizer, scorer=LastTokenAttention(), schedule=Constant(0.5, start=1), cache=AuxCache())
    verdict = judge(Contender(pipe, "half"), item(), reference=[VOCABULARY % 60 + 3, 9])
    stats = pipe.generate(item().prompt, max_new_tokens=1, do_sample=False).stats
    assert verdict.computed_fraction == pytest.approx(stats.prefill_computed_fraction)
    assert verdict.reference == [VOCABULARY % 60 + 3, 9]


@pytest.mark.parametrize("fields", [{}, {"said": "w7 w8"}, {"follow_up": "w7 w8"}, {"reference": "", "answers": ()}])
def test_the_unmodified_model_is_as_near_to_itself_as_can_be(tokenizer, fields):
    stock = Contender(pipeline(tokenizer, cache="DenseCache"), STOCK, is_stock=True)
    one = item(**fields)
    dense = dense_run(stock, one)
    assert dense.logits.shape == (len(dense.reply), VOCABULARY)
    alone, beside = judge(stock, one), judge(stock, one, dense=dense)
    assert beside.divergence == pytest.approx(0, abs=1e-6)
    assert (beside.top1, beside.agreement, beside.rouge_l) == (1, 1, 1)
    assert (beside.reply, beside.loss, beside.score) == (alone.reply, alone.loss, alone.score)
    assert (alone.divergence, alone.top1, alone.agreement, alone.rouge_l) == (None,) * 4


@pytest.mark.parametrize(
    "name", ["paper", "recommended", "recommended-fast", "random-drop", "h2o", "snapkv", "streamingllm", "pyramiddrop"]
)
def test_a_pruned_pipeline_is_measured_along_the_dense_reply(tokenizer, name):
    pipe = LazyPipeline.from_config(LazyConfig.preset(name), tiny_model(), tokenizer)
    stock, pruned = Contender(pipe, STOCK, is_stock=True), Contender(pipe, name)
    one = item(answers=("none",), new_tokens=9)
    dense = dense_run(stock, one)
    dense = replace(dense, reply=[*dense.reply[:3], 7, 9, 4], logits=dense.logits[:6])  # where both part, or not yet
    alone, verdict = judge(pruned, one), judge(pruned, one, dense=dense)
    logits = forced_logits(pruned, one.prompt, dense.reply)
    assert verdict.divergence == pytest.approx(divergence(dense.logits, logits), rel=1e-9)
    assert verdict.divergence > 1e-5
    assert verdict.top1 == top1_agreement(dense.logits, logits)
    assert verdict.agreement == token_agreement(verdict.reply, dense.reply)
    assert (verdict.reply, verdict.loss, verdict.cache_bytes) == (alone.reply, alone.loss, alone.cache_bytes)
    assert verdict.growth == alone.growth


def test_only_what_others_are_compared_with_is_brought_together(tokenizer, monkeypatch):
    dense = dense_run(Contender(pipeline(tokenizer, cache="DenseCache"), STOCK, is_stock=True), item())
    monkeypatch.setattr("lazyllm.evaluation.quality.DenseRun", None)
    half = Contender(pipeline(tokenizer, scorer=Random(), schedule=Constant(0.5)), "half")
    assert judge(half, item(), dense=dense).divergence > 0


def test_the_second_turn_is_timed_and_its_evidence_is_counted_again(tokenizer):
    one = item(follow_up="w7 w8", evidence=(" ".join(words(0, 40)[:10]),))
    pipe = pipeline(tokenizer, scorer=Random(), schedule=Constant(0.5, start=1), cache=AuxCache())
    verdict = judge(Contender(pipe, "random"), one)
    assert verdict.follow_up_seconds > 0
    assert 0 < verdict.recall <= verdict.follow_up_recall <= 1
    plain = judge(Contender(pipe, "random"), item())
    assert (plain.follow_up_seconds, plain.follow_up_recall) == (None, None)
    assert verdict.computed_fraction == judge(Contender(pipe, "random"), replace(one, follow_up="")).computed_fraction


def test_a_graded_answer_is_paired_like_any_other():
    def verdict(score: float) -> Verdict:
        return Verdict([1], 1.0, [1], "", score, 1.0, 0.5)

    stock, mine = [verdict(1), verdict(0.5), verdict(0.25)], [verdict(0.5), verdict(0.5), verdict(0.5)]
    line = line_of("made", "mine", mine, stock)
    assert (line.score, line.won, line.lost, line.p_value) == (0.5, 1, 1, 1.0)
    assert line.follow_up_speedup is None
    later = {
        name: [replace(one, follow_up_seconds=time) for one in stock] for name, time in ((STOCK, 6.0), ("mine", 2.0))
    }
    assert line_of("made", "mine", later["mine"], later[STOCK]).follow_up_speedup.estimate == 3
    assert [one.is_right for one in stock] == [True, False, False]
    assert Verdict([1], 1.0, [1], "", None, 1.0, 0.5).is_right is None


CONFIG = LazyConfig(
    scorer=Combined({Random(seed=1): 1.0, LastTokenAttention(): 2.0}), schedule=Stages({1: 0.5, 2: 0.3})
)


def widened(value, extra: int = 3):
    """The same value, of a class that has one more field with a default."""
    cls = type(value)
    if isinstance(value, Item):
        wider = make_dataclass(cls.__name__, [("extra", int, 3)], bases=(cls,), frozen=True)
        return wider(**vars(value), extra=extra)
    return create_model(cls.__name__, __base__=cls, extra=(int, 3))(**dict(value), extra=extra)


def with_scorer(scorer) -> LazyConfig:
    return LazyConfig(scorer=Combined({scorer: 1.0, LastTokenAttention(): 2.0}), schedule=CONFIG.schedule)


@pytest.mark.parametrize(
    ("before", "widen"),
    [
        (item(), lambda extra: widened(item(), extra)),
        (CONFIG, lambda extra: widened(CONFIG, extra)),
        (CONFIG, lambda extra: with_scorer(widened(Random(seed=1), extra))),
    ],
    ids=["item", "configuration", "scorer within a scorer"],
)
def test_a_new_field_leaves_results_valid_until_it_is_used(before, widen):
    assert digest(widen(3)) == digest(before)
    assert digest(widen(4)) != digest(before)


def test_whatever_differs_is_judged_anew():
    things = [
        CONFIG,
        LazyConfig(),
        LazyConfig(chunk=7),
        with_scorer(Random(seed=2)),
        with_scorer(LateInteraction()),
        LazyConfig(scorer=CONFIG.scorer, schedule=Stages({1: 0.5, 3: 0.3})),
        LazyConfig(scorer=CONFIG.scorer, schedule=Stages({1: 0.5, 2: 0.4})),
        LazyConfig(protect=Protect(spans=("w1", "w2"))),
        LazyConfig(protect=Protect(spans=("w1, w2",))),
        item(),
        item(1),
        item(reference="w1"),
        item(answers=("w1", "w2")),
        item(answers=("w1', 'w2",)),
        item(said="w1"),
        item(follow_up="w1"),
        Item("made", [{"role": "user", "content": "w1"}], "w2"),
        Item("made", [{"role": "system", "content": "w1"}], "w2"),
    ]
    assert len({digest(thing) for thing in things}) == len(things)


@pytest.mark.parametrize("name", preset_names())
def test_a_configuration_is_known_again_however_it_was_written(name: str):
    config = LazyConfig.preset(name)
    assert digest(LazyConfig(**config.to_dict())) == digest(config)
    assert digest(LazyConfig(**dict(reversed(dict(config).items())))) == digest(config)


def test_the_order_of_fields_does_not_matter():
    one, other = (create_model("Pair", **dict.fromkeys(names, (int, 0))) for names in ("ab", "ba"))
    assert digest(one(a=1, b=2)) == digest(other(a=1, b=2)) != digest(one(a=2, b=1))


def test_the_order_of_a_mapping_does_not_matter():
    stages = {1: 0.5, 2: 0.3}
    turned = dict(reversed(stages.items()))
    assert digest(LazyConfig(schedule=Stages(stages))) == digest(LazyConfig(schedule=Stages(turned)))


def test_recall_decode_and_memory_are_paired_where_they_were_noted():
    def verdict(recall, step, held) -> Verdict:
        return Verdict([1], 1.0, [1], "", True, 1.0, 0.5, recall, step, held)

    stock = [verdict(1.0, 0.4, 100), verdict(None, None, 300), verdict(1.0, 0.6, 200)]
    mine = [verdict(0.5, 0.2, 50), verdict(None, None, 60), verdict(0.0, 0.1, None)]
    own, line = line_of("task", STOCK, stock, stock), line_of("task", "mine", mine, stock)
    assert (own.recall, own.memory) == (1.0, 1.0)
    assert line.recall == 0.25
    assert line.decode_speedup.estimate == pytest.approx((2 + 6) / 2)
    assert line.memory == pytest.approx((0.5 + 0.2) / 2)
    old = [Verdict([1], 1.0, [1], "", True, 1.0, 0.5)] * 3
    unknown = line_of("task", "old", old, stock)
    assert (unknown.recall, unknown.decode_speedup, unknown.memory) == (None, None, None)


def test_times_that_may_not_be_compared_are_left_out():
    def verdict(ttft, step) -> Verdict:
        return Verdict([1], 1.0, [1], "", True, ttft, 0.5, None, step, 1)

    stock, mine = [verdict(4.0, 0.4), verdict(6.0, 0.6)], [verdict(2.0, 0.1), verdict(1.0, 0.3)]
    line = line_of("task", "mine", mine, stock, [True, False])
    assert (line.items, line.speedup.estimate, line.decode_speedup.estimate) == (2, 2.0, pytest.approx(4.0))
    none = line_of("task", "mine", mine, stock, [False, False])
    assert (none.items, none.speedup, none.decode_speedup) == (2, None, None)


def test_the_comparison_is_paired():
    def verdict(loss: float, right: bool, ttft: float, reply: list[int]) -> Verdict:
        return Verdict([1], loss, reply, "", right, ttft, 0.5)

    stock = [verdict(1.0, True, 4.0, [1, 2]), verdict(2.0, False, 6.0, [1, 2]), verdict(3.0, True, 8.0, [1, 2])]
    mine = [verdict(1.5, True, 2.0, [1, 2]), verdict(2.5, True, 2.0, [1, 3]), verdict(3.5, False, 2.0, [3, 3, 3])]
    line = line_of("made", "mine", mine, stock)
    assert (line.won, line.lost, line.score, line.p_value) == (1, 1, 2 / 3, 1.0)
    assert line.loss_change.estimate == pytest.approx(0.5)
    assert line.loss_change.low < 0 < line.loss_change.high, "three that are alike decide nothing"
    assert line.speedup.estimate == 3.0
    assert 2.0 <= line.speedup.low <= line.speedup.high <= 4.0
    assert line.agreement == pytest.approx(0.5)


def test_the_figures_are_drawn(tokenizer, tmp_path):
    trace = TokenTrace()
    pipe = pipeline(tokenizer, scorer=Random(), schedule=Constant(0.5), callbacks=[trace])
    pipe.generate(item().prompt, max_new_tokens=1)
    stock, mine = (
        [judge(one, item(seed)) for seed in (0, 1)]
        for one in (Contender(pipe, STOCK, is_stock=True), Contender(pipe, "random"))
    )
    lines = [line_of("made", STOCK, stock, stock), line_of("made", "random", mine, stock)]
    for path in (
        plot_kept(trace, tmp_path / "kept.png", marked=[(3, 9)]),
        plot_quality(lines, tmp_path / "quality.png"),
    ):
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_computes_less_and_less(tokenizer, name: str):
    one = replace(item(), prompt=" ".join(words(0, 230)) + "\n\nw1 w2 ?")
    points = curve_points(name)
    shares = [judge(Contender(LazyPipeline.from_config(config, tiny_model(), tokenizer), label), one).computed_fraction
              for label, config in points.items()]  # fmt: skip
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < shares[0]
    assert all(label.startswith(f"{name}@") for label in points)


def test_an_unknown_curve_is_refused():
    with pytest.raises(InputError, match=r"'papers'.*Did you mean 'paper'"):
        curve_points("papers")
