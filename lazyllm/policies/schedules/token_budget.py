"""Fixed counts of tokens."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from lazyllm.errors import ConfigError
from lazyllm.policies.base import (
    Keep,
    LayerIndex,
    Phase,
    Schedule,
    check_layer_index,
    layer_numbers,
    number_keys,
)


@dataclass(frozen=True)
class CountKeep(Keep):
    """So many tokens, however long the context; all of a shorter one."""

    tokens: int

    def limit(self, context_tokens: int) -> int:
        """`tokens`, or the whole context."""
        return min(self.tokens, super().limit(context_tokens))

    def fraction(self, context_tokens: int) -> float:
        """`tokens` of the context."""
        return min(self.ratio, self.tokens / context_tokens)

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens"


class TokenBudget(Schedule):
    """Lets a fixed number of tokens enter, however long the context is.

    `TokenBudget({1: 1024, 0.5: 256})` lets everything enter layer 0, 1,024 tokens the rest of the first half of the
    depth and 256 the second half. A context shorter than a budget is not pruned by it. Protected tokens count.

    Attributes:
        tokens: count by the first layer it holds for, not rising; a layer is a number, or a fraction of the depth
            given as a float, rounded down.
    """

    tokens: Annotated[
        dict[Annotated[LayerIndex, AfterValidator(check_layer_index)], Annotated[int, Field(ge=1)]],
        BeforeValidator(number_keys),
    ]

    def cuts(self, layers: int, phase: Phase) -> dict[int, Keep]:
        """One cut at each layer where the count falls.

        Raises:
            ConfigError: when it rises.
        """
        cuts: dict[int, Keep] = {}
        before = None
        for layer, count in sorted(layer_numbers(self.tokens, layers, owner=self).items()):
            if before is not None and count > before:
                raise ConfigError(
                    f"{self}: the number of tokens rises from {before} to {count} at layer {layer}; "
                    "a pruned token cannot come back within a step, so counts must not increase over layers"
                )
            if count != before:
                cuts[layer] = CountKeep(ratio=1.0, tokens=count)
            before = count
        return cuts
