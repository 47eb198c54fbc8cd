"""From what a user calls a prompt to token ids and protected token ranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lazyllm.errors import InputError
from lazyllm.policies.protect import Span, TokenRange

Message = Mapping[str, Any]
Prompt = Any
"""A string, token ids (list or 1-D tensor), or a list of chat messages; or a list of these for a batch."""


_NO_OFFSETS: list[tuple[int, int]] = []


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of one prompt and the token ranges it protects."""

    token_ids: list[int]
    protected: tuple[TokenRange, ...]


def is_batch(prompt: Prompt) -> bool:
    """Whether `prompt` is a list of prompts rather than one."""
    if isinstance(prompt, Tensor):
        return prompt.ndim == 2
    if isinstance(prompt, str) or not isinstance(prompt, Sequence) or not prompt:
        return False
    return not isinstance(prompt[0], (int, Mapping))


def encode(prompt: Prompt, tokenizer: PreTrainedTokenizerBase | None, spans: Sequence[Span]) -> EncodedPrompt:
    """Tokenises one prompt and finds its protected spans.

    Raises:
        InputError: for an empty prompt, one of no known kind, text without a tokenizer, or an absent span.
    """
    if isinstance(prompt, (str, Sequence)) and not len(prompt):
        raise InputError(f"the prompt is empty ({prompt!r}); give at least one token")
    if isinstance(prompt, Tensor) or (isinstance(prompt, Sequence) and isinstance(prompt[0], int)):
        ids = [int(token) for token in prompt]
        if not ids:
            raise InputError("the prompt is empty (no token ids); give at least one token")
        text, offsets = None, _NO_OFFSETS
    else:
        text, ids, offsets = _tokenize(prompt, _need(tokenizer, prompt))
        if not ids:
            raise InputError(f"the prompt {prompt!r} has no tokens; give at least one")
    return EncodedPrompt(ids, tuple(_range(span, text, offsets, len(ids)) for span in spans))


def _need(tokenizer: PreTrainedTokenizerBase | None, prompt: Prompt) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise InputError(
            f"a prompt of type {type(prompt).__name__} needs a tokenizer; give the pipeline one, or token ids"
        )
    return tokenizer


def _tokenize(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int], list[tuple[int, int]]]:
    if isinstance(prompt, str):
        text, special = prompt, True
    elif isinstance(prompt, Sequence) and all(isinstance(part, Mapping) and "role" in part for part in prompt):
        if tokenizer.chat_template is None:
            raise InputError("the tokenizer has no chat template; give the prompt as text")
        text, special = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True), False
    else:
        raise InputError(
            "a prompt is a string, a list of token ids or a list of chat messages with a 'role', "
            f"not {type(prompt).__name__}: {repr(prompt)[:80]}"
        )
    with_offsets = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=with_offsets, verbose=False)
    return text, encoded["input_ids"], encoded["offset_mapping"] if with_offsets else []


def _range(span: Span, text: str | None, offsets: list[tuple[int, int]], tokens: int) -> TokenRange:
    if not isinstance(span, str):
        if span[1] > tokens:
            raise InputError(f"the protected token range {span} reaches beyond the prompt's {tokens} tokens")
        return span
    if text is None or not offsets:
        raise InputError(
            f"the protected substring {span!r} needs a text prompt and a fast tokenizer; give a token range"
        )
    start = text.find(span)
    if start < 0:
        raise InputError(f"the protected substring {span!r} does not occur in the prompt")
    inside = [index for index, (left, right) in enumerate(offsets) if left < start + len(span) and right > start]
    return inside[0], inside[-1] + 1


def pad_left(prompts: Sequence[EncodedPrompt], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [b, t], padded on the left."""
    width = max(len(prompt.token_ids) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        length = len(prompt.token_ids)
        ids[row, width - length :] = torch.tensor(prompt.token_ids)
        mask[row, width - length :] = 1
    return ids.to(device), mask.to(device)
