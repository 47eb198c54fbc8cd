"""How likely a model that runs lazily finds given replies to a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lazyllm.caches import LazyCache
from lazyllm.callbacks import Callback
from lazyllm.models.names import CACHE
from lazyllm.pipeline import LazyPipeline
from lazyllm.prompts import EncodedPrompt, pad_left

PADDING = 0


@dataclass(frozen=True)
class Likelihood:
    """How likely a reply is.

    Attributes:
        log_probability: of the whole reply, in nats.
        is_greedy: whether greedy decoding would have said it.
    """

    log_probability: float
    is_greedy: bool


@torch.no_grad()
def score_replies(
    pipe: LazyPipeline,
    prompts: Sequence[EncodedPrompt],
    replies: Sequence[Sequence[Sequence[int]]],
    *,
    dtype: torch.dtype | None = None,
    callbacks: Sequence[Callback] = (),
) -> list[list[Likelihood]]:
    """Prefills the prompts as one batch, then feeds each reply token by token, as if it were generated.

    Every reply to a prompt goes on from the same prefill.

    Args:
        pipe: what runs.
        prompts: one or more.
        replies: by prompt, the token ids of each of its replies; at least one reply, and one token in each.
        dtype: in which the softmax is taken; None = that of the logits.
        callbacks: in addition to the pipeline's own.
    """
    owners = torch.tensor([prompt for prompt, several in enumerate(replies) for _ in several])
    tokens = [torch.tensor(reply) for several in replies for reply in several]
    with pipe.attached(callbacks=callbacks) as model:
        cache = pipe.new_cache(marks=[prompt.marks for prompt in prompts])
        ids, mask = pad_left(prompts, PADDING, model.device)
        logits = _next_logits(model, cache, ids, mask)
        cache.reorder_cache(owners)
        picked, greedy = _follow(model, cache, logits[owners], mask[owners], tokens, dtype)
    scores = iter(map(Likelihood, picked.sum(-1).tolist(), greedy.all(-1).tolist()))
    return [[next(scores) for _ in several] for several in replies]


def _follow(
    model: Any, cache: LazyCache, logits: Tensor, mask: Tensor, replies: Sequence[Tensor], dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Log-probability [b, t] of each token of the replies, and whether it was the likeliest; 0 and true behind an end.

    `logits` [b, v] and `mask` [b, columns] are those of the prefill. A row leaves the batch after its last token.
    """
    lengths = torch.tensor([reply.numel() for reply in replies])
    tokens = torch.nn.utils.rnn.pad_sequence(list(replies), batch_first=True).to(logits.device)
    picked = torch.zeros(tokens.shape, dtype=torch.float64)
    greedy = torch.ones(tokens.shape, dtype=torch.bool)
    rows = torch.arange(len(replies))
    for step in range(tokens.shape[1]):
        column = tokens[rows, step]
        chances = logits.log_softmax(-1, dtype=dtype)
        picked[rows, step] = chances.gather(-1, column[:, None]).squeeze(-1).double().cpu()
        greedy[rows, step] = (chances.argmax(-1) == column).cpu()
        going = lengths[rows] > step + 1
        if not going.any():
            break
        cache.batch_select_indices(going)
        rows, mask = rows[going], torch.nn.functional.pad(mask[going], (0, 1), value=1)
        logits = _next_logits(model, cache, column[going][:, None], mask)
    return picked, greedy


def _next_logits(model: Any, cache: LazyCache, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits [b, v] behind new columns `ids` [b, n], given the mask [b, columns] of all; padding has no position."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    output = model(ids, attention_mask=mask, position_ids=positions, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    return cast(Tensor, output.logits[:, -1])
