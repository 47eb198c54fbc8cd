"""One keep ratio."""

from typing import Annotated

from pydantic import AfterValidator, Field

from lazyllm.policies.base import LayerIndex, Schedule, check_layer_index, layer_number


class Constant(Schedule):
    """The same keep ratio from layer `start` on, everything before it.

    Attributes:
        keep: keep ratio in (0, 1].
        start: first layer with that ratio, a number or a fraction of the depth; 0 prunes before the
            first layer, which only scorers that do not read attention can do.
    """

    keep: Annotated[float, Field(gt=0, le=1)] = 1.0
    start: Annotated[LayerIndex, AfterValidator(check_layer_index)] = 1

    def keep_ratios(self, layers: int) -> list[float]:
        """`1` before `start`, `keep` from there on."""
        first = layer_number(self.start, layers, owner=self)
        return [1.0] * first + [self.keep] * (layers - first)
