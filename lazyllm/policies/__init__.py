"""Policies: which tokens matter (scorers), how many may enter each layer (schedules), which never leave (protect)."""

from lazyllm.policies.base import Keep, Phase, Policy, Registry, Schedule, ScoreContext, Scorer
from lazyllm.policies.protect import Protect
from lazyllm.policies.schedules import (
    SCHEDULES,
    AttentionMass,
    ByQuestion,
    Constant,
    FullBelow,
    Funnel,
    Linear,
    PerPhase,
    Stages,
)
from lazyllm.policies.scorers import (
    SCORERS,
    Blockwise,
    Combined,
    LastTokenAttention,
    LateInteraction,
    LexicalOverlap,
    Pooled,
    Random,
    SinkRecent,
    TwoHop,
    WindowAttention,
)

__all__ = [
    "SCHEDULES",
    "SCORERS",
    "AttentionMass",
    "Blockwise",
    "ByQuestion",
    "Combined",
    "Constant",
    "FullBelow",
    "Funnel",
    "Keep",
    "LastTokenAttention",
    "LateInteraction",
    "LexicalOverlap",
    "Linear",
    "PerPhase",
    "Phase",
    "Policy",
    "Pooled",
    "Protect",
    "Random",
    "Registry",
    "Schedule",
    "ScoreContext",
    "Scorer",
    "SinkRecent",
    "Stages",
    "TwoHop",
    "WindowAttention",
]
