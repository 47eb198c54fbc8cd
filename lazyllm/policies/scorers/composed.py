"""What scorers made of scorers share: they need what their parts need."""

from lazyllm.policies.base import Scorer
from lazyllm.policies.query import Query


class ComposedScorer(Scorer):
    """Base of scorers that rework the scores of others; subclasses say which in `parts`."""

    @property
    def parts(self) -> tuple[Scorer, ...]:
        """The scorers it is made of."""
        raise NotImplementedError

    @property
    def needs_attention(self) -> bool:  # type: ignore[override]
        """Whether a part reads attention."""
        return any(part.needs_attention for part in self.parts)

    @property
    def needs_memory(self) -> bool:  # type: ignore[override]
        """Whether a part looks back at states."""
        return any(part.needs_memory for part in self.parts)

    @property
    def reads_query(self) -> Query | None:
        """The query of the first part that has one."""
        return next((part.reads_query for part in self.parts if part.reads_query is not None), None)

    @property
    def compares(self) -> int:
        """Those of all parts."""
        return sum(part.compares for part in self.parts)
