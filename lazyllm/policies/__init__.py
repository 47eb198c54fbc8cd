"""Policies: which tokens matter (scorers), how many may enter each layer (schedules), which never leave (protect)."""

from lazyllm.policies.base import Policy, Registry, Schedule, ScoreContext, Scorer
from lazyllm.policies.protect import Protect
from lazyllm.policies.schedules import SCHEDULES, Constant, Linear, Stages
from lazyllm.policies.scorers import SCORERS, LastTokenAttention, Random, SinkRecent, WindowAttention

__all__ = [
    "SCHEDULES",
    "SCORERS",
    "Constant",
    "LastTokenAttention",
    "Linear",
    "Policy",
    "Protect",
    "Random",
    "Registry",
    "Schedule",
    "ScoreContext",
    "Scorer",
    "SinkRecent",
    "Stages",
    "WindowAttention",
]
