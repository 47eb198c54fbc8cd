"""A study as a page: a table to sort and filter, figures, and every item with what each cell replied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from lazyllm.errors import InputError
from lazyllm.pages.render import as_block, as_numbers, render, save

CHUNK_ITEMS = 100
"""Items that are unpacked together when one of them is looked at."""


@dataclass(frozen=True)
class Estimate:
    """A number, with its interval where it has one."""

    value: float
    low: float | None = None
    high: float | None = None


Value = Estimate | float | str | None
"""What stands in a table; None for nothing."""


@dataclass(frozen=True)
class Column:
    """A column of the table: its name, what it means, and the digits behind the point."""

    name: str
    meaning: str = ""
    digits: int = 2


@dataclass(frozen=True)
class Row:
    """One cell of the study on one task.

    Attributes:
        cell: its label.
        axes: by axis, the value it has there.
        task: name of the task.
        items: how many items.
        values: by column.
    """

    cell: str
    axes: Mapping[str, str]
    task: str
    items: int
    values: Mapping[str, Value]


@dataclass(frozen=True)
class Figure:
    """A drawing.

    Attributes:
        title: what it shows.
        svg: the drawing, trusted.
        text: the same in words.
    """

    title: str
    svg: str
    text: str


@dataclass(frozen=True)
class Reply:
    """What a cell made of an item; None for what was not measured."""

    text: str
    score: float | None = None
    loss: float | None = None
    error: str = ""


@dataclass(frozen=True)
class Item:
    """An item, and what every cell replied.

    Attributes:
        task: name of the task.
        index: its number there.
        prompt: what was asked.
        reference: the reply whose loss was measured.
        answers: replies that count as right.
        replies: by cell.
    """

    task: str
    index: int
    prompt: str
    reference: str
    answers: Sequence[str]
    replies: Mapping[str, Reply]


@dataclass(frozen=True)
class ReportData:
    """All that a report shows.

    Attributes:
        title: of the page.
        conditions: how it was measured.
        axes: by axis of the study, its values.
        columns, rows: the table.
        baseline: label of the cell that the others are compared with.
        figures: drawings.
        items: every item.
        conclusions: what follows from it; paragraphs with blank lines between them.
        command: what makes the study again.
    """

    title: str
    conditions: str
    axes: Mapping[str, Sequence[str]]
    columns: Sequence[Column]
    rows: Sequence[Row]
    baseline: str
    figures: Sequence[Figure] = ()
    items: Sequence[Item] = ()
    conclusions: str = ""
    command: str = ""

    @property
    def cells(self) -> list[str]:
        """Labels of all cells, the baseline first."""
        told = [
            self.baseline,
            *(row.cell for row in self.rows),
            *(cell for item in self.items for cell in item.replies),
        ]
        return list(dict.fromkeys(told))


def report(data: ReportData, path: str | Path, *, prompts: bool = True) -> Path:
    """Writes the page of a study; the same bytes for the same data.

    Args:
        data: what to show.
        path: the HTML file.
        prompts: whether the prompts go into it.

    Raises:
        InputError: when a row or an item names an axis, a column or a cell that there is not, or the file cannot be
            written.
    """
    _check(data)
    html = render(
        "report",
        title=data.title,
        data=_page_data(data, prompts),
        report=data,
        paragraphs=[part for part in data.conclusions.split("\n\n") if part.strip()],
        drawings=[(figure, _inline(figure, f"f{index}")) for index, figure in enumerate(data.figures)],
        blocks=list(_blocks(data, prompts)),
    )
    return save(html, path)


def _check(data: ReportData) -> None:
    """Refuses rows that the table has no place for."""
    names = [column.name for column in data.columns]
    for row in data.rows:
        if strange := sorted(row.values.keys() - set(names)):
            raise InputError(f"the row {row.cell!r} has a value for {strange[0]!r}; columns are {', '.join(names)}")
        if strange := sorted(row.axes.keys() - data.axes.keys()):
            raise InputError(f"the row {row.cell!r} has the axis {strange[0]!r}; axes are {', '.join(data.axes)}")


def _inline(figure: Figure, prefix: str) -> str:
    """The drawing with ids of its own on the page, from its `svg` element on."""
    svg = figure.svg[max(0, figure.svg.find("<svg")) :]
    for before in ('id="', 'href="#', "url(#"):
        svg = svg.replace(before, f"{before}{prefix}-")
    return svg


def _page_data(data: ReportData, prompts: bool) -> dict[str, Any]:
    """What the page's script reads at once; the rest is unpacked when it is looked at."""
    tasks = list(dict.fromkeys([*(row.task for row in data.rows), *(item.task for item in data.items)]))
    return {
        "axes": {name: list(values) for name, values in data.axes.items()},
        "columns": [asdict(column) for column in data.columns],
        "rows": [_row_data(row, data) for row in data.rows],
        "tasks": tasks,
        "cells": data.cells,
        "chunk": CHUNK_ITEMS,
        "prompts": prompts,
        "itemTasks": as_numbers([tasks.index(item.task) for item in data.items], "u2"),
        "itemNumbers": as_numbers([item.index for item in data.items], "u4"),
    }


def _row_data(row: Row, data: ReportData) -> dict[str, Any]:
    values = [row.values.get(column.name) for column in data.columns]
    return {
        "cell": row.cell,
        "axes": [row.axes.get(axis) for axis in data.axes],
        "task": row.task,
        "items": row.items,
        "values": [_value_data(value) for value in values],
    }


def _value_data(value: Value) -> Any:
    if isinstance(value, Estimate):
        return None if _finite(value.value) is None else [*map(_finite, (value.value, value.low, value.high))]
    return value if isinstance(value, str) else _finite(value)


def _finite(number: float | None) -> float | None:
    """The number, None for one that is none (a loss that could not be measured)."""
    return number if number is not None and isfinite(number) else None


def _blocks(data: ReportData, prompts: bool) -> Iterator[tuple[str, str]]:
    """Name and packed content: of each cell its scores, of each chunk of items its replies and its prompts."""
    cells = data.cells
    for number, cell in enumerate(cells):
        replies = [item.replies.get(cell) for item in data.items]
        measured = [[_finite(reply.score), _finite(reply.loss)] if reply else [None, None] for reply in replies]
        yield f"scores-{number}", as_block(measured)
    for number, start in enumerate(range(0, len(data.items), CHUNK_ITEMS)):
        items = data.items[start : start + CHUNK_ITEMS]
        yield f"replies-{number}", as_block([_item_data(item, cells) for item in items])
        if prompts:
            yield f"prompts-{number}", as_block([item.prompt for item in items])


def _item_data(item: Item, cells: Sequence[str]) -> dict[str, Any]:
    replies = [item.replies.get(cell) for cell in cells]
    return {
        "reference": item.reference,
        "answers": list(item.answers),
        "replies": [_reply_data(reply) if reply else None for reply in replies],
    }


def _reply_data(reply: Reply) -> list[Any]:
    return [reply.text, reply.error, _finite(reply.score), _finite(reply.loss)]
