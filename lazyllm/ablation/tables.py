"""Results as tables: for the terminal, as Markdown, and as files."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lazyllm.errors import InputError, unknown
from lazyllm.evaluation.compare import Line, groups
from lazyllm.evaluation.quality import STOCK
from lazyllm.evaluation.statistics import Effect
from lazyllm.extras import needed

if TYPE_CHECKING:
    from rich.table import Table

    from lazyllm.ablation.results import Results

COLUMNS = (
    "items",
    "TTFT speedup",
    "decode speedup",
    "computed",
    "memory",
    "evidence",
    "right",
    "won / lost",
    "p",
    "loss",
    "change of loss",
    "agreement",
)
CAPTION = (
    "speedups: medians of ratios, paired by item within one worker; computed: layer-tokens of the prefill; memory: K/V "
    "and waiting states at the end, of the unmodified model's; evidence: its share with K/V at the last layer; change "
    "of loss: per token of the right answer, paired; 95 % intervals"
)


def table(lines: Sequence[Line], title: str) -> Table:
    """A table for the terminal, a section per task."""
    from rich.table import Table

    view = Table(title=title, caption=CAPTION)
    for column in ("task", "cell"):
        view.add_column(column, no_wrap=True)
    for column in COLUMNS:
        view.add_column(column, justify="right")
    for task, group in groups(lines):
        view.add_section()
        for line in group:
            is_stock = line.cell.partition(",")[0] == STOCK
            view.add_row(task, *cells(line), style="bold" if is_stock else None)
    return view


def cells(line: Line) -> list[str]:
    """One line's name and figures."""
    return [
        line.cell,
        str(line.items),
        interval(line.speedup, "{:.1f}", "x"),
        "-" if line.decode_speedup is None else f"{line.decode_speedup.estimate:.2f}x",
        f"{line.computed_fraction:.0%}",
        "-" if line.memory is None else f"{line.memory:.0%}",
        "-" if line.recall is None else f"{line.recall:.2f}",
        "-" if line.score is None else f"{line.score:.2f}",
        f"+{line.won} -{line.lost}",
        "-" if line.p_value is None else f"{line.p_value:.2f}",
        f"{line.loss:.2f}",
        interval(line.loss_change, "{:+.2f}"),
        f"{line.agreement:.2f}",
    ]


def markdown_of(lines: Sequence[Line]) -> str:
    """Lines in Markdown."""
    head = ["task", "cell", *COLUMNS]
    rows = [[task, *cells(line)] for task, group in groups(lines) for line in group]
    shown = [[cell.replace("|", "\\|") for cell in row] for row in [head, ["---"] * len(head), *rows]]
    return "\n".join("| " + " | ".join(row) + " |" for row in shown) + "\n"


def markdown(results: Results) -> str:
    """The lines of a study in Markdown."""
    return markdown_of(results.lines())


def interval(effect: Effect | None, form: str, unit: str = "") -> str:
    """An estimate with its interval; a dash for none."""
    if effect is None:
        return "-"
    return f"{form.format(effect.estimate)}{unit} ({form.format(effect.low)} to {form.format(effect.high)})"


def _csv(results: Results) -> str:
    rows = list(results.rows())
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _json(results: Results) -> str:
    """Cells, lines and units."""
    data = {
        "name": results.plan.name,
        "notices": results.notices,
        "cells": [vars(cell) for cell in results.plan.cells.values()],
        "lines": [line.to_dict() for line in results.lines()],
        "units": list(results.rows()),
    }
    return json.dumps(_finite(data), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    """Plain data with null for numbers that JSON has no words for, such as the interval of a single item."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


TEXTS: dict[str, Callable[[Results], str]] = {"csv": _csv, "json": _json, "md": markdown}
"""By ending of a file: what it holds. CSV and Parquet have a row per unit, Markdown a line per cell and task."""
PARQUET = "parquet"


def export(results: Results, path: str | Path) -> Path:
    """Writes results to a file whose ending says how: csv, json, md or parquet.

    Raises:
        InputError: for another ending, or when the file cannot be written.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".")
    if kind not in (*TEXTS, PARQUET):
        raise InputError(unknown("format", kind, [*TEXTS, PARQUET]))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == PARQUET:
            needed("pyarrow", what="Parquet", extra="parquet")
            results.frame().to_parquet(path)
        else:
            path.write_text(TEXTS[kind](results), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror}") from None
    return path
