"""What a sample of paired results can say: effects with intervals, exact tests, and whether it is large enough.

All intervals are two-sided at 95 %. How well each method keeps its promise is shown in docs/statistics.md. scipy is
imported on use (extra `eval`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from math import inf, isnan, nan, sqrt
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lazyllm.errors import InputError, unknown
from lazyllm.extras import needed

LEVEL = 0.05
"""Of all tests, and what intervals leave out."""
POWER = 0.8
"""With which a detectable difference is found."""
MARGIN = 0.02
"""What counts as no worse: two points of a score."""
FEW = 20
"""Below so many pairs a comparison says little, whatever it says."""
FEW_DIFFERING = 8
"""Below so many pairs that do not differ as most do, graded differences are taken to be larger than those seen."""
RESAMPLES = 999
EXACT_SIGNS = 13
"""Up to so many differences all patterns of signs are tried, above it `FLIPS` random ones."""
FLIPS = 9_999
ROUNDING = 1e-12
"""Values that differ by a smaller part are the same."""
DIGITS = 12
"""Behind the point, of differences that are the same."""

Values = NDArray[np.float64]
Decision = Literal["non-inferior", "inferior", "undecided"]


@dataclass(frozen=True)
class Effect:
    """A mean, a difference or a ratio: its estimate and 95 % interval."""

    estimate: float
    low: float
    high: float

    def __neg__(self) -> Effect:
        return Effect(-self.estimate, -self.high, -self.low)


NOTHING = Effect(nan, -inf, inf)
"""What an empty sample says."""


# -- effects -------------------------------------------------------------------------------------------


def mean_effect(values: ArrayLike) -> Effect:
    """The mean of scores [n]: Wilson's interval (1927) where all are 0 or 1, else that of `graded_mean`."""
    values = np.asarray(values, dtype=float)
    if not is_binary(values) or not values.size:
        return graded_mean(values)
    successes = int(values.sum())
    found = _scipy("stats").binomtest(successes, values.size).proportion_ci(method="wilson")
    return Effect(successes / values.size, float(found.low), float(found.high))


def paired_difference(mine: ArrayLike, theirs: ArrayLike) -> Effect:
    """The mean of `mine - theirs` [n]: Tango's interval where all are 0 or 1, else that of `graded_mean`.

    Where hardly any graded pair differs, or nearly all by the same, what has not been seen is not taken to be
    impossible: see `_unseen`.
    """
    mine, theirs = np.asarray(mine, dtype=float), np.asarray(theirs, dtype=float)
    if not is_binary(mine, theirs) or not mine.size:
        return graded_mean(mine - theirs, unseen=_unseen(mine, theirs))
    return tango(int((mine > theirs).sum()), int((mine < theirs).sum()), mine.size)


def _unseen(mine: Values, theirs: Values) -> float:
    """What is added to the squared deviations of `mine - theirs` [n] for pairs that might have differed.

    If none of many differs, it is that of one more pair won and one more lost, by as much as values can differ: by 1
    between scores from 0 to 1, by their range between others. With m that differ it is `(1 - m / 8) (1 - m / n)` of it,
    so that nothing is added from `FEW_DIFFERING` on, or where all differ. Pairs that all differ by the same say no more
    than pairs that do not differ: m counts those that do not do as most, see `_apart`.
    """
    differing = _apart(mine, theirs)
    if not mine.size or differing >= FEW_DIFFERING:
        return 0.0
    both = np.concatenate([mine, theirs])
    most = 1.0 if both.min() >= 0 and both.max() <= 1 else float(np.ptp(both))
    return 2 * most**2 * (1 - differing / FEW_DIFFERING) * (1 - differing / mine.size)


def graded_mean(values: ArrayLike, *, unseen: float = 0.0) -> Effect:
    """The mean of any numbers [n]: the interval spans Student's t and the studentised bootstrap.

    Student's t is too short on one side for skewed values, the bootstrap is too short for symmetric ones with heavy
    tails; spanning both is right for either. Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap,
    section 12.5.

    Args:
        values: the numbers.
        unseen: is added to the sum of their squared deviations.
    """
    values = np.asarray(values, dtype=float)
    if not values.size:
        return NOTHING
    mean = float(values.mean())
    if values.size == 1:
        return Effect(mean, -inf, inf)
    reach = float(_scipy("stats").t.ppf(1 - LEVEL / 2, values.size - 1))
    error = _standard_error(float(np.var(values, ddof=1)), unseen, values.size)
    if np.ptp(values) <= ROUNDING * np.abs(values).max():
        reach = reach if unseen else 0.0
        return Effect(mean, mean - error * reach, mean + error * reach)
    low, high = np.quantile(_studentised_means(values), [LEVEL / 2, 1 - LEVEL / 2])
    return Effect(mean, mean - error * max(reach, float(high)), mean + error * max(reach, -float(low)))


def _standard_error(variance: float, unseen: float, number: int) -> float:
    """Of the mean of more than one value with this variance, with `unseen` added to their squared deviations."""
    return sqrt((variance + unseen / (number - 1)) / number)


def _studentised_means(values: Values) -> Values:
    """By resample, how many of its own standard errors its mean is off; resamples of equal values tell none."""
    drawn = values[np.random.default_rng(0).integers(values.size, size=(RESAMPLES, values.size))]
    errors = drawn.std(axis=1, ddof=1) / sqrt(values.size)
    spread = errors > ROUNDING * np.abs(values).max()
    return (drawn.mean(axis=1)[spread] - values.mean()) / errors[spread]


def tango(won: int, lost: int, pairs: int) -> Effect:
    """Difference of two shares of the same `pairs`, `(won - lost) / pairs`, with the score interval.

    Source: Tango 1998, Statistics in Medicine 17, 891-908.
    """
    reach, most = float(_scipy("stats").norm.ppf(1 - LEVEL / 2)), 1 - 1e-12

    def end(side: int) -> float:
        def beyond(difference: float) -> float:
            return _tango_score(difference, won, lost, pairs) + side * reach

        crosses = beyond(-most) * beyond(most) < 0
        return float(_scipy("optimize").brentq(beyond, -most, most)) if crosses else float(side)

    return Effect((won - lost) / pairs, end(-1), end(1))


def _tango_score(difference: float, won: int, lost: int, pairs: int) -> float:
    """How many standard errors the shares are from `difference`, were it true; falls as the difference rises."""
    linear = (2 * pairs - won + lost) * difference - won - lost
    constant = -lost * difference * (1 - difference)
    root = sqrt(max(0.0, linear * linear - 8 * pairs * constant))
    # the smaller of the two ways to solve the quadratic loses its digits to cancellation
    losing = (root - linear) / (4 * pairs) if linear <= 0 else -2 * constant / (root + linear)
    variance = pairs * (2 * losing + difference * (1 - difference))
    return (won - lost - pairs * difference) / sqrt(max(variance, 1e-300))


def median_effect(values: ArrayLike) -> Effect:
    """The median of any numbers [n], with the percentile bootstrap under a fixed seed."""
    values = np.asarray(values, dtype=float)
    if not values.size:
        return NOTHING
    middle = float(np.median(values))
    if values.size == 1 or np.ptp(values) == 0:
        return Effect(middle, middle, middle)
    found = _scipy("stats").bootstrap((values,), np.median, n_resamples=RESAMPLES, method="percentile", rng=0)
    return Effect(middle, float(found.confidence_interval.low), float(found.confidence_interval.high))


def median_ratio(above: ArrayLike, below: ArrayLike) -> Effect:
    """The median of `above / below` [n], pair by pair: for times of interleaved rounds or of the same items."""
    return median_effect(np.asarray(above, dtype=float) / np.asarray(below, dtype=float))


def is_binary(*values: Values) -> bool:
    """Whether nothing but 0 and 1 stands in any of them."""
    return all(bool(np.isin(one, (0.0, 1.0)).all()) for one in values)


def _apart(mine: Values, theirs: Values) -> int:
    """How many of `mine - theirs` [n] are not the commonest one; all where no two are alike."""
    _, counts = np.unique((mine - theirs).round(DIGITS), return_counts=True)
    alike = int(counts.max(initial=0))
    return mine.size - alike if alike > 1 else mine.size


# -- tests ---------------------------------------------------------------------------------------------


def paired_p_value(mine: ArrayLike, theirs: ArrayLike, *, seed: int = 0) -> float:
    """Two-sided p-value of no difference between paired scores [n]; 1 where no pair differs.

    Outcomes of 0 and 1: McNemar's test, exact. Other scores: the signs of the differences are flipped at random, in
    every way for up to `EXACT_SIGNS` differences. Source: Fisher 1935, The Design of Experiments, section 21.
    """
    mine, theirs = np.asarray(mine, dtype=float), np.asarray(theirs, dtype=float)
    changes = (mine - theirs)[mine != theirs]
    if not changes.size:
        return 1.0
    if is_binary(mine, theirs):
        return float(_scipy("stats").binomtest(int((changes > 0).sum()), changes.size).pvalue)
    return _sign_flip_p_value(changes, seed)


def _sign_flip_p_value(changes: Values, seed: int) -> float:
    """Share of sign patterns whose sum is as far from 0; of random ones the observed pattern is one."""
    if changes.size <= EXACT_SIGNS:
        signs = np.array(list(product((-1.0, 1.0), repeat=changes.size)))
    else:
        signs = 2.0 * np.random.default_rng(seed).integers(2, size=(FLIPS + 1, changes.size)) - 1
        signs[0] = 1.0
    sums = np.abs(signs @ changes)
    return float((sums >= abs(changes.sum()) * (1 - ROUNDING)).mean())


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number, so that all of a family together are wrong at most as often as one.

    Source: Holm 1979, Scandinavian Journal of Statistics 6, 65-70.
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = least
    return adjusted


def decide(gain: Effect, margin: float) -> Decision:
    """Whether a gain is no worse than `-margin`, by the end of its interval on that side.

    The level is thus 2.5 %, one-sided. Source: ICH E9 1998, Statistical Principles for Clinical Trials, section 5.5.
    """
    if gain.low > -margin:
        return "non-inferior"
    return "inferior" if gain.high < -margin else "undecided"


# -- size ----------------------------------------------------------------------------------------------


def detectable_difference(mine: ArrayLike, theirs: ArrayLike) -> float:
    """The smallest true difference that a two-sided paired test at 5 % finds in 80 % of samples like this one.

    `(t_.975 + t_.8) s / sqrt(n)` for differences of deviation s; where hardly any pair differs s is that of
    `paired_difference`. Outcomes of 0 and 1 are told apart only by the pairs that differ, of which there are at least
    as many as the difference says: see `_detectable_share`.
    NaN for fewer than two pairs.
    """
    mine, theirs = np.asarray(mine, dtype=float), np.asarray(theirs, dtype=float)
    return _detectable(mine, theirs)(mine.size) if mine.size > 1 else nan


def needed_pairs(difference: float, mine: ArrayLike, theirs: ArrayLike) -> int:
    """The smallest number of pairs like these by which `detectable_difference` is at most `difference`.

    Raises:
        InputError: for a difference that is not positive, or fewer than two pairs.
    """
    if not difference > 0:
        raise InputError(f"a difference to be found is positive, not {difference}")
    mine, theirs = np.asarray(mine, dtype=float), np.asarray(theirs, dtype=float)
    if mine.size < 2:
        raise InputError(f"what pairs are like is told by two of them at least, not {mine.size}")
    detectable, most = _detectable(mine, theirs), 2
    while detectable(most) > difference:
        most *= 2
    return 2 + bisect_left(range(2, most), True, key=lambda pairs: detectable(pairs) <= difference)


def _detectable(mine: Values, theirs: Values) -> Callable[[int], float]:
    """By number of pairs, the smallest difference that so many find, if they are like these."""
    if is_binary(mine, theirs):
        return partial(_detectable_share, float((mine != theirs).mean()))
    return partial(_detectable_mean, float(np.var(mine - theirs, ddof=1)), _unseen(mine, theirs))


def _detectable_mean(variance: float, unseen: float, pairs: int) -> float:
    """Of two means when differences have this variance, with `unseen` added to their squared deviations."""
    reach = _scipy("stats").t.ppf([1 - LEVEL / 2, POWER], pairs - 1).sum()
    return float(reach * _standard_error(variance, unseen, pairs))


def _detectable_share(differing: float, pairs: int) -> float:
    """Of two shares when a part `differing` of the pairs differ: `c sqrt(max(differing, difference) / n)`, solved."""
    reach = _normal_reach() / sqrt(pairs)
    return min(1.0, max(reach * sqrt(differing), reach**2))


def _normal_reach() -> float:
    """`z_.975 + z_.8`."""
    return float(_scipy("stats").norm.ppf([1 - LEVEL / 2, POWER]).sum())


# -- families ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paired:
    """Values of a cell and of the baseline on the same items of a task; None or NaN where one is missing.

    Attributes:
        task, cell: names.
        mine, theirs: the cell's values and the baseline's, in the same order of items.
        lower_is_better: for losses and times.
    """

    task: str
    cell: str
    mine: Sequence[float | None]
    theirs: Sequence[float | None]
    lower_is_better: bool = False


@dataclass(frozen=True)
class Comparison:
    """One cell against the baseline on one task.

    Attributes:
        task, cell: names.
        pairs: how many items both have a value for.
        excluded: how many were left out, since a value is missing or NaN.
        baseline, mean: the two means over the pairs.
        difference: the cell's minus the baseline's, in the values' own unit.
        p_value: of no difference; `adjusted_p_value`: the same after Holm over the whole family.
        decision: whether the cell is no worse than the baseline by more than `margin`.
        margin: in the values' own unit.
        detectable: the smallest true difference that so many pairs find in 80 % of samples.
        warnings: what to know before one believes it.
    """

    task: str
    cell: str
    pairs: int
    excluded: int
    baseline: Effect
    mean: Effect
    difference: Effect
    p_value: float
    adjusted_p_value: float
    decision: Decision
    margin: float
    detectable: float
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def compare_family(
    values: Mapping[str, Mapping[str, Sequence[float | None]]],
    *,
    baseline: str,
    margin: float = MARGIN,
    lower_is_better: bool = False,
    seed: int = 0,
) -> list[Comparison]:
    """Every cell against the baseline on every task, as one family of tests.

    Args:
        values: by task and cell, a value per item, in the same order of items for all cells of a task.
        baseline: the cell that all others are compared with.
        margin: by how much a cell may be worse and still count as no worse.
        lower_is_better: for losses and times.
        seed: of tests that draw at random.

    Raises:
        InputError: when a task lacks the baseline, its cells differ in length, or the margin is negative.
    """
    return compare_pairs(
        [
            Paired(task, cell, mine, cells[baseline], lower_is_better)
            for task, cells in _checked(values, baseline)
            for cell, mine in cells.items()
            if cell != baseline
        ],
        margin=margin,
        seed=seed,
    )


def compare_pairs(pairs: Iterable[Paired], *, margin: float = MARGIN, seed: int = 0) -> list[Comparison]:
    """As `compare_family`, of values that are paired already; of some less may be better, of others more.

    Raises:
        InputError: for a negative margin.
    """
    if not margin >= 0:
        raise InputError(f"a margin is at least 0, not {margin}")
    found = [_compared(one, margin, seed) for one in pairs]
    adjusted = holm([one.p_value for one in found])
    return [replace(one, adjusted_p_value=value) for one, value in zip(found, adjusted, strict=True)]


def _checked(
    values: Mapping[str, Mapping[str, Sequence[float | None]]], baseline: str
) -> Iterator[tuple[str, Mapping[str, Sequence[float | None]]]]:
    for task, cells in values.items():
        if baseline not in cells:
            raise InputError(f"task {task!r}: " + unknown("baseline", baseline, cells))
        lengths = {cell: len(own) for cell, own in cells.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"task {task!r}: all cells need a value for each item, but they have {lengths}")
        yield task, cells


def _compared(pair: Paired, margin: float, seed: int) -> Comparison:
    both = zip(pair.mine, pair.theirs, strict=True)
    own, base = np.array([one for one in both if not _is_missing(*one)], dtype=float).reshape(-1, 2).T
    difference, excluded = paired_difference(own, base), len(pair.mine) - own.size
    detectable = detectable_difference(own, base)
    return Comparison(
        task=pair.task,
        cell=pair.cell,
        pairs=own.size,
        excluded=excluded,
        baseline=mean_effect(base),
        mean=mean_effect(own),
        difference=difference,
        p_value=(p_value := paired_p_value(own, base, seed=seed)),
        adjusted_p_value=p_value,
        decision=decide(-difference if pair.lower_is_better else difference, margin),
        margin=margin,
        detectable=detectable,
        warnings=tuple(_warnings(own, base, excluded, margin, detectable)),
    )


def _is_missing(*values: float | None) -> bool:
    return any(value is None or isnan(value) for value in values)


def _warnings(mine: Values, theirs: Values, excluded: int, margin: float, detectable: float) -> Iterator[str]:
    pairs = mine.size
    if excluded:
        yield f"{excluded} of {pairs + excluded} pairs left out: a value is missing"
    if pairs < FEW:
        yield f"{pairs} pairs are too few to say anything; take {FEW} at least"
    differing, apart = int((mine != theirs).sum()), _apart(mine, theirs)
    if apart < min(pairs, FEW_DIFFERING) and not is_binary(mine, theirs):
        alike = (
            f"{differing} of {pairs} pairs differ" if apart == differing else f"all but {apart} of {pairs} differ alike"
        )
        yield f"{alike}; below {FEW_DIFFERING} the interval of graded values rests on how far they can differ"
    if pairs > 1 and detectable > margin > 0:
        yield (
            f"{pairs} pairs find differences from {detectable:.2g} on, not the margin of {margin:.2g}; "
            f"that takes about {needed_pairs(margin, mine, theirs):,}"
        )


def _scipy(part: str) -> Any:
    """A part of scipy, which is imported on use."""
    return needed(f"scipy.{part}", what="a comparison of results", extra="eval")
