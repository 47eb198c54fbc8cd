"""What tasks make prompts with."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from transformers import PreTrainedTokenizerBase

from lazyllm.evaluation.tasks.item import Item
from lazyllm.prompts import Prompt

Layout = Literal["question last", "question first", "question in the middle"]


@dataclass(frozen=True)
class Maker:
    """What a task needs to make items: how tokens are counted, how long prompts are, whether the model chats."""

    tokenizer: PreTrainedTokenizerBase
    tokens: int
    layout: Layout = "question last"
    system: str = ""

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self.tokenizer.chat_template is not None

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def fill(self, pieces: Iterator[str], tokens: int) -> list[str]:
        """As many pieces as fit into `tokens`."""
        taken: list[str] = []
        for piece in pieces:
            tokens -= self.count(piece) + 2
            if tokens < 0:
                break
            taken.append(piece)
        return taken

    def ask(self, document: list[str], question: str, *, instruction: str = "Answer briefly.") -> Prompt:
        """A prompt that puts a document and a question together."""
        asked = f"{question} {instruction}" if self.chats else f"Question: {question}"
        body = "\n\n".join(self._lay_out(document, asked))
        if not self.chats:
            tail = "Answer:" if self.layout == "question last" else "\n\nAnswer to the question:"
            return f"{self.system}\n\n{body}\n{tail}".strip()
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": body}]

    def _lay_out(self, document: list[str], asked: str) -> list[str]:
        if self.layout == "question first":
            return [asked, *document]
        if self.layout == "question in the middle":
            ends = list(accumulate(map(len, document)))
            half = bisect(ends, ends[-1] / 2)
            return [*document[:half], asked, *document[half:]]
        return [*document, asked]

    def user(self, text: str) -> Prompt:
        """A text as one user message, where the model chats."""
        return [{"role": "user", "content": text}] if self.chats else text

    def reply(self, chatty: str, bare: str | None = None) -> str:
        """An answer as a chat model would write it, or as a base model goes on."""
        return chatty if self.chats else f" {bare or chatty}"


Task = Callable[..., Item]
"""Makes an item of a `Maker`, a `random.Random`, and options by name."""
