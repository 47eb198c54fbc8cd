"""A method beside the unmodified model on the same items: what it gains in time and loses in quality."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from lazyllm.evaluation.quality import Verdict


@dataclass(frozen=True)
class Effect:
    """A paired difference or ratio: its estimate and 95 % interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """One contender on one task.

    Attributes:
        task, contender: names.
        items: how many.
        score: share of right answers, None for tasks without.
        won, lost: answers right here and wrong in the unmodified model, and the other way round.
        p_value: two-sided sign test of won against lost.
        loss: mean loss of the reference per token.
        loss_change: against the unmodified model, paired by item (t interval).
        speedup: TTFT of the unmodified model over this one's, median of the items' ratios (bootstrap interval); None
            where no two times may be compared.
        agreement: share of reply tokens equal to the unmodified model's, up to the shorter reply.
        computed_fraction: layer-tokens computed in prefill, of all.
        recall: share of the evidence that has K/V at the last layer after the prefill; None for tasks without evidence,
            here and below for verdicts that did not note it.
        decode_speedup: time per output token of the unmodified model over this one's, as for the TTFT.
        memory: K/V and waiting states at the end, of the unmodified model's K/V.
    """

    task: str
    contender: str
    items: int
    score: float | None
    won: int
    lost: int
    p_value: float | None
    loss: float
    loss_change: Effect
    speedup: Effect | None
    agreement: float
    computed_fraction: float
    recall: float | None = None
    decode_speedup: Effect | None = None
    memory: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def line_of(
    task: str, name: str, mine: Sequence[Verdict], stock: Sequence[Verdict], timed: Sequence[bool] | None = None
) -> Line:
    """One contender on one task, from its verdicts and the unmodified model's on the same items.

    Args:
        task, name: what it is called.
        mine, stock: verdicts, at least one.
        timed: for which items the times of both may be compared; all unless given.
    """
    pairs = list(zip(mine, stock, strict=True))
    together = pairs if timed is None else [pair for pair, is_timed in zip(pairs, timed, strict=True) if is_timed]
    losses = np.array([(one.loss, other.loss) for one, other in pairs])
    scored = [(one.is_right, other.is_right) for one, other in pairs if one.is_right is not None]
    won = sum(bool(one) and not other for one, other in scored)
    lost = sum(bool(other) and not one for one, other in scored)
    return Line(
        task=task,
        contender=name,
        items=len(mine),
        score=sum(bool(one) for one, _ in scored) / len(scored) if scored else None,
        won=won,
        lost=lost,
        p_value=float(stats.binomtest(won, won + lost).pvalue) if won + lost else None,
        loss=float(losses[:, 0].mean()),
        loss_change=_mean_interval(losses[:, 0] - losses[:, 1]),
        speedup=_paired_speedup([(one.ttft_seconds, other.ttft_seconds) for one, other in together]),
        agreement=float(np.mean([_agreement(one.reply, other.reply) for one, other in pairs])),
        computed_fraction=float(np.mean([one.computed_fraction for one in mine])),
        recall=_mean([one.recall for one in mine]),
        decode_speedup=_paired_speedup([(one.step_seconds, other.step_seconds) for one, other in together]),
        memory=_mean([_ratio(one.cache_bytes, other.cache_bytes) for one, other in pairs]),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of what is known."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _paired_speedup(seconds: Sequence[tuple[float | None, float | None]]) -> Effect | None:
    """Median of the other's time over one's own, where both are known."""
    ratios = [ratio for own, other in seconds if (ratio := _ratio(other, own)) is not None]
    return _median_interval(np.array(ratios)) if ratios else None


def _mean_interval(changes: Any) -> Effect:
    """Student's t interval of the mean."""
    mean = float(np.mean(changes))
    error = float(stats.sem(changes)) if len(changes) > 1 else float("inf")
    reach = error * float(stats.t.ppf(0.975, max(1, len(changes) - 1))) if error else 0.0
    return Effect(mean, mean - reach, mean + reach)


def _median_interval(values: Any) -> Effect:
    """Percentile bootstrap interval of the median, with a fixed seed."""
    middle = float(np.median(values))
    if len(values) < 2 or np.ptp(values) == 0:
        return Effect(middle, middle, middle)
    found = stats.bootstrap((values,), np.median, n_resamples=999, method="percentile", rng=0).confidence_interval
    return Effect(middle, float(found.low), float(found.high))


def _agreement(one: Sequence[int], other: Sequence[int]) -> float:
    length = min(len(one), len(other))
    return sum(left == right for left, right in zip(one[:length], other[:length], strict=True)) / max(1, length)


def groups(lines: Sequence[Line]) -> Iterator[tuple[str, list[Line]]]:
    """Lines by task."""
    for task in dict.fromkeys(line.task for line in lines):
        yield task, [line for line in lines if line.task == task]
