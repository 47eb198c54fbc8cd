"""How right a reply is, from 0 to 1: one short function for each metric, written from its published definition.

Words are compared whatever their case and punctuation; each Chinese or Japanese character is a word of its own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

_CHARACTER = r"[\u3040-\u30ff\u3400-\u9fff]"
_WORD = re.compile(rf"{_CHARACTER}|(?:(?!{_CHARACTER})\w)+")
_ARTICLES = ("a", "an", "the")


def contains_any(reply: str, answers: Sequence[str]) -> float:
    """1 where one of the answers stands in the reply, else 0 (`string_match_part` of RULER, arXiv 2404.06654)."""
    said = plain(reply)
    return float(any(plain(answer) in said for answer in answers))


def contains_all(reply: str, answers: Sequence[str]) -> float:
    """Share of the answers that stand in the reply, each as whole words (`string_match_all` of RULER, 2404.06654)."""
    said = f" {plain(reply)} "
    return sum(f" {plain(answer)} " in said for answer in answers) / len(answers)


def f1(reply: str, answers: Sequence[str]) -> float:
    """F1 of the words without articles, best over the answers (SQuAD, Rajpurkar et al. 2016, arXiv 1606.05250)."""
    said = Counter(word for word in words(reply) if word not in _ARTICLES)
    return max(_f1(said, Counter(word for word in words(answer) if word not in _ARTICLES)) for answer in answers)


def _f1(said: Counter[str], wanted: Counter[str]) -> float:
    shared = (said & wanted).total()
    return 2 * shared / (said.total() + wanted.total()) if shared else 0.0


def rouge_l(reply: str, answers: Sequence[str]) -> float:
    """F-measure of the longest common subsequence of words, best over the answers (ROUGE-L, Lin 2004)."""
    said = words(reply)
    return max(_rouge_l(said, words(answer)) for answer in answers)


def _rouge_l(said: Sequence[str], wanted: Sequence[str]) -> float:
    if not said and not wanted:
        return 1.0
    return 2 * _common(said, wanted) / (len(said) + len(wanted))


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, row by row of the table of all prefixes."""
    above = [0] * (len(other) + 1)
    for word in one:
        row = [0]
        for column, theirs in enumerate(other):
            row.append(above[column] + 1 if word == theirs else max(above[column + 1], row[column]))
        above = row
    return above[-1]


def classification(reply: str, answers: Sequence[str], classes: Sequence[str]) -> float:
    """`1 / k` where the right class is among the k that the reply names, else 0 (LongBench, arXiv 2308.14508).

    Names that are part of the right one, and are not it, do not count.
    """
    named = [name for name in classes if name in reply]
    return max(_classified(named, answer) for answer in answers)


def _classified(named: Sequence[str], answer: str) -> float:
    counted = [name for name in named if name == answer or name not in answer]
    return 1 / len(counted) if answer in counted else 0.0


def retrieval(reply: str, answers: Sequence[str]) -> float:
    """Share of the numbers in the reply that are the right paragraph's (LongBench, arXiv 2308.14508)."""
    return _share_of_numbers(reply, [number for answer in answers for number in re.findall(r"\d+", answer)])


def count(reply: str, answers: Sequence[str]) -> float:
    """Share of the numbers in the reply that are the right count (LongBench, arXiv 2308.14508)."""
    return _share_of_numbers(reply, answers)


def _share_of_numbers(reply: str, right: Sequence[str]) -> float:
    numbers = re.findall(r"\d+", reply)
    return sum(number in right for number in numbers) / len(numbers) if numbers else 0.0


def code_similarity(reply: str, answers: Sequence[str]) -> float:
    """Edit similarity of the reply's first line of code, best over the answers (LongBench, arXiv 2308.14508).

    `2 m / n`, m matching characters of n in both (Ratcliff and Metzener 1988); comments and fences are no code.
    """
    lines = (line for line in reply.lstrip("\n").splitlines() if not re.search(r"`|#|//", line))
    line = next(lines, "").strip()
    return max(SequenceMatcher(None, line, answer.strip(), autojunk=False).ratio() for answer in answers)


def first_line(metric: Callable[..., float]) -> Callable[..., float]:
    """A metric that reads the first line of a reply alone, where examples would go on below."""

    def measured(reply: str, answers: Sequence[str], **options: Any) -> float:
        return metric(reply.strip().partition("\n")[0], answers, **options)

    return measured


@dataclass(frozen=True)
class Metric:
    """How replies are scored.

    Attributes:
        score: of a reply and the answers; and of all classes there are, if it `needs_classes`.
        ends: whether a reply may end once its score is 1, since more text would not lower it.
    """

    score: Callable[..., float]
    ends: bool = False
    needs_classes: bool = False


METRICS: dict[str, Metric] = {
    "contains-any": Metric(contains_any, ends=True),
    "contains-all": Metric(contains_all, ends=True),
    "f1": Metric(f1),
    "first-line-f1": Metric(first_line(f1)),
    "rouge-l": Metric(rouge_l),
    "first-line-rouge-l": Metric(first_line(rouge_l)),
    "classification": Metric(classification, needs_classes=True),
    "first-line-classification": Metric(first_line(classification), needs_classes=True),
    "retrieval": Metric(retrieval),
    "count": Metric(count),
    "code-similarity": Metric(code_similarity),
}
"""By name, for `Item.metric`."""


def plain(text: str) -> str:
    """A text in lower case with single blanks, without punctuation but hyphens."""
    return " ".join(re.sub(r"[^\w\s-]", " ", text.lower()).split())


def words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return _WORD.findall(text.lower())
