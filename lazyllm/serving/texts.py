"""The text of a reply, in pieces that stay true whatever comes next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lazyllm.serving.jobs import Logprob

_INCOMPLETE = "\ufffd"
"""What a tokenizer shows for a character whose last bytes are still to come."""


class ReplyText:
    """Tokens of a reply that become text, up to a stop string.

    Attributes:
        token_ids: all tokens so far.
        stopped: whether a stop string has come.

    Args:
        tokenizer: of the model; None gives no text.
        stop: strings that end the reply.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.token_ids: list[int] = []
        self.stopped = False
        self._tokenizer, self._stop, self._told = tokenizer, tuple(stop), 0

    def add(self, token: int) -> str:
        """Takes a token, and gives the text that is certain now and was not before."""
        self.token_ids.append(token)
        text = self._text()
        found = min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=None)
        if found is not None:
            self.stopped = True
            return self._tell(text[:found])
        return self._tell(text[: len(text) - self._held_back(text)])

    def end(self) -> str:
        """The rest of the text, once no token comes any more."""
        return "" if self.stopped else self._tell(self._text())

    def _text(self) -> str:
        if self._tokenizer is None:
            return ""
        return str(self._tokenizer.decode(self.token_ids, skip_special_tokens=True))

    def _tell(self, text: str) -> str:
        new, self._told = text[self._told :], max(self._told, len(text))
        return new

    def _held_back(self, text: str) -> int:
        """How many characters at the end may change, or begin a stop string."""
        unsure = len(text) - len(text.rstrip(_INCOMPLETE))
        begun = (
            length
            for stop in self._stop
            for length in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:length])
        )
        return max(unsure, max(begun, default=0))


def logprob_of(logits: Tensor, token: int, top: int, tokenizer: Any) -> Logprob:
    """How likely a token is by the model's own logits [v], with the `top` likeliest ones."""
    logprobs = logits.float().log_softmax(0)
    likeliest = logprobs.topk(top) if top else None
    alternatives: list[tuple[float, int]] = []
    if likeliest is not None:
        alternatives = list(zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True))
    others = tuple(Logprob(other, _shown(tokenizer, other), value) for value, other in alternatives)
    return Logprob(token, _shown(tokenizer, token), float(logprobs[token]), others)


def _shown(tokenizer: Any, token: int) -> str:
    return "" if tokenizer is None else str(tokenizer.decode([token]))
