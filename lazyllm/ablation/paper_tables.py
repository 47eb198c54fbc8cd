"""A study's results in the form of Tables 1 and 2 of Fu et al. 2024, arXiv 2407.14057."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

from lazyllm.evaluation.quality import Verdict
from lazyllm.evaluation.sections import Section, times
from lazyllm.evaluation.statistics import median_effect

if TYPE_CHECKING:
    from lazyllm.ablation.results import Pair, Results

SCORES = "Scores and speedups of the first token, as in Table 1 of arXiv 2407.14057"
WORK = "Prompt tokens computed by the end of the reply, and speedups of the whole reply, as in its Table 2"
MEANINGS = (
    "score: mean, in per cent; x: median of the items' ratios of time to the first token, unmodified over pruned",
    "computed: share of the prompt's layer-tokens that were computed at any step, mean, in per cent; x: median of the "
    "items' ratios of the time for as many tokens as the unmodified model replied",
)


@dataclass(frozen=True)
class PaperRow:
    """One method on one task.

    Attributes:
        task, method: names; the unmodified model's rows come first.
        score: mean, 0 to 1; None for tasks without.
        first_token: speedup of the first token; None where no two times may be compared, here and below.
        computed: share of the prompt's layer-tokens computed by the end of the reply.
        reply: speedup of the whole reply.
    """

    task: str
    method: str
    score: float | None
    first_token: float | None
    computed: float
    reply: float | None


def paper_rows(results: Results) -> Iterator[PaperRow]:
    """Every cell on every task, the unmodified model first."""
    for task, cell, pairs in results.pairs():
        yield _row(task, cell, pairs)


def paper_sections(results: Results) -> list[Section]:
    """Both tables; what is missing is a dash."""
    rows = list(paper_rows(results))
    first = [[row.task, row.method, _percent(row.score), times(row.first_token) or "-"] for row in rows]
    second = [[row.task, row.method, _percent(row.computed), times(row.reply) or "-"] for row in rows]
    return [
        Section(SCORES, f"{MEANINGS[0]}.", ["task", "method", "score", "x"], first),
        Section(WORK, f"{MEANINGS[1]}.", ["task", "method", "computed", "x"], second),
    ]


def _row(task: str, cell: str, pairs: Sequence[Pair]) -> PaperRow:
    scores = [own.score for own, _, _ in pairs if own.score is not None]
    timed = [(own, stock) for own, stock, is_timed in pairs if is_timed]
    firsts = [stock.ttft_seconds / own.ttft_seconds for own, stock in timed]
    replies = [
        theirs / mine
        for own, stock in timed
        if (mine := _reply_seconds(own, stock)) is not None and (theirs := _reply_seconds(stock, stock)) is not None
    ]
    return PaperRow(
        task=task,
        method=cell,
        score=mean(scores) if scores else None,
        first_token=median_effect(firsts).estimate if firsts else None,
        computed=mean(mean(own.growth[-1]) if own.growth else 1.0 for own, _, _ in pairs),
        reply=median_effect(replies).estimate if replies else None,
    )


def _reply_seconds(run: Verdict, stock: Verdict) -> float | None:
    """Time for as many tokens as the unmodified model replied; None where steps were not timed."""
    if run.step_seconds is None:
        return None
    return run.ttft_seconds + (len(stock.reply) - 1) * run.step_seconds


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}".removesuffix("%")
