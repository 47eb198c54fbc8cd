"""The paper's progressive schedule."""

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from lazyllm.policies.base import LayerIndex, Schedule, check_layer_index, layer_numbers, number_keys


class Stages(Schedule):
    """Steps down to a given keep ratio at each given layer.

    `Stages({9: 0.7, 18: 0.49})` lets everything enter layers 0-8, 70 % of the context layers 9-17 and
    49 % of it (not of the survivors) all later ones.
    Source: Fu et al. 2024, LazyLLM, arXiv 2407.14057, Figure 4.

    Attributes:
        stages: keep ratio by the first layer it holds for; a layer is a number, or a fraction of the
            depth given as a float, rounded down.
    """

    stages: Annotated[
        dict[Annotated[LayerIndex, AfterValidator(check_layer_index)], Annotated[float, Field(gt=0, le=1)]],
        BeforeValidator(number_keys),
    ]

    def keep_ratios(self, layers: int) -> list[float]:
        """The ratio of the last stage at or before each layer, 1 before the first."""
        by_layer = layer_numbers(self.stages, layers, owner=self)
        ratios, current = [], 1.0
        for layer in range(layers):
            current = by_layer.get(layer, current)
            ratios.append(current)
        return ratios
