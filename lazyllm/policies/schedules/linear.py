"""A straight line."""

from typing import Annotated

from pydantic import AfterValidator, Field

from lazyllm.policies.base import LayerIndex, Schedule, check_layer_index
from lazyllm.policies.schedules.falling import falling


class Linear(Schedule):
    """Falls in a straight line from `first` at layer `start` to `last` at the last layer.

    Attributes:
        first: keep ratio at layer `start`, in (0, 1].
        last: keep ratio at the last layer, in (0, first].
        start: where the line begins, a number or a fraction of the depth; everything enters before it.
    """

    first: Annotated[float, Field(gt=0, le=1)] = 1.0
    last: Annotated[float, Field(gt=0, le=1)] = 0.3
    start: Annotated[LayerIndex, AfterValidator(check_layer_index)] = 1

    def keep_ratios(self, layers: int) -> list[float]:
        """`1` before `start`, then evenly spaced ratios."""
        return falling(self, layers, first=self.first, last=self.last, start=self.start, shape=lambda p: p)
