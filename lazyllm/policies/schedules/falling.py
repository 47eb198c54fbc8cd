"""Curves from one keep ratio down to another."""

from collections.abc import Callable

from lazyllm.policies.base import LayerIndex, Schedule, layer_number


def falling(
    schedule: Schedule, layers: int, *, first: float, last: float, start: LayerIndex, shape: Callable[[float], float]
) -> list[float]:
    """`1` before layer `start`, then `first + (last - first) * shape(p)`; p goes from 0 to 1 in even steps."""
    begin = layer_number(start, layers, owner=schedule)
    steps = max(1, layers - 1 - begin)
    return [1.0] * begin + [first + (last - first) * shape(step / steps) for step in range(layers - begin)]
