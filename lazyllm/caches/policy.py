"""What a cache policy decides: what happens to a pruned token, and what is attended."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lazyllm.caches.eviction import Eviction
from lazyllm.caches.frontier import FrontierStore
from lazyllm.caches.store import KeyValueStore
from lazyllm.errors import ConfigError
from lazyllm.policies.base import LayerIndex, Policy


@dataclass(frozen=True)
class Retreat:
    """A bound on tokens with K/V deep in the model: those used longest ago go back to where they enter `layer`.

    Attributes:
        most_tokens: how many tokens may be deeper than `layer`.
        layer: the layer they go back to, a number or a fraction of the depth.
        sinks: tokens at the start that stay.
    """

    most_tokens: int
    layer: LayerIndex
    sinks: int


class CachePolicy(Policy):
    """Base of cache policies. Subclasses set the class flags, or return stores of their own.

    Attributes:
        attend: "visible" attends to the tokens selected in this step (the paper); "cached" to every
            token that has K/V at the layer.
        prunes: whether tokens are pruned at all.
        revives: whether a pruned token's frontier is kept, so that it can be taken up again.
    """

    prunes: ClassVar[bool] = True
    revives: ClassVar[bool] = True

    attend: Literal["visible", "cached"] = "visible"

    def check_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Refuses a cache that both evicts and revives: depths would name K/V that are gone."""
        if self.eviction is not None and self.revives:
            raise ConfigError(
                f"{type(self).__name__} revives tokens and evicts K/V; a token that is revived needs the K/V of all "
                "layers before, so a cache that evicts sets revives = False"
            )
        super().check_model(model, tokenizer)

    @property
    def most_revived(self) -> int | None:
        """How many older tokens a decode step may revive per row; None = any number."""
        return None

    @property
    def eviction(self) -> Eviction | None:
        """What falls out of the stores of a layer after a step; None = nothing."""
        return None

    @property
    def retreat(self) -> Retreat | None:
        """When tokens that were computed go back to an early layer; None = never."""
        return None

    def selects_in_decode(self, generated: int) -> bool:
        """Whether the decode step that adds token number `generated` of the reply selects anew.

        If not, it uses at each layer what is stored there.
        """
        return False

    def new_store(self) -> KeyValueStore:
        """An empty K/V store for one row at one layer."""
        return KeyValueStore()

    def new_frontier(self) -> FrontierStore:
        """An empty frontier store for one row."""
        return FrontierStore()
