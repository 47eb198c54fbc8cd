"""Ablations: a study is one file and one command, goes on after anything, and computes nothing twice."""

from lazyllm.ablation.axes import Axis, Draw, Span
from lazyllm.ablation.study import Study

__all__ = ["Axis", "Draw", "Span", "Study"]
