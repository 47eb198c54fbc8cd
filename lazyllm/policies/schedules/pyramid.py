"""Equal parts of the depth, each with a share of what the one before had."""

from fractions import Fraction
from typing import Annotated

from pydantic import AfterValidator, Field

from lazyllm.errors import ConfigError
from lazyllm.policies.base import LayerIndex, Schedule, check_layer_index, layer_number


class Pyramid(Schedule):
    """Cuts the depth into equal parts and lets the share `keep` of what is left go from each to the next.

    The ratios are of the whole context: `r_l = keep ** s` in part s of 0 .. stages-1, so 1, .5, .25, .125 by default.
    Source: Xing et al. 2024, PyramidDrop, arXiv 2410.17247, there for image tokens.

    Attributes:
        stages: number of parts.
        keep: share that goes on, in (0, 1].
        start: where the second part begins, a number or a fraction of the depth; the layers behind it are then cut
            into equal parts. None = after `1 / stages` of the depth.
    """

    stages: Annotated[int, Field(ge=2)] = 4
    keep: Annotated[float, Field(gt=0, le=1)] = 0.5
    start: Annotated[LayerIndex, AfterValidator(check_layer_index)] | None = None

    def keep_ratios(self, layers: int) -> list[float]:
        """`keep` to the power of the parts that lie before a layer.

        Raises:
            ConfigError: when there are fewer layers than parts.
        """
        begin = Fraction(layers, self.stages)
        if self.start is not None:
            begin = Fraction(layer_number(self.start, layers, owner=self))
        length = (layers - begin) / (self.stages - 1)
        if length < 1:
            raise ConfigError(f"{self}: {layers} layers are too few for {self.stages} parts with a layer each")
        cuts = [int(begin + part * length) for part in range(self.stages - 1)]
        return [self.keep ** sum(cut <= layer for cut in cuts) for layer in range(layers)]
