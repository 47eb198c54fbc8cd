"""How near one run stays to another, in next-token distributions and in tokens; no right answer is needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def divergence(dense: Tensor, pruned: Tensor) -> float:
    """Mean over n tokens of `KL(p || q) = sum p (log p - log q)` in nats; p, q of logits [n, vocabulary] of both."""
    log_p, log_q = (logits.double().cpu().log_softmax(-1) for logits in (dense, pruned))
    p = log_p.exp()
    terms = torch.where(p > 0, p * (log_p - log_q), 0.0)  # 0 log 0 is 0
    return max(0.0, float(terms.sum(-1).mean()))


def top1_agreement(dense: Tensor, pruned: Tensor) -> float:
    """Share of n tokens for which both logits [n, vocabulary] have the same maximum."""
    return float((dense.argmax(-1).cpu() == pruned.argmax(-1).cpu()).double().mean())


def token_agreement(one: Sequence[int], other: Sequence[int]) -> float:
    """Share of tokens at which two replies are equal, up to the end of the shorter one."""
    length = min(len(one), len(other))
    return sum(left == right for left, right in zip(one, other, strict=False)) / max(1, length)
