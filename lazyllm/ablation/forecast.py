"""What a study will cost before it runs: units known and to do, operations, and time on a device."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lazyllm.ablation.cells import Cell, ModelRef
from lazyllm.ablation.engine import Preview
from lazyllm.config import LazyConfig
from lazyllm.costs import Device, ModelShape, predict
from lazyllm.errors import UnsupportedModelError
from lazyllm.evaluation.tasks import Item


@dataclass(frozen=True)
class Forecast:
    """One cell before it runs.

    Attributes:
        cell: its name.
        known, todo: numbers of units; what it shares with another cell is counted there.
        flops: operations of the prefills to do; None for a model whose costs are not known.
        seconds: their time, and that of the replies.
    """

    cell: str
    known: int
    todo: int
    flops: float | None
    seconds: float | None


def forecast(preview: Preview, device: Device) -> Iterator[Forecast]:
    """Every cell of a run that has not begun; prompts are taken to have the length they were asked to have."""
    done = {record.address for record in preview.records}
    todo: defaultdict[str, list[Item]] = defaultdict(list)
    stocks = {place.stock: place.cell for place in preview.work.plan.places if place.address == place.stock}
    for group in preview.groups:
        units = [(unit.address, unit.cell) for unit in group.units]
        if group.retimes:
            units.append((group.stock, stocks[group.stock]))
        for address, name in units:
            done.discard(address)
            todo[name].append(group.item)
    known = Counter(place.cell for place in preview.work.plan.places if place.address in done)
    shapes: dict[ModelRef, ModelShape | None] = {}
    for cell in preview.work.cells.values():
        items, ref = todo[cell.name], cell.setting.ref
        if items and ref not in shapes:  # only one model is held at a time
            shapes[ref] = _shape(preview, ref)
        flops, seconds = _cost(shapes.get(ref), cell, items, device)
        yield Forecast(cell.name, known[cell.name], len(items), flops, seconds)


def _shape(preview: Preview, ref: ModelRef) -> ModelShape | None:
    """None for a model whose costs are not known."""
    try:
        return ModelShape.of(preview.shelf.get(ref).model.config)
    except UnsupportedModelError:
        return None


def _cost(
    shape: ModelShape | None, cell: Cell, items: Sequence[Item], device: Device
) -> tuple[float | None, float | None]:
    """Operations and seconds; every reply is written once and read once."""
    if not items:
        return 0.0, 0.0
    if shape is None:
        return None, None
    config = cell.config or LazyConfig.preset("dense")
    prediction = predict(shape, config, device, tokens=cell.setting.tokens)
    cost = prediction.dense if cell.is_stock else prediction.pruned
    steps = sum(2 * item.new_tokens for item in items)
    return len(items) * float(cost.flops), len(items) * cost.ttft_seconds + steps * cost.seconds_per_output_token
