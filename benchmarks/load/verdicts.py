"""What answers are worth: whether each is one that its request may get, and whether two of them say the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from .client import Outcome

ENDS = ("stop", "length")
ERROR_KEYS = {"message", "type", "param", "code"}
SHOWN = 30
"""How many characters of replies are shown where they begin to differ."""


class Verdict(StrEnum):
    """How a request came out."""

    ANSWERED = "answered"
    REFUSED = "refused"
    LEFT = "left"
    WRONG = "wrong"


def judge(outcome: Outcome) -> tuple[Verdict, str]:
    """How a request came out; where that is wrong, why."""
    if outcome.trouble is not None:
        return Verdict.WRONG, outcome.trouble
    if outcome.ask.fault is not None:
        return _refused(outcome, outcome.ask.fault.status, outcome.ask.fault.code)
    if outcome.left:
        wrong = outcome.error is not None or outcome.status not in (None, 200)
        return (Verdict.WRONG, f"status {outcome.status} for a client that left") if wrong else (Verdict.LEFT, "")
    if outcome.status == 429:
        return _refused(outcome, 429, "queue_full")
    wrong_with_it = next(_wrong(outcome), None)
    return (Verdict.ANSWERED, "") if wrong_with_it is None else (Verdict.WRONG, wrong_with_it)


def _refused(outcome: Outcome, status: int, code: str) -> tuple[Verdict, str]:
    """A request that is to be refused, in OpenAI's shape."""
    error = outcome.error or {}
    told = outcome.status, error.get("code")
    if told != (status, code):
        return Verdict.WRONG, f"answered with {told}, not {(status, code)}"
    if set(error) != ERROR_KEYS:
        return Verdict.WRONG, f"the error has {sorted(error)}, not {sorted(ERROR_KEYS)}"
    if status == 429 and outcome.retry_after is None:
        return Verdict.WRONG, "told to come again, but not when"
    return Verdict.REFUSED, ""


def _wrong(outcome: Outcome) -> Iterator[str]:
    """All that is wrong with an answer."""
    ask = outcome.ask
    if outcome.status != 200 or outcome.error is not None:
        yield f"status {outcome.status}, error {outcome.error}"
    if sorted(outcome.reasons) != list(range(ask.replies)):
        yield f"replies {sorted(outcome.reasons)} came to their end, of {ask.replies}"
    if not outcome.done:
        yield "the stream has no end"
    if strange := [reason for reason in outcome.reasons.values() if reason not in ENDS]:
        yield f"a reply ended by {strange[0]!r}"
    for stop in ask.options.get("stop", ()):
        if any(stop in text for text in outcome.texts.values()):
            yield f"a reply has the stop string {stop!r}"
    if not 1 <= outcome.reply_tokens <= ask.replies * ask.options["max_tokens"]:
        yield f"{outcome.reply_tokens} tokens of {ask.replies} replies of at most {ask.options['max_tokens']}"


@dataclass(frozen=True)
class Comparison:
    """Replies to the same requests.

    Attributes:
        kind: of requests.
        total, equal: how many were compared, and said the same.
        differences: of the others, where they begin to differ.
    """

    kind: str
    total: int
    equal: int
    differences: tuple[str, ...]


def compare(kind: str, first: Sequence[Outcome], second: Sequence[Outcome]) -> Comparison:
    """Whether requests of a kind got the same replies twice."""
    pairs = [(one, other) for one, other in zip(first, second, strict=True) if one.ask.kind == kind]
    different = [difference(one, other) for one, other in pairs if one.texts != other.texts]
    return Comparison(kind, len(pairs), len(pairs) - len(different), tuple(different))


def difference(one: Outcome, other: Outcome) -> str:
    """Where two answers begin to differ, and what they say there."""
    reply = next((index for index in one.texts if one.texts[index] != other.texts.get(index)), 0)
    first, second = one.texts.get(reply, ""), other.texts.get(reply, "")
    same = next(
        (at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(map(len, (first, second)))
    )
    here, there = (repr(text[same : same + SHOWN]) for text in (first, second))
    model = one.ask.options["model"]
    told = "" if other.trouble is None else f" ({other.trouble})"
    kept = f"{one.cached_tokens} of {one.usage.get('prompt_tokens', 0)} tokens kept"
    return f"{one.ask.kind}, {model}, {kept}: after {same} characters {here} under load, {there} alone{told}"
