"""What a generation takes: when its tokens came, and the most memory."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class TokenClock(StoppingCriteria):
    """Reads the clock whenever new tokens have come, one or several; stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []
        self._lengths: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        """Notes the time."""
        if not self.times and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())
        self._lengths.append(input_ids.shape[1])
        return torch.zeros(input_ids.shape[0], device=input_ids.device, dtype=torch.bool)

    @property
    def seconds_per_token(self) -> float | None:
        """Mean time from one token to the next; None when all came at once."""
        tokens = self._lengths[-1] - self._lengths[0]
        return (self.times[-1] - self.times[0]) / tokens if tokens else None


def peak_bytes(device: torch.device) -> int:
    """Peak of allocated memory on CUDA, else of the process's resident memory; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not a POSIX system
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
