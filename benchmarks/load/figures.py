"""Figures of many requests as text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

PERCENTS = (50, 90, 99)
MEBIBYTE = 2**20


def percentiles(values: Sequence[float], percents: Sequence[float] = PERCENTS) -> list[float]:
    """So many percent of the values are at most so large; none of no values."""
    return [float(value) for value in np.percentile(values, list(percents))] if values else []


def shown(values: Sequence[float], digits: int = 2, *, factor: float = 1.0) -> str:
    """Percentiles of values, `0.31 / 0.80 / 1.20`; empty for no values."""
    return " / ".join(f"{factor * value:.{digits}f}" for value in percentiles(values))


def known(values: Sequence[float | None]) -> list[float]:
    """The values that are there."""
    return [value for value in values if value is not None]


def mebibytes(size: float) -> str:
    """Bytes as text."""
    return f"{size / MEBIBYTE:,.0f} MiB"
