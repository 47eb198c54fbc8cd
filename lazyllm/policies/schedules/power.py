"""A straight line, bent."""

from typing import Annotated

from pydantic import AfterValidator, Field

from lazyllm.policies.base import LayerIndex, Schedule, check_layer_index
from lazyllm.policies.schedules.falling import falling


class Power(Schedule):
    """Falls from `first` at layer `start` to `last` at the last layer, early or late.

    `r_l = first + (last - first) * p ** exponent`, where p goes from 0 at `start` to 1 at the last layer.

    Attributes:
        first: keep ratio at layer `start`, in (0, 1].
        last: keep ratio at the last layer, in (0, first].
        start: where the curve begins, a number or a fraction of the depth; everything enters before it.
        exponent: below 1 it falls early, which saves more; above 1 late; 1 is `Linear`.
    """

    first: Annotated[float, Field(gt=0, le=1)] = 1.0
    last: Annotated[float, Field(gt=0, le=1)] = 0.3
    start: Annotated[LayerIndex, AfterValidator(check_layer_index)] = 1
    exponent: Annotated[float, Field(gt=0)] = 0.5

    def keep_ratios(self, layers: int) -> list[float]:
        """`1` before `start`, then the curve."""
        bend = self.exponent
        return falling(self, layers, first=self.first, last=self.last, start=self.start, shape=lambda p: p**bend)
