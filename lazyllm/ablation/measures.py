"""What a figure can show of a line, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lazyllm.evaluation.compare import Line
from lazyllm.evaluation.statistics import Effect


@dataclass(frozen=True)
class Measure:
    """A number of a line.

    Attributes:
        title: what an axis is called that shows it.
        read: its estimate and interval; None where the line has none.
        form: how a number is written.
        is_better_high: whether more of it is better.
        neutral: the unmodified model's, where it is the same in every study.
    """

    title: str
    read: Callable[[Line], Effect | None]
    form: str = "{:.2f}"
    is_better_high: bool = True
    neutral: float | None = None

    def value(self, line: Line) -> float | None:
        """Its estimate."""
        effect = self.read(line)
        return None if effect is None else effect.estimate


def _plain(name: str) -> Callable[[Line], Effect | None]:
    """Reads a field that is a number without an interval."""

    def read(line: Line) -> Effect | None:
        value = getattr(line, name)
        return None if value is None else Effect(value, value, value)

    return read


def _effect(name: str) -> Callable[[Line], Effect | None]:
    return lambda line: getattr(line, name)


MEASURES: dict[str, Measure] = {
    "score": Measure("score", _plain("score")),
    "loss": Measure("loss per answer token", _plain("loss"), is_better_high=False),
    "loss_change": Measure("change of loss per answer token", _effect("loss_change"), "{:+.2f}", False, 0.0),
    "speedup": Measure("TTFT speedup", _effect("speedup"), "{:.1f}x", neutral=1.0),
    "decode_speedup": Measure("speedup per output token", _effect("decode_speedup"), "{:.2f}x", neutral=1.0),
    "computed_fraction": Measure("share computed in prefill", _plain("computed_fraction"), is_better_high=False),
    "memory": Measure("memory, of the unmodified model's", _plain("memory"), is_better_high=False, neutral=1.0),
    "recall": Measure("evidence kept", _plain("recall"), neutral=1.0),
    "agreement": Measure("agreement with the unmodified reply", _plain("agreement"), neutral=1.0),
}
"""By name: what is shown, and how."""
