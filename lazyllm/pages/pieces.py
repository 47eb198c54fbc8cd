"""Which part of a text each token stands for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from transformers import PreTrainedTokenizerBase

from lazyllm.prompts import EncodedPrompt

CUT_OFF = "\ufffd"
"""What a tokenizer writes for a character of which it has not seen all bytes."""


def prompt_pieces(encoded: EncodedPrompt, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """By token of a prompt, its text; "" for one that adds none, such as the later bytes of a character.

    Together they are the prompt's text, up to its last token.
    """
    if encoded.text is None or not encoded.offsets:
        return reply_pieces(encoded.token_ids, tokenizer)
    ends = [0, *_rising(stop for _, stop in encoded.offsets)]
    return [encoded.text[start:stop] for start, stop in pairwise(ends)]


def reply_pieces(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
    """By token, what it adds to the decoded text; ids where there is no tokenizer.

    A token that ends inside a character adds nothing; the one that completes the character adds all of it.
    """
    if tokenizer is None:
        return [f"{token} " for token in token_ids]
    pieces: list[str] = []
    known = read = 0  # the text up to `read` is known, and needs no token before `known` to be decoded
    for stop in range(1, len(token_ids) + 1):
        before, text = (str(tokenizer.decode(list(token_ids[known:end]))) for end in (read, stop))
        whole = not text.endswith(CUT_OFF) or stop == len(token_ids)
        pieces.append(text[len(before) :] if whole else "")
        if whole:
            known, read = read, stop
    return pieces


def _rising(ends: Iterator[int]) -> Iterator[int]:
    """Each end, or the highest before it."""
    highest = 0
    for end in ends:
        highest = max(highest, end)
        yield highest
