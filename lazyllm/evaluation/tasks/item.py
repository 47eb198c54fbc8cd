"""One prompt with what is known about its answer."""

from __future__ import annotations

from dataclasses import dataclass

from lazyllm.errors import InputError, unknown
from lazyllm.evaluation.metrics import METRICS
from lazyllm.prompts import Prompt


@dataclass(frozen=True)
class Item:
    """One prompt of a task.

    Attributes:
        task: name of the task.
        prompt: text, or chat messages.
        reference: the right answer as it would be written after the prompt.
        answers: what `metric` looks for in the reply; () for tasks that have no right answer.
        evidence: passages of the prompt that the answer needs; with a second turn, those of the second answer.
        new_tokens: how long a reply may be.
        follow_up: a question of a second turn on the same cache; reference and answers are then those of that turn.
        said: how the reply begins, whoever writes it; reference and answers are those of what comes after.
        metric: how a reply is scored, a name of `METRICS`.
        classes: all answers there are, for metrics that ask.
        waits: whether what stands before the question is loaded before the question is known.
    """

    task: str
    prompt: Prompt
    reference: str
    answers: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()
    new_tokens: int = 16
    follow_up: str = ""
    said: str = ""
    metric: str = "contains-any"
    classes: tuple[str, ...] = ()
    waits: bool = False

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise InputError(unknown("metric", self.metric, METRICS))
        if METRICS[self.metric].needs_classes and not self.classes:
            raise InputError(f"metric {self.metric!r} needs the classes that there are; got none")

    def score(self, reply: str) -> float:
        """How right a reply is, from 0 to 1; 0 for tasks that have no right answer."""
        metric = METRICS[self.metric]
        options = {"classes": self.classes} if metric.needs_classes else {}
        return metric.score(reply, self.answers, **options) if self.answers else 0.0

    def is_right(self, reply: str) -> bool:
        """Whether a reply has the full score."""
        return self.score(reply) == 1

    def is_done(self, reply: str) -> bool:
        """Whether a reply may end here: it is right, and would be with any more text."""
        return METRICS[self.metric].ends and self.is_right(reply)
