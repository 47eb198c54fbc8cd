"""Several cuts, one after the other."""

from typing import Annotated

from pydantic import Field

from lazyllm.errors import ConfigError
from lazyllm.policies.base import Keep, Phase, Schedule
from lazyllm.policies.nested import AnySchedule


class Funnel(Schedule):
    """The cuts of several schedules, a generous one first and closer ones deeper.

    Attributes:
        schedules: in order of depth; no two may cut before the same layer.
    """

    schedules: Annotated[tuple[AnySchedule, ...], Field(min_length=1)]

    def cuts(self, layers: int, phase: Phase) -> dict[int, Keep]:
        """All cuts.

        Raises:
            ConfigError: when two fall on one layer.
        """
        cuts: dict[int, Keep] = {}
        for schedule in self.schedules:
            for layer, keep in schedule.cuts(layers, phase).items():
                if layer in cuts:
                    raise ConfigError(f"{self}: two schedules cut before layer {layer} of {layers}")
                cuts[layer] = keep
        return cuts
