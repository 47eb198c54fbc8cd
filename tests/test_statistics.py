"""Intervals cover, tests raise few false alarms, and a small sample is called small: by counting and by simulation."""

import json
import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats

from lazyllm import InputError
from lazyllm.evaluation.statistics import (
    Effect,
    compare_family,
    decide,
    detectable_difference,
    graded_mean,
    holm,
    mean_effect,
    median_effect,
    median_ratio,
    needed_pairs,
    paired_difference,
    paired_p_value,
    tango,
)

PAIRS = (20, 50, 100)
SAMPLES = 500
SHARES = [(0.05, 0.05), (0.1, 0.1), (0.05, 0.15), (0.2, 0.1), (0.3, 0.3), (0.1, 0.3)]
"""Shares of pairs that are won and lost."""
SKEWED = {
    "exponential": (lambda rng, n: rng.exponential(size=n), 1.0),
    "some losses": (lambda rng, n: rng.normal(0, 0.05, n) + (rng.random(n) < 0.25) * rng.exponential(size=n), 0.25),
    "heavy tails": (lambda rng, n: rng.lognormal(size=n) - rng.lognormal(size=n), 0.0),
    "graded": (lambda rng, n: (rng.binomial(3, 0.7, n) - rng.binomial(3, 0.7, n)) / 3, 0.0),
}  # fmt: skip
"""Differences, and their true mean."""
SIZES = {
    "quarters lost": [-0.25, -0.75],
    "quarters won and lost": [-0.75, -0.25, 0.25, 0.75],
    "all lost": [-1.0],
}
"""By how much those pairs differ that do."""

scores = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=30)
p_values = st.lists(st.floats(0, 1), max_size=12)


@cache
def outcomes(pairs: int):
    """Every way to win and lose [k, 3], and the interval [k, 2] of each."""
    counts = [(won, lost, pairs - won - lost) for won in range(pairs + 1) for lost in range(pairs + 1 - won)]
    effects = [tango(won, lost, pairs) for won, lost, _ in counts]
    return np.array(counts), np.array([(effect.low, effect.high) for effect in effects])


def chances(pairs: int, won: float, lost: float):
    return stats.multinomial.pmf(outcomes(pairs)[0], pairs, [won, lost, 1 - won - lost])


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize(("won", "lost"), SHARES)
def test_the_interval_of_paired_outcomes_covers_what_it_should(pairs: int, won: float, lost: float):
    low, high = outcomes(pairs)[1].T
    inside = (low <= won - lost) & (won - lost <= high)
    coverage = float(chances(pairs, won, lost)[inside].sum())
    assert 0.93 <= coverage <= (0.975 if pairs * (won + lost) >= 4 else 1), (
        "too wide only where hardly any pair differs"
    )


@pytest.mark.parametrize("pairs", [*PAIRS, 35])
@pytest.mark.parametrize("won", [0.0, 0.01, 0.05, 0.2])
@pytest.mark.parametrize("margin", [0.02, 0.1])
def test_what_is_worse_by_the_margin_is_rarely_called_no_worse(pairs: int, won: float, margin: float):
    low, _ = outcomes(pairs)[1].T
    assert float(chances(pairs, won, won + margin)[low > -margin].sum()) <= 0.05


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("name", SKEWED)
def test_the_interval_of_graded_differences_covers_what_it_should(name: str, pairs: int):
    draw, mean = SKEWED[name]
    rng = np.random.default_rng(pairs)
    effects = [graded_mean(draw(rng, pairs)) for _ in range(SAMPLES)]
    assert 0.93 <= np.mean([effect.low <= mean <= effect.high for effect in effects]) <= 0.98


def sparse(rng, pairs: int, share: float, sizes):
    """Scores [pairs] of a cell and of the baseline, which differ in a share of the pairs."""
    changes = rng.choice(sizes, pairs) * (rng.random(pairs) < share)
    base = np.clip(rng.choice([0.25, 0.5, 0.75, 1.0], pairs), np.maximum(0, -changes), np.minimum(1, 1 - changes))
    return (base + changes).round(12), base


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("share", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("name", SIZES)
def test_the_interval_of_graded_scores_covers_where_hardly_any_differ(name: str, share: float, pairs: int):
    rng = np.random.default_rng(pairs)
    effects = [paired_difference(*sparse(rng, pairs, share, SIZES[name])) for _ in range(SAMPLES // 2)]
    mean = share * float(np.mean(SIZES[name]))
    assert np.mean([effect.low <= mean <= effect.high for effect in effects]) >= 0.9


def test_nothing_is_added_where_all_pairs_differ_or_eight_do():
    few, more, many = np.array([0.1, 0.3, 0.2]), np.array([0.2, 0.5, 0.5]), np.arange(20) % 5 / 10
    assert paired_difference(more, few) == graded_mean(more - few)
    for differing, is_wider in ((7, True), (8, False)):
        changed = many + 0.1 * (np.arange(20) < differing)
        wide, narrow = paired_difference(changed, many), graded_mean(changed - many)
        assert (wide.high - wide.low > narrow.high - narrow.low) == is_wider


def test_pairs_that_all_differ_by_the_same_say_as_little_as_those_that_never_differ():
    base = np.array([0.25, 0.5, 1.0] * 5)
    for pairs in (3, 15):
        same, lost = (paired_difference(base[:pairs] - less, base[:pairs]) for less in (0.0, 0.2))
        assert lost.estimate == pytest.approx(-0.2)
        assert lost.high - lost.low == pytest.approx(same.high - same.low)
    (row,) = compare_family({"tracing": {"dense": base[:3], "cell": base[:3] - 0.2}}, baseline="dense")
    assert row.decision == "undecided", "three pairs decide nothing"
    assert any("all but 0 of 3 differ alike" in text for text in row.warnings)


def test_graded_scores_that_never_differ_say_as_little_as_outcomes_do():
    same = [0.25, 0.5, 0.75, 1.0] * 5
    effect = paired_difference(same, same)
    assert (effect.low, effect.estimate, effect.high) == pytest.approx((-0.152, 0, 0.152), abs=0.001)
    assert abs(effect.high - tango(0, 0, 20).high) < 0.02
    losses = [0.5, 2.0, 3.0, 4.5] * 5
    assert paired_difference(losses, losses).high == pytest.approx(4 * effect.high), (
        "values that reach four times as far"
    )
    assert detectable_difference(same, same) == pytest.approx(0.214, abs=0.001)
    assert 150 <= needed_pairs(0.02, same, same) <= 200, "as for outcomes that never differ"
    assert detectable_difference(same * 10, same * 10) == pytest.approx(0.02, abs=0.001)


@pytest.mark.parametrize("pairs", PAIRS)
def test_mcnemar_raises_few_false_alarms(pairs: int):
    counts, _ = outcomes(pairs)
    decided = {
        (won, lost): paired_p_value([1] * won + [0] * lost, [0] * won + [1] * lost) if won + lost else 1.0
        for won, lost, _ in counts.tolist()
        if won + lost <= 40
    }
    alarm = np.array([decided.get((won, lost), 1.0) <= 0.05 for won, lost, _ in counts.tolist()])
    for share in (0.02, 0.05, 0.1):
        assert 0 <= float(chances(pairs, share, share)[alarm].sum()) <= 0.05


@pytest.mark.parametrize("pairs", [8, 20, 50])
def test_flipped_signs_raise_few_false_alarms(pairs: int):
    rng = np.random.default_rng(pairs)
    found = [paired_p_value(rng.lognormal(size=pairs), rng.lognormal(size=pairs)) for _ in range(400)]
    assert 0.02 <= np.mean(np.array(found) <= 0.05) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 400)


def test_a_handful_of_differences_is_tested_exactly():
    assert paired_p_value([0.5, 0.75, 1, 0.5], [0, 0, 0, 0.5]) == 2 / 8
    assert paired_p_value([1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0]) == 2 / 64
    assert paired_p_value([0.3, 1], [0.3, 1]) == 1


@given(scores)
def test_a_comparison_turned_round_is_the_same_with_the_other_sign(mine):
    theirs = mine[::-1]
    assert paired_p_value(mine, theirs) == pytest.approx(paired_p_value(theirs, mine))
    one, other = paired_difference(mine, theirs), -paired_difference(theirs, mine)
    assert (one.estimate, one.low, one.high) == pytest.approx((other.estimate, other.low, other.high), abs=1e-6)


def test_an_interval_mirrors_its_values():
    values = np.random.default_rng(0).exponential(size=25)
    one, other = graded_mean(values), -graded_mean(-values)
    assert (one.low, one.high) == pytest.approx((other.low, other.high))
    assert one.high - one.estimate > 1.2 * (one.estimate - one.low), "longer on the side of the long tail"


def test_many_differences_are_flipped_many_times():
    assert paired_p_value(np.arange(1.0, 31), np.zeros(30)) == pytest.approx(1e-4)


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 30))
def test_the_interval_of_outcomes_holds_the_estimate_and_stays_possible(won: int, lost: int, same: int):
    effect = tango(won, lost, won + lost + same)
    assert -1 <= effect.low <= effect.estimate <= effect.high <= 1
    assert effect.low < effect.high


def test_the_interval_of_outcomes_that_never_differ_has_a_closed_form():
    effect = tango(0, 0, 100)
    reach = 1.959964**2 / (100 + 1.959964**2)
    assert (effect.low, effect.high) == pytest.approx((-reach, reach), abs=1e-6)


@pytest.mark.parametrize(("won", "lost", "pairs"), [(9, 3, 50), (1, 12, 54), (0, 4, 20)])
def test_the_ends_of_the_interval_are_where_the_score_test_turns(won: int, lost: int, pairs: int):
    """At each end the most likely shares with that difference are found by search, not by the quadratic."""
    for end in (effect := tango(won, lost, pairs)).low, effect.high:
        least = max(0.0, -end)

        def unlikely(losing: float, end: float = end) -> float:
            shares = np.array([losing + end, losing, 1 - 2 * losing - end])
            return -float(stats.multinomial.logpmf([won, lost, pairs - won - lost], pairs, shares))

        found = optimize.minimize_scalar(
            unlikely, bounds=(least, (1 - end) / 2), method="bounded", options={"xatol": 1e-10}
        )
        variance = pairs * (2 * found.x + end - end**2)
        assert abs(won - lost - pairs * end) / math.sqrt(variance) == pytest.approx(1.959964, rel=1e-4)


@given(p_values)
def test_adjusted_p_values_keep_the_order_and_only_grow(values):
    adjusted = holm(values)
    assert all(raw <= more <= 1 for raw, more in zip(values, adjusted, strict=True))
    assert sorted(range(len(values)), key=lambda at: (values[at], adjusted[at])) == sorted(
        range(len(values)), key=lambda at: (adjusted[at], values[at])
    )


def test_the_adjustment_is_holms_and_a_family_is_wrong_at_most_as_often_as_one():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    drawn = np.random.default_rng(0).random((2000, 10))
    assert np.mean([min(holm(row)) <= 0.05 for row in drawn.tolist()]) <= 0.06


@pytest.mark.parametrize("pairs", PAIRS)
def test_a_detectable_difference_is_found_in_four_of_five_samples(pairs: int):
    rng = np.random.default_rng(pairs)
    noise = rng.normal(size=(SAMPLES, pairs))
    difference = np.mean([detectable_difference(row, np.zeros(pairs)) for row in noise])
    assert 0.75 <= np.mean(stats.ttest_1samp(noise + difference, 0, axis=1).pvalue <= 0.05) <= 0.85
    assert abs(needed_pairs(difference, noise[0] / noise[0].std(ddof=1), np.zeros(pairs)) - pairs) <= 3


@given(scores, st.floats(0.01, 2), st.integers(0, 2**16))
def test_as_many_pairs_are_needed_as_find_the_difference(mine: list[float], difference: float, seed: int):
    theirs = np.random.default_rng(seed).permutation(mine)
    needed = needed_pairs(difference, mine, theirs)
    assert (needed <= len(mine)) == (detectable_difference(mine, theirs) <= difference)
    if needed > 2:
        assert needed_pairs(difference * 1.01, mine, theirs) <= needed
    with pytest.raises(InputError, match="two of them at least, not 1"):
        needed_pairs(difference, mine[:1], theirs[:1])


def test_outcomes_that_never_differ_show_only_large_differences():
    """With 20 pairs McNemar needs six that differ, all of them one way; eight come six times of ten or more."""
    same = [1.0, 0.0] * 10
    assert detectable_difference(same, same) == pytest.approx(0.392, abs=0.001)
    assert needed_pairs(0.392, same, same) in (20, 21)
    assert detectable_difference(same * 20, same * 20) == pytest.approx(0.0196, abs=0.001)
    assert math.isnan(detectable_difference([1.0], [0.0]))
    with pytest.raises(InputError, match="positive, not 0"):
        needed_pairs(0, same, same)


def test_means_medians_and_ratios():
    assert mean_effect([1, 1, 1, 0]).estimate == 0.75
    assert mean_effect([1] * 10).low == pytest.approx(0.722, abs=0.001), "Wilson's, not a point"
    assert mean_effect([0.5, 0.5]) == Effect(0.5, 0.5, 0.5)
    assert mean_effect([0.5]) == Effect(0.5, -math.inf, math.inf)
    ratio = median_ratio([4, 6, 9], [2, 2, 2])
    assert (ratio.estimate, ratio.low >= 2, ratio.high <= 4.5) == (3, True, True)
    assert math.isnan(mean_effect([]).estimate)
    assert math.isnan(median_effect([]).estimate)


def test_medians_of_times_cover_what_they_should():
    rng = np.random.default_rng(0)
    effects = [median_effect(rng.lognormal(0, 0.3, 25)) for _ in range(200)]
    assert 0.91 <= np.mean([effect.low <= 1 <= effect.high for effect in effects]) <= 0.99


def test_decisions_are_read_off_the_interval():
    assert decide(Effect(0.0, -0.01, 0.01), 0.02) == "non-inferior"
    assert decide(Effect(-0.1, -0.2, -0.03), 0.02) == "inferior"
    assert decide(Effect(0.0, -0.021, 0.05), 0.02) == "undecided"
    assert decide(Effect(-0.1, -0.2, -0.019), 0.02) == "undecided"


def family(**options):
    rng = np.random.default_rng(0)
    stock = (rng.random(400) < 0.7).astype(float).tolist()
    broken = [0.0] * 300 + stock[300:]
    graded = rng.random(30).tolist()
    values = {
        "needle": {"dense": stock, "same": stock, "broken": broken},
        "facts": {"dense": graded, "gap": [math.nan, None, *graded[2:]]},
    }
    return {(row.task, row.cell): row for row in compare_family(values, baseline="dense", **options)}


def test_a_family_says_what_is_known_and_what_is_not():
    rows = family()
    assert list(rows) == [("needle", "same"), ("needle", "broken"), ("facts", "gap")]
    same, broken, gap = rows.values()
    assert (same.decision, same.p_value, same.difference.estimate, same.warnings) == ("non-inferior", 1, 0, ())
    assert (broken.decision, broken.excluded, broken.pairs) == ("inferior", 0, 400)
    assert broken.adjusted_p_value == 3 * broken.p_value < 1e-20
    assert (gap.pairs, gap.excluded) == (28, 2)
    assert "2 of 30 pairs left out" in gap.warnings[0]
    assert json.dumps([row.to_dict() for row in rows.values()])


@pytest.mark.parametrize(("differing", "warned"), [(0, True), (7, True), (8, False)])
def test_graded_values_of_which_hardly_any_differ_draw_a_warning(differing, warned):
    graded = [0.25, 0.5, 0.75, 1.0] * 10
    cell = [*(value - 0.25 for value in graded[:differing]), *graded[differing:]]
    (row,) = compare_family({"needles": {"dense": graded, "cell": cell}}, baseline="dense")
    assert any(text.startswith(f"{differing} of 40 pairs differ") for text in row.warnings) == warned


def test_of_losses_the_lower_ones_are_better():
    rng = np.random.default_rng(0)
    losses = rng.exponential(size=60)
    values = {
        "prose": {
            "dense": losses,
            "worse": losses + 0.3 + rng.normal(0, 0.05, 60),
            "near": losses + rng.normal(0.001, 0.01, 60),
        }
    }
    worse, near = compare_family(values, baseline="dense", margin=0.05, lower_is_better=True)
    assert worse.difference.estimate == pytest.approx(0.3, abs=0.02)
    assert (worse.decision, near.decision) == ("inferior", "non-inferior")


def test_small_samples_are_called_small():
    few = {"task": {"dense": [1, 0, 1, 1, 0], "cell": [1, 0, 0, 1, 0]}}
    (row,) = compare_family(few, baseline="dense")
    assert row.decision == "undecided"
    assert row.warnings[0] == "5 pairs are too few to say anything; take 20 at least"
    assert "find differences from" in row.warnings[1]
    assert "that takes about" in row.warnings[1]
    graded = {"task": {"dense": [0.1, 0.2], "cell": [0.1, 0.21]}}
    (row,) = compare_family(graded, baseline="dense", margin=0.05)
    assert row.warnings[-1].endswith("that takes about 3"), "two pairs do not take two pairs"
    (empty,) = compare_family({"task": {"dense": [None], "cell": [1]}}, baseline="dense")
    assert (empty.pairs, empty.decision, empty.p_value) == (0, "undecided", 1)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ({"a": {"dens": [1]}}, {}, r"task 'a'.*'dense'.*Did you mean 'dens'"),
        ({"a": {"dense": [1], "x": [1, 0]}}, {}, "a value for each item.*'x': 2"),
        ({}, {"margin": -1}, "at least 0, not -1"),
        ({}, {"margin": math.nan}, "at least 0, not nan"),
    ],
)
def test_what_cannot_be_compared_is_refused(values, options, message: str):
    with pytest.raises(InputError, match=message):
        compare_family(values, baseline="dense", **options)
