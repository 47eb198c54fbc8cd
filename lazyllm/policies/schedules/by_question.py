"""Prompts that ask something, and prompts that do not, each with a schedule of its own."""

from lazyllm.policies.base import Keep, Phase, Schedule
from lazyllm.policies.nested import AnySchedule


class ByQuestion(Schedule):
    """One schedule where the prompt asks a question, another where it does not.

    A prompt asks when its text holds a question where one would stand, or when the query was named.

    Attributes:
        asked: for prompts that ask.
        unasked: for those that do not: a text to go on with, an instruction, token ids.
    """

    asked: AnySchedule
    unasked: AnySchedule

    def cuts(self, layers: int, phase: Phase) -> dict[int, Keep]:
        """Those of the schedule that the prompt gets."""
        return (self.asked if phase.asked else self.unasked).cuts(layers, phase)
