"""Results as Markdown: tables under a line that says how they were measured."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lazyllm.config import LazyConfig, preset_names


@dataclass(frozen=True)
class Section:
    """A table, and what it takes to read it.

    Attributes:
        title: what it shows.
        conditions: how it was measured.
        columns, rows: the table as text.
        notes: what stands below it.
    """

    title: str
    conditions: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """The section as Markdown."""
        table = (self.columns, ["---"] * len(self.columns), *self.rows)
        lines = ["| " + " | ".join(map(_in_a_cell, cells)) + " |" for cells in table]
        return "\n\n".join([f"## {self.title}", self.conditions, "\n".join(lines), *self.notes]) + "\n"


def save_page(sections: Sequence[Section], path: Path) -> Path:
    """Writes sections one below the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(section.markdown() for section in sections), encoding="utf-8")
    return path


def conditions(
    model: str,
    dtype: str,
    environment: Mapping[str, Any],
    configs: Mapping[str, LazyConfig],
    *,
    tokens: str,
    baseline: str,
    measured: str,
    command: str,
) -> str:
    """The line that says what was measured, and how.

    Args:
        model, dtype: names.
        environment: `layers`, `device` and `threads` at least, as `bench.environment` tells them.
        configs: what was run beside the baseline, by name.
        tokens: how long prompts and replies were.
        baseline: what the figures are compared with.
        measured: how the figures were taken.
        command: what was called.
    """
    threads = environment["threads"]
    shipped = [name for name in configs if name.partition(" ")[0] in preset_names()]
    schedules = [f"{name}: `{config.schedule}`" for name, config in configs.items() if name not in shipped]
    if shipped:
        schedules.append(f"{', '.join(f'`{name}`' for name in shipped)} as shipped")
    said = (
        f"{model}, {environment['layers']} layers, {tokens}, {dtype}, {environment['device']}, "
        f"{threads} thread{'s' * (threads != 1)}; baseline {baseline}; {measured}; `{command}`."
    )
    return said + (f" Schedules: {'; '.join(schedules)}." if schedules else "")


def in_rounds(rounds: int) -> str:
    """How times are taken."""
    return f"{rounds} interleaved round{'s' * (rounds != 1)} after a warm-up, median (min - max)"


def length_range(lengths: Sequence[int]) -> str:
    """Shortest and longest."""
    low, high = min(lengths), max(lengths)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def bold(cells: Sequence[str]) -> list[str]:
    """A row that stands out."""
    return [f"**{cell}**" if cell else cell for cell in cells]


def times(ratio: float | None) -> str:
    """A speedup as text; empty where there is none."""
    return "" if ratio is None else f"{ratio:.2f}x"


def command_line() -> str:
    """How this program was called, with the policy by which its threads wait where one is set."""
    policy = os.environ.get("OMP_WAIT_POLICY")
    return (f"OMP_WAIT_POLICY={policy} " if policy else "") + shlex.join(["python", *sys.argv])


def _in_a_cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")
