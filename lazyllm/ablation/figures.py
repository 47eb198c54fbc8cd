"""The figures a study asks for: measures over axes and over each other, as curves, as a map, and over a reply."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from pydantic import model_validator

from lazyllm.ablation.measures import MEASURES
from lazyllm.errors import ConfigError, unknown
from lazyllm.policies.base import Value


class Figure(Value):
    """One figure of a study, a panel per task, whatever its options.

    Attributes:
        kind: "curves" draws `y` over `x`, a curve for each value of the axis `by`; "front" adds the line of cells that
            none beats in both; "map" colours `of` over two axes; "growth" draws the share of the prompt that has been
            computed, by band of layers, over the steps of the reply, a panel per cell (Figure 7 of arXiv 2407.14057).
        x, y: axes of the study, or measures.
        by: an axis; every cell is a point of its own without one.
        of: a measure.
        title: above the figure.

    Raises:
        ConfigError: for a kind without what it shows.
    """

    kind: Literal["curves", "front", "map", "growth"] = "curves"
    x: str = "speedup"
    y: str = "score"
    by: str | None = None
    of: str = "score"
    title: str = ""

    @model_validator(mode="after")
    def _check(self) -> Figure:
        if self.kind in ("curves", "front") and self.y not in MEASURES:
            raise ConfigError(unknown("measure", self.y, MEASURES))
        if self.kind == "front" and self.x not in MEASURES:
            raise ConfigError(f"a front is drawn over a measure: {unknown('measure', self.x, MEASURES)}")
        if self.kind == "map" and self.of not in MEASURES:
            raise ConfigError(unknown("measure", self.of, MEASURES))
        return self

    def check_axes(self, titles: Iterable[str]) -> None:
        """Refuses names that are neither axes of a study nor measures.

        Raises:
            ConfigError: for one that is not.
        """
        known = set(titles)
        if self.kind == "growth":
            return
        wanted = {"map": [self.x, self.y]}.get(self.kind, [name for name in (self.x, self.by) if name])
        for name in wanted:
            allowed = known if self.kind == "map" or name == self.by else known | MEASURES.keys()
            if name not in allowed:
                raise ConfigError(f"the figure {self.title or self.kind!r}: {unknown('axis', name, allowed)}")
