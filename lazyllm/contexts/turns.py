"""What a conversation is made of: its opening, and turns of a question and a reply."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.utils import get_json_schema

from lazyllm.contexts.documents import SEPARATOR, Document, checked_texts
from lazyllm.errors import InputError
from lazyllm.generation.result import GenerationStats
from lazyllm.prompts import PLACEHOLDER, Message, check_not_blank

Tool = Mapping[str, Any] | Callable[..., Any]
"""A JSON schema, or a function whose annotations and docstring make one."""


@dataclass(frozen=True)
class Turn:
    """A question and its reply.

    Attributes:
        asked: the message that asked.
        reply: the assistant's message.
        stats: what the reply has cost; `stats.reused_tokens` tells what was computed before.
        rewritten_tokens: tokens the cache held that were dropped, as the conversation now has others in their place;
            what still stands behind the first of them was computed anew.
        context_tokens: how many tokens stand before what was asked.
        forgotten_turns: how many of the oldest turns were no longer in the context.
    """

    asked: dict[str, Any]
    reply: dict[str, Any]
    stats: GenerationStats
    rewritten_tokens: int
    context_tokens: int
    forgotten_turns: int


@dataclass(frozen=True)
class Opening:
    """What a conversation begins with.

    Attributes:
        system: the system message, if any.
        documents: text before the first question, in its message.
        behind: text behind it.
        pieces: how the prompt begins where documents were loaded, in parts that were tokenised by themselves.
        tools: definitions of tools, as JSON schemas.
    """

    system: str | None = None
    documents: str = ""
    behind: str = ""
    pieces: tuple[str, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(cls, documents: Sequence[str], system: str | None) -> Opening:
        """That of a conversation about texts.

        Raises:
            InputError: when one is blank or no text.
        """
        texts = checked_texts(documents)
        if system is not None:
            check_not_blank(system, "the system message")
        return cls(system, "".join(text + SEPARATOR for text in texts))

    @classmethod
    def of_loaded(cls, document: Document) -> Opening:
        """That of a conversation whose rendering begins with what the document's cache holds."""
        frame = document.frame
        before, _, behind = frame.content(document.documents, PLACEHOLDER).partition(PLACEHOLDER)
        return cls(frame.system, before, behind, tuple(str(piece.text) for piece in document.pieces))

    def messages(self, said: Sequence[Message]) -> list[dict[str, Any]]:
        """A chat that goes on with what was `said`."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        opened = [{**message, "content": f"{self.documents}{message['content']}{self.behind}"} for message in said[:1]]
        return [*system, *opened, *map(dict, said[1:])]


def message_of(text: str | Message) -> dict[str, Any]:
    """The message that asks, without surrounding space.

    Raises:
        InputError: when it is blank, or no message.
    """
    asked = dict(text) if isinstance(text, Mapping) else {"role": "user", "content": text}
    if "role" not in asked or not isinstance(asked.get("content"), str):
        raise InputError(f"a message has a role and a content that is a text, got {asked!r}")
    return {**asked, "content": check_not_blank(asked["content"], "the question").strip()}


def schema_of(tool: Tool) -> dict[str, Any]:
    """A tool's definition as the template gets it.

    Raises:
        InputError: for a function that cannot be described.
    """
    if isinstance(tool, Mapping):
        return dict(tool)
    try:
        schema: dict[str, Any] = get_json_schema(tool)
    except Exception as error:  # of many kinds, some of transformers' own
        raise InputError(f"the tool {tool!r} cannot be described: {error}") from None
    return schema
