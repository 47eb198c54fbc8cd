"""Short prompts run dense."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lazyllm.policies.base import Keep, Phase, Schedule
from lazyllm.policies.nested import AnySchedule


class FullBelow(Schedule):
    """Another schedule for contexts of `length` tokens or more; shorter ones are not pruned.

    Attributes:
        length: in tokens.
        schedule: what long contexts get.
    """

    length: Annotated[int, Field(ge=0)]
    schedule: AnySchedule

    def cuts(self, layers: int, phase: Phase) -> dict[int, Keep]:
        """Those of `schedule`, or none."""
        return self.schedule.cuts(layers, phase) if phase.context_tokens >= self.length else {}

    @classmethod
    def at_least(cls, length: int, schedule: Schedule) -> FullBelow:
        """`schedule` for contexts of `length` tokens or more; of two lengths the longer one holds."""
        if isinstance(schedule, cls):
            return cls(length=max(length, schedule.length), schedule=schedule.schedule)
        return cls(length=length, schedule=schedule)
