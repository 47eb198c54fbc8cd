"""What a cache that evicts has to say: how many tokens stay at a layer, when, and by whose scores."""

from dataclasses import dataclass
from typing import Literal

from lazyllm.policies.base import Scorer, tokens_of


@dataclass(frozen=True)
class Eviction:
    """A budget of K/V per layer.

    Attributes:
        scorer: the best tokens by its scores stay.
        budget: a number of tokens, or a share of the context.
        when: after the prefill alone, or also in decode.
        every: in decode, at every so many tokens.
    """

    scorer: Scorer
    budget: int | float
    when: Literal["prefill", "decode"]
    every: int

    def most_tokens(self, context_tokens: int) -> int:
        """How many tokens stay at each layer."""
        return self.budget if isinstance(self.budget, int) else tokens_of(self.budget, context_tokens)

    def acts(self, *, is_prefill: bool, generated: int) -> bool:
        """Whether a step evicts: a prefill, or one that adds token number `generated` of the reply."""
        return is_prefill or (self.when == "decode" and generated % self.every == 0)
