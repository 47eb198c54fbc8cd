"""Schedules against plain formulas; those that look at the scores, the length or the phase; the bound on revival."""

from math import cos, pi

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lazyllm import (
    AttentionMass,
    AuxCache,
    ByQuestion,
    ConfigError,
    Constant,
    Cosine,
    DropCache,
    FullBelow,
    Funnel,
    LastTokenAttention,
    LateInteraction,
    LazyPipeline,
    LexicalOverlap,
    Linear,
    PerPhase,
    Power,
    PromptMarks,
    Protect,
    Pyramid,
    Random,
    ScoreContext,
    ScoreGap,
    Scorer,
    SinkRecent,
    Stages,
    TokenBudget,
    TokenTrace,
)
from lazyllm.policies.base import Keep, Phase
from lazyllm.policies.schedules.token_budget import CountKeep
from tests.histories import new_history, policies
from tests.tiny import LAYERS, random_ids, tiny_model

PREFILL, DECODE = Phase(True, 1000), Phase(False, 1000)


class Fixed(Scorer):
    """Gives the tokens the scores it is told, in order; 0 beyond."""

    values: tuple[float, ...]

    def score(self, context: ScoreContext) -> torch.Tensor:
        values = torch.zeros(context.context_tokens, dtype=torch.float64)
        values[: len(self.values)] = torch.tensor(self.values, dtype=torch.float64)
        return values[context.tokens]


def entering(scorer: Scorer, schedule, tokens: int, layer: int = 1, protect: Protect | None = None) -> list[int]:
    """The tokens that enter a layer in prefill."""
    history = new_history(
        tiny_model(), scorer=scorer, schedule=schedule, cache=AuxCache(), protect=protect or Protect()
    )
    history.step(random_ids(1, tokens))
    return history.steps[0][layer].rows[0].visible.tolist()


# -- Cosine, Power, Pyramid -----------------------------------------------------------------------------

ends = st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(lambda pair: sorted(pair, reverse=True))
places = st.integers(2, 40).flatmap(lambda layers: st.tuples(st.just(layers), st.integers(0, layers - 2)))


@given(ends, places)
def test_a_cosine_is_half_a_wave_around_the_middle(ratios, place):
    (first, last), (layers, start) = ratios, place
    middle, reach, length = (first + last) / 2, (first - last) / 2, layers - 1 - start
    wave = [middle + reach * cos(pi * step / length) for step in range(length + 1)]
    assert Cosine(first, last, start=start).resolve(layers) == pytest.approx([1.0] * start + wave, abs=1e-12)


@given(ends, places, st.floats(0.1, 9))
def test_a_power_bends_the_line(ratios, place, exponent):
    (first, last), (layers, start) = ratios, place
    length = layers - 1 - start
    bent = [first - (first - last) * (step / length) ** exponent for step in range(length + 1)]
    schedule = Power(first, last, start=start, exponent=exponent)
    assert schedule.resolve(layers) == pytest.approx([1.0] * start + bent, abs=1e-12)


@given(ends, places)
def test_curves_meet_a_line_at_their_ends_and_a_power_of_one_everywhere(ratios, place):
    (first, last), (layers, start) = ratios, place
    line = Linear(first, last, start=start).resolve(layers)
    assert Power(first, last, start=start, exponent=1.0).resolve(layers) == line
    for curve in (Cosine(first, last, start=start), Power(first, last, start=start, exponent=3.0)):
        ratios = curve.resolve(layers)
        assert [ratios[start], ratios[-1]] == pytest.approx([first, last], abs=1e-12)
    early = Power(first, last, start=start, exponent=0.5).resolve(layers)
    assert all(below <= above for below, above in zip(early, line, strict=True))


@pytest.mark.parametrize("curve", [Cosine(0.3, 0.3), Power(0.3, 0.3), Linear(0.3, 0.3)])
def test_a_curve_between_equal_ends_is_flat(curve):
    assert curve.resolve(30) == [1.0] + [0.3] * 29


def test_a_pyramid_is_the_papers_by_default():
    assert Pyramid().resolve(32) == [1.0] * 8 + [0.5] * 8 + [0.25] * 8 + [0.125] * 8
    assert Pyramid(stages=3, keep=0.6).resolve(6) == pytest.approx([1, 1, 0.6, 0.6, 0.36, 0.36])


@given(st.integers(2, 8), st.floats(0.05, 0.95), st.integers(8, 60))
def test_the_parts_of_a_pyramid_are_equal_but_for_rounding(stages: int, keep: float, layers: int):
    ratios = Pyramid(stages=stages, keep=keep).resolve(layers)
    lengths = [ratios.count(ratio) for ratio in dict.fromkeys(ratios)]
    assert len(lengths) == stages
    assert max(lengths) - min(lengths) <= 1
    assert list(dict.fromkeys(ratios)) == pytest.approx([keep**part for part in range(stages)])


def test_a_pyramid_may_begin_at_a_layer():
    assert Pyramid(stages=3, start=2).resolve(10) == [1.0] * 2 + [0.5] * 4 + [0.25] * 4
    assert Pyramid(stages=3, start=0.2).resolve(10) == Pyramid(stages=3, start=2).resolve(10)
    assert Pyramid(stages=4, start=1).resolve(4) == [1.0, 0.5, 0.25, 0.125]
    assert Pyramid(stages=2, start=0).resolve(3) == [0.5] * 3


# -- TokenBudget ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "counts"), [(4, [4, 4, 4, 4]), (8, [8, 8, 8, 5]), (12, [12, 12, 12, 5]), (60, [60, 12, 12, 5])]
)
def test_a_budget_is_a_count_at_any_length(tokens: int, counts: list[int]):
    schedule = TokenBudget({1: 12, 3: 5})
    assert [len(entering(Random(), schedule, tokens, layer)) for layer in range(4)] == counts


def test_a_budget_stays_while_the_reply_grows():
    history = new_history(tiny_model(), scorer=Random(), schedule=TokenBudget({1: 12, 2: 6}), cache=AuxCache())
    history.step(random_ids(1, 20))
    for token in range(3):
        history.step(random_ids(1, 1, token))
    counts = [[event.rows[0].visible.numel() for event in step] for step in history.steps]
    assert counts == [[length, 12, 6, 6] for length in (20, 21, 22, 23)]


def test_protected_tokens_count_for_a_budget_and_may_exceed_it():
    scorer = Fixed(values=(0.0, 0.0, 9.0, 8.0, 7.0))
    assert entering(scorer, TokenBudget({1: 4}), 10, protect=Protect(sinks=2)) == [0, 1, 2, 9]
    assert entering(scorer, TokenBudget({1: 4}), 10, protect=Protect(sinks=5)) == [0, 1, 2, 3, 4, 9]


def test_a_budget_cuts_where_its_count_falls_in_whatever_order_it_is_written():
    assert TokenBudget({0.5: 5, 1: 12, 3: 5}).cuts(4, PREFILL) == {
        1: CountKeep(1.0, tokens=12),
        2: CountKeep(1.0, tokens=5),
    }
    assert TokenBudget({0: 7}).cuts(4, DECODE) == {0: CountKeep(1.0, tokens=7)}
    with pytest.raises(ConfigError, match="rises from 5 to 12 at layer 3"):
        TokenBudget({3: 12, 1: 5}).cuts(4, PREFILL)
    with pytest.raises(ConfigError, match="two stages fall on layer 1 of 4"):
        TokenBudget({1: 5, 0.25: 4}).cuts(4, PREFILL)
    with pytest.raises(ConfigError, match="layer 4 does not exist"):
        LazyPipeline(tiny_model(), scorer=Random(), schedule=TokenBudget({4: 5}))


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_the_fraction_of_a_count_is_what_may_enter(count: int, context: int):
    keep = CountKeep(1.0, tokens=count)
    assert keep.limit(context) == min(count, context)
    assert keep.fraction(context) == pytest.approx(keep.limit(context) / context)
    assert Keep(0.3).fraction(context) == 0.3


# -- ScoreGap -------------------------------------------------------------------------------------------


def above_gap(values: list[float], floor: float, ceiling: float) -> set[int]:
    """By trying every count: the best tokens above the largest fall of the score, as many as may be; later ones first.

    The last token of the context is protected, `values` are those of the others.
    """
    context = len(values) + 1
    ranked = sorted(range(len(values)), key=lambda token: (values[token], token), reverse=True)
    least = max(1, max(1, int(floor * context + 1e-9)) - 1 if floor else 0)
    most = min(max(1, int(ceiling * context + 1e-9)) - 1, len(values))

    def fall(count: int) -> float:
        return values[ranked[count - 1]] - values[ranked[count]] if count < len(values) else 0.0

    counts = range(least, most + 1) if least < most else [max(0, most)]
    return set(ranked[: max(counts, key=lambda count: (fall(count) if count else 0.0, count))])


signed = st.lists(st.integers(-9, 9).map(float), min_size=1, max_size=12)


@given(signed, st.sampled_from([0.0, 0.1, 0.3]), st.sampled_from([0.3, 0.6, 1.0]))
def test_a_score_gap_keeps_what_stands_above_the_largest_fall(values, floor, ceiling):
    got = entering(Fixed(values=tuple(values)), ScoreGap(floor=floor, ceiling=ceiling), len(values) + 1)
    assert set(got) == above_gap(values, floor, ceiling) | {len(values)}


@given(signed, st.sampled_from([1e-150, 1e-9, 3.0, 1e150]))
def test_a_score_gap_does_not_go_by_the_scale(values, scale):
    plain, scaled = (
        entering(Fixed(values=tuple(factor * value for value in values)), ScoreGap(floor=0.0), len(values) + 1)
        for factor in (1.0, scale)
    )
    assert plain == scaled


def test_a_score_gap_lies_between_floor_and_ceiling_of_the_context():
    scorer = Fixed(values=(99.0, 50.0, 49.0, 20.0, 19.0, 18.0, 2.0, 1.0, 1.0))
    assert entering(scorer, ScoreGap(floor=0.0), 10) == [0, 9]
    assert entering(scorer, ScoreGap(floor=0.3), 10) == [0, 1, 2, 9]
    assert entering(scorer, ScoreGap(floor=0.5), 10) == [0, 1, 2, 3, 4, 5, 9]
    assert entering(scorer, ScoreGap(floor=0.5, ceiling=0.6), 10) == [0, 1, 2, 3, 4, 9]
    assert entering(scorer, ScoreGap(floor=0.5), 10, protect=Protect(sinks=3)) == [0, 1, 2, 3, 4, 5, 9]
    assert entering(scorer, ScoreGap(floor=0.8), 10, protect=Protect(sinks=3)) == [0, 1, 2, 3, 4, 5, 6, 9]


def test_without_a_gap_as_many_stay_as_may():
    equal = Fixed(values=(4.0,) * 9)
    assert len(entering(equal, ScoreGap(), 10)) == 10
    assert entering(equal, ScoreGap(ceiling=0.4), 10) == [6, 7, 8, 9]
    assert entering(Fixed(values=(3.0, 2.0, 1.0)), ScoreGap(floor=0.0), 4) == [0, 1, 3]


@pytest.mark.parametrize("schedule", [AttentionMass(share=0.5, ceiling=0.1), ScoreGap(floor=0.0, ceiling=0.1)])
def test_a_step_in_which_every_token_is_protected_or_dropped_for_good_runs(schedule):
    history = new_history(tiny_model(), scorer=SinkRecent(0), schedule=schedule, cache=DropCache())
    history.cache.mark_prompts([PromptMarks(protected=((8, 12),))])
    history.step(random_ids(1, 10))
    history.step(random_ids(1, 2))
    assert [step[1].rows[0].visible.tolist() for step in history.steps] == [[8, 9], [8, 9, 10, 11]]


# -- AttentionMass --------------------------------------------------------------------------------------

weights = st.lists(st.integers(0, 9).map(float), min_size=1, max_size=12)
shares = st.sampled_from([0.05, 0.25, 0.5, 0.75, 1.0])


def kept_mass(
    values: list[float], share: float, floor: float = 0.0, ceiling: float = 1.0, power: float = 1.0
) -> set[int]:
    """By trying every size: the smallest set of best tokens with the share, within the bounds; later tokens first.

    The last token of the context is protected, `values` are those of the others.
    """
    context = len(values) + 1
    values = [value**power for value in values]
    ranked = sorted(range(len(values)), key=lambda token: (values[token], token), reverse=True)
    smallest = next(
        size
        for size in range(1, len(values) + 1)
        if sum(values[token] for token in ranked[:size]) >= share * sum(values) - 1e-9
    )
    least = max(1, int(floor * context + 1e-9)) - 1 if floor else 0
    most = max(1, int(ceiling * context + 1e-9)) - 1
    return set(ranked[: min(max(smallest, least), most)])


@given(
    weights, shares, st.sampled_from([0.0, 0.1, 0.3]), st.sampled_from([0.3, 0.6, 1.0]), st.sampled_from([1, 1.5, 3])
)
def test_attention_mass_keeps_the_smallest_set_within_floor_and_ceiling(values, share, floor, ceiling, power):
    schedule = AttentionMass(share=share, floor=floor, ceiling=ceiling, power=power)
    got = entering(Fixed(values=tuple(values)), schedule, len(values) + 1)
    assert set(got) == kept_mass(values, share, floor, ceiling, power) | {len(values)}


@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_a_power_keeps_fewer_of_a_peaked_score_and_as_many_of_a_flat_one_at_any_scale(scale: float):
    peaked, flat = (
        Fixed(values=tuple(scale * value for value in values)) for values in ((4.0, *[1.0] * 18), (1.0,) * 19)
    )
    for power, counts in ((1.0, (9, 11)), (2.0, (3, 11)), (8.0, (2, 11))):
        schedule = AttentionMass(share=0.5, power=power)
        assert tuple(len(entering(scorer, schedule, 20)) for scorer in (peaked, flat)) == counts


@given(weights, st.floats(0.01, 1))
def test_one_token_fewer_would_not_hold_the_share(values, share):
    got = entering(Fixed(values=tuple(values)), AttentionMass(share=share), len(values) + 1)
    scores = sorted(values[token] for token in got if token < len(values))
    total = sum(values)
    assert sum(scores) >= share * total * (1 - 1e-9)
    assert len(scores) == 1 or sum(scores[1:]) < share * total


def test_equal_scores_keep_later_tokens():
    assert entering(Fixed(values=(1.0,) * 8), AttentionMass(share=0.5), 9) == [4, 5, 6, 7, 8]
    assert entering(Fixed(values=()), AttentionMass(share=0.5, floor=0.4), 10) == [6, 7, 8, 9]


def test_protected_tokens_come_on_top_of_the_share_and_count_for_the_bounds():
    scorer = Fixed(values=(9.0, 9.0, 0.0, 5.0, 3.0, 2.0, 0.0, 0.0, 0.0))
    protect = Protect(sinks=2)
    assert entering(scorer, AttentionMass(share=0.5), 10, protect=protect) == [0, 1, 3, 9]
    assert entering(scorer, AttentionMass(share=1.0, ceiling=0.5), 10, protect=protect) == [0, 1, 3, 4, 9]
    assert entering(scorer, AttentionMass(share=0.1, floor=0.6), 10, protect=protect) == [0, 1, 3, 4, 5, 9]
    assert entering(scorer, AttentionMass(share=1.0, ceiling=0.2), 10, protect=protect) == [0, 1, 9]


def test_a_share_may_keep_fewer_tokens_where_the_score_is_narrow():
    narrow, broad = Fixed(values=(100.0, *[1.0] * 18)), Fixed(values=(1.0,) * 19)
    assert len(entering(narrow, AttentionMass(share=0.5), 20)) == 2
    assert len(entering(broad, AttentionMass(share=0.5), 20)) == 11


# -- Funnel, FullBelow, PerPhase --------------------------------------------------------------------------


def test_a_funnel_has_the_cuts_of_all_its_schedules():
    funnel = Funnel((Constant(0.8), Constant(0.5, start=2), AttentionMass(0.5, ceiling=0.3, start=0.75)))
    assert {layer: keep.ratio for layer, keep in funnel.cuts(4, PREFILL).items()} == {1: 0.8, 2: 0.5, 3: 0.3}
    scorer = SinkRecent(0)
    assert [len(entering(scorer, Funnel((Constant(0.8), Constant(0.5, start=2))), 20, at)) for at in range(4)] == [
        20, 16, 10, 10,
    ]  # fmt: skip


def test_a_funnel_of_shares_takes_each_from_what_the_cut_before_left():
    scorer = Fixed(values=(8.0, 4.0, 2.0, 1.0, 1.0))
    funnel = Funnel((AttentionMass(15 / 16), AttentionMass(0.5, start=2)))
    assert entering(scorer, funnel, 6, 1) == [0, 1, 2, 4, 5]
    assert entering(scorer, funnel, 6, 2) == [0, 5]


@pytest.mark.parametrize(
    "schedules",
    [
        (Constant(0.8), Constant(0.5)),
        (Constant(0.8, start=2), AttentionMass(start=0.5)),
        (Stages({1: 0.8, 3: 0.4}), Linear(start=2)),
    ],
)
def test_two_cuts_on_one_layer_are_refused(schedules):
    with pytest.raises(ConfigError, match=r"two schedules cut before layer [123] of 4"):
        LazyPipeline(tiny_model(), scorer=Random(), schedule=Funnel(schedules))


def test_a_nested_schedule_is_held_to_the_model():
    for nested in (Funnel((Constant(0.5, start=9),)), FullBelow(5, Constant(0.5, start=9))):
        with pytest.raises(ConfigError, match="layer 9 does not exist"):
            LazyPipeline(tiny_model(), scorer=Random(), schedule=nested)
    with pytest.raises(ConfigError, match="before layer 0"):
        LazyPipeline(tiny_model(), scorer=LastTokenAttention(), schedule=PerPhase(Constant(), Constant(0.5, start=0)))


@pytest.mark.parametrize(("tokens", "kept"), [(19, 19), (20, 10), (21, 10)])
def test_full_below_runs_dense_below_the_length(tokens: int, kept: int):
    assert len(entering(Random(), FullBelow(20, Constant(0.5)), tokens)) == kept


def test_full_below_counts_the_reply_too():
    history = new_history(tiny_model(), scorer=Random(), schedule=FullBelow(20, Constant(0.5)), cache=AuxCache())
    history.step(random_ids(1, 18))
    for token in range(3):
        history.step(random_ids(1, 1, token))
    assert [step[1].rows[0].visible.numel() for step in history.steps] == [18, 19, 10, 10]


def test_per_phase_uses_each_schedule_in_its_phase():
    schedule = PerPhase(Constant(0.5, start=1), Constant(0.25, start=2))
    assert schedule.cuts(4, PREFILL) == {1: Keep(0.5)}
    assert schedule.cuts(4, DECODE) == {2: Keep(0.25)}
    history = new_history(tiny_model(), scorer=SinkRecent(0), schedule=schedule, cache=AuxCache())
    history.step(random_ids(1, 40))
    history.step(random_ids(1, 1))
    history.step(random_ids(1, 9))
    assert [[event.rows[0].visible.numel() for event in step] for step in history.steps] == [
        [40, 20, 20, 20],
        [41, 41, 10, 10],
        [50, 25, 25, 25],
    ]


# -- bounded revival ----------------------------------------------------------------------------------


class Shifting(Scorer):
    """Prefers other tokens at every layer and length."""

    def score(self, context: ScoreContext) -> torch.Tensor:
        return ((context.tokens * 7 + context.layer * 5) * context.context_tokens % 23).double()


def revived(step, row: int = 0) -> int:
    """How many older tokens a step revived, over all layers."""
    return len({token for event in step for token in event.rows[row].revived.tolist()})


@given(policies(), st.integers(0, 4), st.integers(1, 3), st.booleans(), st.sampled_from(["visible", "cached"]))
def test_a_decode_step_revives_at_most_so_many_and_only_every_so_often(chosen, most, every, shifting, attend):
    scorer = Shifting() if shifting else chosen["scorer"]
    cache = AuxCache(max_revived=most, revive_every=every, attend=attend)
    history = new_history(tiny_model(), cache=cache, **{**chosen, "scorer": scorer})
    real = torch.ones(2, 20, dtype=torch.long)
    real[1, :7] = 0
    history.step(random_ids(2, 20), real)
    for token in range(1, 7):
        history.step(random_ids(2, 1, token))
        for row in range(2):
            count = revived(history.steps[-1], row)
            assert count <= (most if token % every == 0 else 0)
            work = [event.rows[row].revived.numel() for event in history.steps[-1]]
            assert max(work) <= most


def test_the_bound_is_reached_and_the_best_tokens_are_revived():
    policy = {"scorer": Shifting(), "schedule": Stages({1: 0.5, 2: 0.3}), "cache": AuxCache(max_revived=2)}
    history = new_history(tiny_model(), **policy)
    history.step(random_ids(1, 24))
    counts = []
    for token in range(6):
        before = history.cache.rows[0].ledger.depth.clone()
        history.step(random_ids(1, 1, token))
        counts.append(revived(history.steps[-1]))
        event = history.steps[-1][1]
        length, brought = len(history.ids[0]), event.rows[0].revived.tolist()
        scores = {index: (index * 7) * length % 23 for index in range(length - 1)}
        ranked = sorted(scores, key=lambda index: (scores[index], index), reverse=True)
        reply = list(range(24, length))
        best = [index for index in ranked if index not in reply][: max(0, length // 2 - len(reply))]
        wanted = [index for index in best if before[index] <= 1]
        assert sorted(brought) == sorted(wanted[:2])
    assert max(counts) == 2


def test_without_a_bound_more_are_revived_than_with_one():
    def count(**bounds) -> int:
        history = new_history(
            tiny_model(), scorer=Shifting(), schedule=Stages({1: 0.5}), cache=AuxCache(**bounds), protect=Protect()
        )
        history.step(random_ids(1, 30))
        for token in range(4):
            history.step(random_ids(1, 1, token))
        return sum(revived(step) for step in history.steps[1:])

    assert count() > count(max_revived=3) > count(max_revived=1) > count(max_revived=0) == 0
    assert count() > count(revive_every=2) > count(revive_every=4) > count(revive_every=5) == 0


def test_protection_does_not_exceed_the_bound_after_a_crop():
    """Cropping moves the recent window back over tokens that were pruned."""
    counts = {}
    for most in (None, 0, 2):
        history = new_history(
            tiny_model(), scorer=Fixed(values=(9.0,) * 9), schedule=Constant(0.3), cache=AuxCache(max_revived=most),
            protect=Protect(recent=4, generated=False),
        )  # fmt: skip
        history.step(random_ids(1, 30))
        history.cache.crop(-8)
        history.mask, history.ids = history.mask[:, :-8], [history.ids[0][:-8]]
        history.step(random_ids(1, 1))
        counts[most] = revived(history.steps[-1])
    assert counts[None] == 3
    assert counts[0] == 0
    assert counts[2] <= 2


@pytest.mark.parametrize(("most", "count"), [(None, 16), (0, 0), (2, 0)])
def test_a_bound_step_revives_at_its_cuts_only(most: int | None, count: int):
    schedule = PerPhase(Constant(0.4, start=2), Constant(0.95, start=1))
    history = new_history(
        tiny_model(), scorer=SinkRecent(0), schedule=schedule, cache=AuxCache(max_revived=most), protect=Protect()
    )
    history.step(random_ids(1, 30))
    history.step(random_ids(1, 1))
    assert revived(history.steps[-1]) == count


def test_a_follow_up_turn_is_not_bound():
    history = new_history(
        tiny_model(), scorer=Shifting(), schedule=Stages({1: 0.4}), cache=AuxCache(max_revived=0), protect=Protect()
    )
    history.step(random_ids(1, 30))
    history.step(random_ids(1, 1))
    assert revived(history.steps[-1]) == 0
    history.step(random_ids(1, 9))
    assert revived(history.steps[-1]) > 0


# -- prompts that ask -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "counts"), [(True, [12, 4, 4]), (False, [20, 10, 10])])
def test_a_prompt_that_asks_gets_the_schedule_for_it(asked: bool, counts: list[int]):
    schedule = ByQuestion(asked=Funnel((Constant(0.6, start=0), Constant(0.2))), unasked=Constant(0.5))
    history = new_history(tiny_model(), scorer=Random(), schedule=schedule, cache=AuxCache(), protect=Protect())
    history.cache.mark_prompts([PromptMarks(asked=asked)])
    history.step(random_ids(1, 20))
    assert [layer.rows[0].visible.numel() for layer in history.steps[0]][:3] == counts


def test_the_rows_of_a_batch_ask_each_for_itself():
    schedule = ByQuestion(asked=Constant(0.2), unasked=Constant(0.5))
    history = new_history(tiny_model(), scorer=Random(), schedule=schedule, cache=AuxCache(), protect=Protect())
    history.cache.mark_prompts([PromptMarks(asked=True), PromptMarks()])
    history.step(random_ids(2, 20))
    assert [row.visible.numel() for row in history.steps[0][1].rows] == [4, 10]


@pytest.mark.parametrize(("asked", "unasked", "recent"), [(True, 9, 3), (False, 9, 9), (False, None, 3), (False, 0, 1)])
def test_more_recent_tokens_may_stay_where_nothing_is_asked(asked: bool, unasked: int | None, recent: int):
    protect = Protect(recent=3, recent_unasked=unasked)
    mask = protect.mask(torch.arange(20), 20, 20, [], asked=asked)
    assert mask.nonzero().squeeze(-1).tolist() == list(range(20 - recent, 20))


# -- cuts before layer 0 --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scorer", [LateInteraction(query=3, pool=1), LexicalOverlap(query=3, pool=1), Random()], ids=str
)
def test_scorers_without_attention_prune_before_layer_0(scorer: Scorer):
    trace = TokenTrace()
    pipe = LazyPipeline(
        tiny_model(), scorer=scorer, schedule=Constant(0.5, start=0), cache=AuxCache(max_revived=1), callbacks=[trace]
    )
    pipe.generate(random_ids(1, 20)[0], max_new_tokens=3, do_sample=False, eos_token_id=-1)
    assert [event.rows[0].computed.numel() for event in trace.steps[0]] == [10] * LAYERS


def test_a_bound_step_has_attention_wherever_it_is_scored():
    """As many stopped tokens as new ones must not look like none."""
    decode = Funnel((Constant(0.8, start=1), Constant(0.8, start=2)))
    schedule = PerPhase(Constant(7 / 8, start=2), decode)
    for seed in range(6):
        history = new_history(
            tiny_model(), scorer=LastTokenAttention(), schedule=schedule, cache=AuxCache(max_revived=1)
        )
        history.step(random_ids(1, 8, seed))
        history.step(random_ids(1, 1, seed))
        assert revived(history.steps[-1]) <= 1
