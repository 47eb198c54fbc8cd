"""Prefill and decode, each with a schedule of its own."""

from lazyllm.policies.base import Keep, Phase, Schedule
from lazyllm.policies.nested import AnySchedule


class PerPhase(Schedule):
    """One schedule in prefill, another in decode steps.

    Attributes:
        prefill: for steps with many new tokens.
        decode: for steps with one.
    """

    prefill: AnySchedule
    decode: AnySchedule

    def cuts(self, layers: int, phase: Phase) -> dict[int, Keep]:
        """Those of the phase's schedule."""
        return (self.prefill if phase.is_prefill else self.decode).cuts(layers, phase)
