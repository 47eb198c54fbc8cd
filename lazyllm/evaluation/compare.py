"""A method beside the unmodified model on the same items: what it gains in time and loses in quality."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lazyllm.evaluation.fidelity import token_agreement
from lazyllm.evaluation.quality import Verdict
from lazyllm.evaluation.statistics import Effect, median_effect, paired_difference, paired_p_value

UNCHANGED = Effect(0.0, 0.0, 0.0)
"""What the unmodified model is beside itself: no sample of differences, but none at all."""


def written(line: Any) -> dict[str, Any]:
    """A dataclass as plain data; in files its cell is called a contender."""
    return {"contender" if name == "cell" else name: value for name, value in asdict(line).items()}


@dataclass(frozen=True)
class Line:
    """One cell on one task.

    Attributes:
        task, cell: names.
        items: how many.
        score: mean score of the replies, None for tasks without.
        won, lost: answers with a higher score here than in the unmodified model, and the other way round.
        p_value: two-sided and exact, of no difference between the scores; None where no item differs.
        loss: mean loss of the reference per token.
        loss_change: against the unmodified model, paired by item.
        speedup: TTFT of the unmodified model over this one's, median of the items' ratios (bootstrap interval); None
            where no two times may be compared.
        agreement: share of reply tokens equal to the unmodified model's, up to the shorter reply.
        computed_fraction: layer-tokens computed in prefill, of all.
        recall: share of the evidence that has K/V at the last layer after the prefill; None for tasks without evidence,
            here and below for verdicts that did not note it.
        decode_speedup: time per output token of the unmodified model over this one's, as for the TTFT.
        memory: K/V and waiting states at the end, of the unmodified model's K/V.
        follow_up_speedup: time from a second question to its answer's first token, as for the TTFT.
    """

    task: str
    cell: str
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
    follow_up_speedup: Effect | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `written`."""
        return written(self)


def line_of(
    task: str, cell: str, mine: Sequence[Verdict], stock: Sequence[Verdict], timed: Sequence[bool] | None = None
) -> Line:
    """One cell on one task, from its verdicts and the unmodified model's on the same items.

    Args:
        task, cell: what they are called.
        mine, stock: verdicts, at least one.
        timed: for which items the times of both may be compared; all unless given.
    """
    pairs = list(zip(mine, stock, strict=True))
    together = pairs if timed is None else [pair for pair, is_timed in zip(pairs, timed, strict=True) if is_timed]
    losses = np.array([(one.loss, other.loss) for one, other in pairs])
    known = [(one.score, other.score) for one, other in pairs if one.score is not None]
    scored = np.array(known, dtype=float).reshape(-1, 2)
    won, lost = int((scored[:, 0] > scored[:, 1]).sum()), int((scored[:, 0] < scored[:, 1]).sum())
    return Line(
        task=task,
        cell=cell,
        items=len(mine),
        score=float(scored[:, 0].mean()) if known else None,
        won=won,
        lost=lost,
        p_value=paired_p_value(*scored.T) if won + lost else None,
        loss=float(losses[:, 0].mean()),
        loss_change=UNCHANGED if list(mine) == list(stock) else paired_difference(*losses.T),
        speedup=_paired_speedup([(one.ttft_seconds, other.ttft_seconds) for one, other in together]),
        agreement=float(np.mean([token_agreement(one.reply, other.reply) for one, other in pairs])),
        computed_fraction=float(np.mean([one.computed_fraction for one in mine])),
        recall=_mean([one.recall for one in mine]),
        decode_speedup=_paired_speedup([(one.step_seconds, other.step_seconds) for one, other in together]),
        memory=_mean([_ratio(one.cache_bytes, other.cache_bytes) for one, other in pairs]),
        follow_up_speedup=_paired_speedup(
            [(one.follow_up_seconds, other.follow_up_seconds) for one, other in together]
        ),
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
    return median_effect(ratios) if ratios else None


def groups(lines: Sequence[Line]) -> Iterator[tuple[str, list[Line]]]:
    """Lines by task."""
    for task in dict.fromkeys(line.task for line in lines):
        yield task, [line for line in lines if line.task == task]
