"""Processes that share a model by tensor parallelism: each holds some heads, and all must keep the same tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lazyllm.errors import UnsupportedModelError

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """The processes that share the heads of a layer; this process alone where there is no group.

    Attributes:
        group: the process group; None = this process alone.
        device: where tensors are exchanged.
        heads: query heads of a layer, over all processes.
    """

    group: Any = None
    device: torch.device = CPU
    heads: int = 0

    @property
    def size(self) -> int:
        """How many processes there are."""
        return 1 if self.group is None else int(torch.distributed.get_world_size(self.group))

    def holding(self, heads: int) -> Ranks:
        """Those that share a layer of which this process has `heads` query heads: itself alone where these are all.

        Raises:
            UnsupportedModelError: when the heads are not shared equally.
        """
        if self.group is None or heads == self.heads:
            return ALONE
        if heads * self.size != self.heads:
            raise UnsupportedModelError(
                f"{self.size} processes cannot share {self.heads} heads so that each has {heads}; "
                "take a number of processes that divides the heads"
            )
        return self

    def all_heads(self, part: Tensor) -> Tensor:
        """[h, ...] for the heads of all processes in their order, from [h, ...] for those of each."""
        if self.group is None:
            return part
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.size)]
        torch.distributed.all_gather(parts, part, group=self.group)
        return torch.cat(parts)

    def agree(self, values: Tensor) -> Tensor:
        """The first process's values, so that what all do next rests on the same numbers to the last bit."""
        if self.group is None:
            return values
        agreed = values.to(self.device, copy=True)
        torch.distributed.broadcast(agreed, group=self.group, group_src=0)
        return agreed.to(values.device)


ALONE = Ranks()


def ranks_of(model: PreTrainedModel, config: Any) -> Ranks:
    """The processes that a model with this text configuration is spread over by transformers' tensor parallelism."""
    if (model.tp_size or 1) == 1:
        return ALONE
    mesh = model._device_mesh["tp"]
    return Ranks(mesh.get_group(), torch.device(mesh.device_type), config.num_attention_heads)
