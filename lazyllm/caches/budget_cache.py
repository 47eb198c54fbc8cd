"""A bound on what is stored: tokens that were not used for long are pruned again."""

from typing import Annotated

from pydantic import AfterValidator, Field, field_validator

from lazyllm.caches.aux_cache import AuxCache
from lazyllm.caches.policy import Retreat
from lazyllm.policies.base import LayerIndex, check_layer_index


class BudgetCache(AuxCache):
    """AuxCache in which at most `tokens` tokens have K/V beyond `layer`: those used longest ago are pruned again.

    A token that falls out gives up its K/V from `layer` on and waits there, as if the schedule had pruned it; revived,
    it is computed from there a second time. So law 1 holds between two falls and not across one: `row.retreated` counts
    the layer-tokens given up. The state in which a token enters `layer` is kept for every token, one hidden row each.
    A token counts as used in a step in which it is visible at the last layer.

    Attributes:
        tokens: how many tokens of a row may have K/V beyond `layer`; a step may use more until it ends.
        layer: where tokens that fall out wait, a number or a fraction of the depth; that of the schedule's first cut
            saves most.
        sinks: tokens at the start that do not fall out.
    """

    tokens: Annotated[int, Field(ge=1)] = 1024
    layer: Annotated[LayerIndex, AfterValidator(check_layer_index)] = 1
    sinks: Annotated[int, Field(ge=0)] = 4

    @field_validator("layer")
    @classmethod
    def _check_layer(cls, layer: LayerIndex) -> LayerIndex:
        if layer == 0:
            raise ValueError("tokens that fall out wait before layer 1 or later, not before layer 0")
        return layer

    @property
    def retreat(self) -> Retreat:
        """The bound."""
        return Retreat(self.tokens, self.layer, self.sinks)
