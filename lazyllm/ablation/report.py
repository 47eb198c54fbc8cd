"""A study's results as what a page shows."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from lazyllm.ablation import figures
from lazyllm.ablation.drawing import svg_of
from lazyllm.ablation.engine import folder_of
from lazyllm.ablation.measures import MEASURES
from lazyllm.ablation.plan import CellFacts, Place
from lazyllm.ablation.results import Results
from lazyllm.ablation.store import STUDY
from lazyllm.ablation.study import Study
from lazyllm.ablation.units import versions
from lazyllm.ablation.words import in_words
from lazyllm.evaluation.compare import Line
from lazyllm.evaluation.quality import STOCK
from lazyllm.pages.report import Column, Estimate, Figure, Item, Reply, ReportData, Row, Value

EXTRA = {"won": "answers with a higher score than the unmodified model's", "lost": "answers with a lower one"}
"""Columns that are no measures, and what they mean."""


def report_data(results: Results, study: Study, folder: Path | None = None, *, items: bool = True) -> ReportData:
    """Table, figures, and every item with its replies.

    Args:
        results: what the study found.
        study: the figures it names, its conclusions, and what it was.
        folder: of the results, where it is not the study's own.
        items: whether items and replies go into it, besides what they come to.
    """
    lines, cells = results.lines(), results.plan.cells
    can_draw = any(not cells[line.cell].is_stock for line in lines)
    return ReportData(
        title=study.name,
        conditions=_conditions(results, lines),
        axes=_axes(results),
        columns=_columns(),
        rows=[_row(line, cells[line.cell]) for line in lines],
        baseline=STOCK,
        figures=[_figure(results, figure) for figure in study.figures] if can_draw else [],
        items=list(_items(results)) if items else [],
        conclusions=study.conclusions,
        command=_command(study, folder),
    )


def _axes(results: Results) -> dict[str, list[str]]:
    """By axis, the labels that cells have on it."""
    axes: dict[str, dict[str, None]] = {}
    for title, label in chain.from_iterable(cell.labels.items() for cell in results.plan.cells.values()):
        axes.setdefault(title, {})[label] = None
    return {title: list(labels) for title, labels in axes.items()}


def _row(line: Line, cell: CellFacts) -> Row:
    return Row(line.cell, cell.labels, line.task, line.items, _values(line))


def _figure(results: Results, figure: figures.Figure) -> Figure:
    return Figure(figure.title or figure.kind, svg_of(results, figure), in_words(results, figure))


def _command(study: Study, folder: Path | None) -> str:
    """What goes on with the results in a folder, however they were begun: each holds its study."""
    own = folder_of(study, None)
    folder = folder or own
    elsewhere = [] if folder == own else ["--out", str(folder)]
    return shlex.join(["lazyllm", "ablate", str(folder / STUDY), *elsewhere])


def _conditions(results: Results, lines: list[Line]) -> str:
    """What was run under which settings, and what the numbers are."""
    counts = sorted({line.items for line in lines}) or [0]
    items = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    model = ", ".join(filter(None, (_told(results, name) for name in ("model", "dtype", "weights", "device"))))
    tokens, question, seed = (_told(results, name) for name in ("tokens", "question", "seed"))
    _, own, torch, transformers = versions()
    return (
        f"{model}, {tokens} tokens, question {question}, seed {seed}: {_tasks(results)}; "
        f"{items} items with results per row, paired with the unmodified model's; 95 % intervals; "
        f"lazyllm {own}, torch {torch}, transformers {transformers}."
    )


def _told(results: Results, name: str) -> str:
    """All that a field of the settings is in the cells of a study."""
    values = (cell.setting[name] for cell in results.plan.cells.values())
    return " and ".join(dict.fromkeys(str(value) for value in values if value is not None))


def _tasks(results: Results) -> str:
    """How many items of each task there are."""
    counts: dict[str, int] = {}
    for place in results.plan.places:
        counts[place.task] = max(counts.get(place.task, 0), place.index + 1)
    return ", ".join(f"{count} x {task}" for task, count in counts.items())


def _columns() -> list[Column]:
    measures = [Column(_name(name), measure.title) for name, measure in MEASURES.items()]
    return [*measures, *(Column(name, meaning, digits=0) for name, meaning in EXTRA.items())]


def _name(measure: str) -> str:
    return measure.replace("_", " ")


def _values(line: Line) -> dict[str, Value]:
    found: dict[str, Value] = {name: float(getattr(line, name)) for name in EXTRA}
    for name, measure in MEASURES.items():
        effect = measure.read(line)
        if effect is not None:
            has_interval = effect.low != effect.high
            found[_name(name)] = Estimate(effect.estimate, effect.low, effect.high) if has_interval else effect.estimate
    return found


def _items(results: Results) -> Iterator[Item]:
    """Every item once a task and setting, with what each cell replied, the unmodified model of that setting first."""
    shelves: dict[tuple[str, str, str], list[Place]] = {}
    for place in results.plan.places:
        shelves.setdefault((place.task, place.item, place.stock), []).append(place)
    numbers: dict[str, int] = {}
    for (task, item, _), places in shelves.items():
        numbers[task] = numbers.get(task, -1) + 1
        content = results.items.get(item, {})
        named = [(STOCK, place) for place in places if place.address == place.stock][:1]
        named += [(place.cell, place) for place in places]
        replies = {name: reply for name, place in named if (reply := _reply(results, place)) is not None}
        yield Item(
            task=task,
            index=numbers[task],
            prompt=_as_text(content.get("prompt", "")),
            reference=str(content.get("reference", "")),
            answers=list(content.get("answers", ())),
            replies=replies,
        )


def _reply(results: Results, place: Place) -> Reply | None:
    record, verdict = results.record(place), results.verdict(place)
    if verdict is not None:
        return Reply(verdict.text, verdict.score, verdict.loss)
    return None if record is None else Reply("", error=record.error or "")


def _as_text(prompt: Any) -> str:
    """A prompt as it can be read: text, or the turns of a chat."""
    if isinstance(prompt, str):
        return prompt
    turns = [turn for turn in prompt if isinstance(turn, Mapping)]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
