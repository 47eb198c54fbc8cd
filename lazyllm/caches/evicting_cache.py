"""Eviction: a budget of keys and values per layer."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from lazyllm.caches.eviction import Eviction
from lazyllm.caches.policy import CachePolicy
from lazyllm.policies.base import Scorer
from lazyllm.policies.nested import AnyScorer
from lazyllm.policies.scorers import WindowAttention


class EvictingCache(CachePolicy):
    """Keeps at every layer the K/V of the best tokens, up to a budget; the others are gone there for good.

    Saves memory and the attention of decode steps, no prefill: what is pruned from the computation is the schedule's
    business, and a pruned token is forgotten as in DropCache. Each layer chooses for itself, so a token may have K/V
    at layers 0 and 2 and none at 1: law 1 holds for what is computed, not for what is stored.
    Source: Li et al. 2024, SnapKV, arXiv 2404.14469 (after the prefill, by an observation window); Zhang et al. 2023,
    H2O, arXiv 2306.14048 (in decode too, by accumulated attention); Xiao et al. 2023, StreamingLLM, arXiv 2309.17453
    (sinks and recent tokens). All heads of a layer keep the same tokens, and tokens their positions.

    Attributes:
        scorer: whose scores say which K/V stay; it may read attention, and is asked after every layer.
        budget: tokens per layer that stay, a number or a share of the context, in (0, 1]; protected ones count.
        when: "prefill" evicts once, "decode" also as the reply grows.
        every: with "decode", at every so many tokens of the reply.
    """

    revives: ClassVar[bool] = False

    attend: Literal["cached"] = "cached"
    scorer: AnyScorer = Field(default_factory=WindowAttention)
    budget: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)] = 0.5
    when: Literal["prefill", "decode"] = "prefill"
    every: Annotated[int, Field(ge=1)] = 1

    @field_validator("scorer")
    @classmethod
    def _check_scorer(cls, scorer: Scorer) -> Scorer:
        if scorer.needs_memory or scorer.needs_next or scorer.reads_layers > 1:
            raise ValueError(
                f"{type(scorer).__name__} reads more than the layer whose K/V are to be evicted; "
                "take a scorer of one layer's attention, keys or positions"
            )
        return scorer

    @property
    def eviction(self) -> Eviction:
        """The budget."""
        return Eviction(self.scorer, self.budget, self.when, self.every)
