"""What a search found, as a table and lines."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, floor

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from lazyllm.policies.schedules.tuned import Measured
from lazyllm.tuning.study import Outcome, Point, Target


def front_table(outcome: Outcome) -> Table:
    """The front, slowest first; the chosen point in bold, with a star."""
    first = outcome.front[0]
    table = Table(
        title=f"front of {outcome.trials} trials, chosen on {first.training.prompts} prompts, "
        f"validated on {first.validation.prompts}",
        box=SIMPLE,
        collapse_padding=True,
    )
    table.add_column("trial", justify="right", no_wrap=True)
    for column in ("speedup", "validation", "KL", "validation"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("cuts", overflow="fold")
    for point in outcome.front:
        chosen = point is outcome.chosen
        table.add_row(f"{'*' if chosen else ''}{point.number}", *_cells(point), style="bold" if chosen else None)
    table.caption = (
        "speedup: operations of a dense prefill over the pruned one's; KL: nats per token, from the dense model"
    )
    return table


def _cells(point: Point) -> tuple[str | Text, ...]:
    training, validation = point.training, point.validation
    speeds = (f"{measured.speedup:.2f}x" for measured in (training, validation))
    losses = (f"{measured.divergence:.4f}" for measured in (training, validation))
    return (*speeds, *losses, Text(point.summary))


def chosen_lines(outcome: Outcome, chosen: Point) -> Iterator[str]:
    """What was chosen, what it does on the validation prompts, and what was written."""
    yield f"chosen for {asked(outcome.target)}: trial {chosen.number}, {_figures(chosen.training)}"
    yield f"on the validation prompts: {_figures(chosen.validation)}"
    yield f"written: {' and '.join(map(str, outcome.files))}"


def warning(outcome: Outcome) -> str:
    """Said where the chosen point does not meet the target on the validation prompts."""
    return (
        f"warning: on the validation prompts the chosen trial misses {asked(outcome.target)}; it fits the training "
        "prompts better than others like them. More prompts make the choice surer, a target with room to spare safer."
    )


def missed(outcome: Outcome) -> str:
    """Said where no trial meets the target: which is nearest, and what would take it."""
    training = outcome.nearest.training
    takes = f"--max-loss {ceil(training.divergence * 1e4) / 1e4}"
    if outcome.target.speedup is not None:
        takes = f"--speedup {floor(training.speedup * 100) / 100}"
    return (
        f"none of {outcome.trials} trials reaches {asked(outcome.target)}, so nothing was written. The nearest is "
        f"trial {outcome.nearest.number}, {_figures(training)}. The same command with {takes} takes it and repeats no "
        "trial; with more --trials the search goes on"
    )


def asked(target: Target) -> str:
    """A target in words."""
    if target.speedup is not None:
        return f"a speedup of {target.speedup:g}"
    return f"a KL of at most {target.max_loss:g}"


def _figures(measured: Measured) -> str:
    return f"{measured.speedup:.2f}x at a KL of {measured.divergence:.4f}"
