"""Layer keep-ratio schedules. A new one is a file here and a line in `SCHEDULES`."""

from lazyllm.policies.base import Registry, Schedule
from lazyllm.policies.schedules.attention_mass import AttentionMass
from lazyllm.policies.schedules.by_question import ByQuestion
from lazyllm.policies.schedules.constant import Constant
from lazyllm.policies.schedules.full_below import FullBelow
from lazyllm.policies.schedules.funnel import Funnel
from lazyllm.policies.schedules.linear import Linear
from lazyllm.policies.schedules.per_phase import PerPhase
from lazyllm.policies.schedules.stages import Stages

SCHEDULES: Registry[Schedule] = Registry(
    "schedule",
    Schedule,
    [
        Constant,
        Stages,
        Linear,
        AttentionMass,
        Funnel,
        FullBelow,
        PerPhase,
        ByQuestion,
    ],
)

__all__ = [
    "SCHEDULES",
    "AttentionMass",
    "ByQuestion",
    "Constant",
    "FullBelow",
    "Funnel",
    "Linear",
    "PerPhase",
    "Stages",
]
