"""Attention of several layers."""

from typing import Annotated, ClassVar, Literal

import torch
from einops import reduce
from pydantic import Field
from torch import Tensor

from lazyllm.policies.base import ScoreContext, Scorer
from lazyllm.policies.pooling import OddWidth, max_over_neighbours


class MultiLayerAttention(Scorer):
    """Attention of the last `window` new tokens, joined over the last `layers` layers, since single layers disagree.

    `s_i = max_{|j-i| <= pool//2} join_l mean_h mean_q A_l[h, q, j]`, over as many layers as have run.
    Source: aggregation over layers as in CLAA, arXiv 2602.16054 (maximum), and ASL, arXiv 2601.07667.

    Attributes:
        layers: how many of the latest layers.
        window: number of queries at the end of the prompt; a decode step has one.
        join: "max" or "mean" over layers.
        pool: odd width in visible tokens of the maximum over neighbours; 1 = none.
    """

    needs_attention: ClassVar[bool] = True

    layers: Annotated[int, Field(ge=1)] = 4
    window: Annotated[int, Field(ge=1)] = 32
    join: Literal["max", "mean"] = "max"
    pool: OddWidth = 1

    @property
    def reads_layers(self) -> int:
        """`layers`."""
        return self.layers

    @property
    def compares(self) -> int:
        """`window` at each layer."""
        return self.window * self.layers

    def score(self, context: ScoreContext) -> Tensor:
        """Scores [v]."""
        read = (*context.earlier, context.layer_attention)
        layers = [reduce(context.over_visible(one, self.window), "h q v -> v", "mean").cpu() for one in read]
        return max_over_neighbours(reduce(torch.stack(layers), "l v -> v", self.join), self.pool)
