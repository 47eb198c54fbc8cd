"""Methods from gentle to strong, so that they can be compared at equal speed (Figure 5 of arXiv 2407.14057)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lazyllm.caches import AuxCache
from lazyllm.config import LazyConfig
from lazyllm.errors import InputError, unknown
from lazyllm.policies import AttentionMass, Funnel, Stages


def curve_points(name: str) -> dict[str, LazyConfig]:
    """The configurations of one curve, named `method@strength`.

    Raises:
        InputError: for an unknown curve.
    """
    if name not in CURVES:
        raise InputError(unknown("curve", name, CURVES))
    configure, strengths = CURVES[name]
    return {f"{name}@{strength:g}": configure(strength) for strength in strengths}


def _late_interaction(share: float) -> LazyConfig:
    """As recommended, whatever the prompt asks; the first cut takes a share 0.2 larger."""
    first = AttentionMass(share=min(1.0, share + 0.2), start=0)
    return _changed("recommended", schedule=Funnel(schedules=(first, AttentionMass(share=share, start=1))))


def _paper(keep: float) -> LazyConfig:
    """The paper's schedule with another ratio; no decode step selects, since that would take most of the time."""
    stages = Stages(stages={0.3: keep, 0.6: keep**2, 0.9: keep**3})
    return _changed("paper", schedule=stages, cache=AuxCache(decode="reuse"))


def _static_pruning(keep: float) -> LazyConfig:
    return _changed("static-pruning", schedule=Stages(stages={0.1: keep}))


def _random_drop(keep: float) -> LazyConfig:
    return _changed("random-drop", schedule=Stages(stages={0.1: keep}))


def _changed(preset: str, **policies: Any) -> LazyConfig:
    return LazyConfig(**dict(LazyConfig.preset(preset)) | policies)


_KEEPS = (0.8, 0.5, 0.3, 0.15)
CURVES: dict[str, tuple[Callable[[float], LazyConfig], tuple[float, ...]]] = {
    "late-interaction": (_late_interaction, (0.8, 0.6, 0.5, 0.4, 0.3)),
    "paper": (_paper, (0.9, 0.7, 0.5, 0.3)),
    "static-pruning": (_static_pruning, _KEEPS),
    "random-drop": (_random_drop, _KEEPS),
}
"""By method: the configuration of a strength, and the strengths of its curve."""
