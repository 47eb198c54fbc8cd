"""What scorers made of scorers share: they need what their parts need."""

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lazyllm.errors import ConfigError
from lazyllm.models.attention import AttentionInputs
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
    def needs_next(self) -> bool:  # type: ignore[override]
        """Whether a part reads the next layer's attention."""
        return any(part.needs_next for part in self.parts)

    @property
    def needs_update(self) -> bool:  # type: ignore[override]
        """Whether a part reads what attention adds."""
        return any(part.needs_update for part in self.parts)

    @property
    def accumulates(self) -> bool:  # type: ignore[override]
        """Whether a part adds up over steps."""
        return any(part.accumulates for part in self.parts)

    @property
    def reads_layers(self) -> int:
        """The most that a part reads."""
        return max(part.reads_layers for part in self.parts)

    @property
    def reads_models(self) -> tuple[str | None, ...]:
        """Those of all parts."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.reads_models))

    def remembered_values(self, hidden: int) -> int:
        """Those of the part that looks back."""
        return max(part.remembered_values(hidden) for part in self.parts)

    def features(self, states: Tensor, update: Tensor | None) -> Tensor:
        """What the part remembers that looks back."""
        return self._one("needs_memory").features(states, update)

    def observe(self, attention: AttentionInputs) -> Tensor:
        """What the part adds that accumulates."""
        return self._one("accumulates").observe(attention)

    def check_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Refuses parts that cannot share what is kept, and what a part refuses."""
        for need in ("needs_memory", "accumulates"):
            if getattr(self, need):
                self._one(need)
        super().check_model(model, tokenizer)

    def _one(self, need: str) -> Scorer:
        """The part that needs it; two cannot share what is kept.

        Raises:
            ConfigError: when two parts keep different things.
        """
        found = [part for part in self.parts if getattr(part, need)]
        if len({type(part) for part in found}) > 1:
            names = " and ".join(type(part).__name__ for part in found)
            raise ConfigError(f"{names} keep different things of a token and cannot be parts of one scorer")
        return found[0]

    @property
    def reads_query(self) -> Query | None:
        """The query of the first part that has one."""
        return next((part.reads_query for part in self.parts if part.reads_query is not None), None)

    @property
    def compares(self) -> int:
        """Those of all parts."""
        return sum(part.compares for part in self.parts)
