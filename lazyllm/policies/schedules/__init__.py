"""Layer keep-ratio schedules. A new one is a file here and a line in `SCHEDULES`."""

from lazyllm.policies.base import Registry, Schedule
from lazyllm.policies.schedules.attention_mass import AttentionMass
from lazyllm.policies.schedules.by_question import ByQuestion
from lazyllm.policies.schedules.constant import Constant
from lazyllm.policies.schedules.cosine import Cosine
from lazyllm.policies.schedules.full_below import FullBelow
from lazyllm.policies.schedules.funnel import Funnel
from lazyllm.policies.schedules.linear import Linear
from lazyllm.policies.schedules.per_phase import PerPhase
from lazyllm.policies.schedules.power import Power
from lazyllm.policies.schedules.pyramid import Pyramid
from lazyllm.policies.schedules.score_gap import ScoreGap
from lazyllm.policies.schedules.stages import Stages
from lazyllm.policies.schedules.token_budget import TokenBudget
from lazyllm.policies.schedules.tuned import Tuned

SCHEDULES: Registry[Schedule] = Registry(
    "schedule",
    Schedule,
    [
        Constant,
        Stages,
        Linear,
        Cosine,
        Power,
        Pyramid,
        TokenBudget,
        AttentionMass,
        ScoreGap,
        Funnel,
        FullBelow,
        PerPhase,
        ByQuestion,
        Tuned,
    ],
)

__all__ = [
    "SCHEDULES",
    "AttentionMass",
    "ByQuestion",
    "Constant",
    "Cosine",
    "FullBelow",
    "Funnel",
    "Linear",
    "PerPhase",
    "Power",
    "Pyramid",
    "ScoreGap",
    "Stages",
    "TokenBudget",
    "Tuned",
]
