"""The next token of one reply."""

from __future__ import annotations

import secrets
from collections import Counter

import torch
from torch import Tensor

from lazyllm.serving.jobs import Sampling


class Sampler:
    """Draws the tokens of one reply, with random numbers of its own.

    Attributes:
        greedy: whether each token is the one with the highest logit, whatever came before.

    Args:
        sampling: how they are chosen.
        reply: which reply of its job it is, so that each draws others.
    """

    def __init__(self, sampling: Sampling, reply: int = 0) -> None:
        self.sampling = sampling
        self._seen: Counter[int] = Counter()
        seed = secrets.randbits(62) if sampling.seed is None else sampling.seed + reply
        self._generator = torch.Generator().manual_seed(seed % 2**63)
        changed = sampling.presence_penalty or sampling.frequency_penalty or sampling.logit_bias
        self.greedy = sampling.temperature == 0 and not changed

    def draw(self, logits: Tensor) -> int:
        """A vocabulary id for logits [v], which counts as part of the reply from now on."""
        logits = self._changed(logits.float())
        token = int(logits.argmax()) if self.sampling.temperature == 0 else self._drawn(logits)
        self._seen[token] += 1
        return token

    def _changed(self, logits: Tensor) -> Tensor:
        """Logits [v] with penalties for what was drawn, and biases."""
        asked = self.sampling
        changes: Counter[int] = Counter()
        if asked.presence_penalty or asked.frequency_penalty:
            for token, times in self._seen.items():
                changes[token] -= asked.presence_penalty + asked.frequency_penalty * times  # type: ignore[assignment]
        for token, bias in asked.logit_bias.items():
            changes[token] += bias  # type: ignore[assignment]
        if not changes:
            return logits
        places = torch.tensor(list(changes), device=logits.device)
        return logits.index_add(0, places, torch.tensor(list(changes.values()), dtype=logits.dtype).to(logits.device))

    def _drawn(self, logits: Tensor) -> int:
        """A token by its probability, of the fewest likeliest ones that have `top_p` of it together."""
        probabilities, tokens = (logits / self.sampling.temperature).softmax(0).double().sort(descending=True)
        sums = probabilities.cumsum(0)
        allowed = int((sums - probabilities < self.sampling.top_p).sum()) or 1
        # One number from the host's generator: the same reply on every device.
        draw = torch.rand((), generator=self._generator, dtype=torch.float64).to(sums.device) * sums[allowed - 1]
        return int(tokens[torch.searchsorted(sums[:allowed], draw, right=True).clamp(max=allowed - 1)])
