"""Conversations as files: that of their cache, with a note that says what was said."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lazyllm.contexts.conversation import Conversation, Overflow
from lazyllm.contexts.turns import Opening, Turn
from lazyllm.errors import CacheError
from lazyllm.policies.base import explain

if TYPE_CHECKING:
    from lazyllm.pipeline import LazyPipeline


class SavedConversation(BaseModel):
    """What is said about a conversation beside its cache.

    Attributes:
        kind, version: of the note.
        opening: what it began with.
        overflow: what it does when the context is full.
        turns: all turns.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["conversation"] = "conversation"
    version: Literal[1] = 1
    opening: Opening
    overflow: Overflow
    turns: tuple[Turn, ...]


def save_conversation(chat: Conversation, path: str | Path) -> Path:
    """Writes a conversation to `path` in one piece; what was there stays until it is complete.

    Raises:
        CacheError: when the file cannot be written.
    """
    note = SavedConversation(opening=chat.opening, overflow=chat.overflow, turns=chat.turns)
    return chat.cache.save(path, note=note.model_dump_json())


def load_conversation(pipe: LazyPipeline, path: str | Path) -> Conversation:
    """The conversation that `save_conversation` wrote to `path`.

    Raises:
        CacheError: when there is no such file, it is damaged or changed, of another version, model or policy, or holds
            something else.
        InputError: when the pipeline's tokenizer has no chat template.
    """
    cache, note = pipe.load_noted_cache(path)
    try:
        saved = SavedConversation.model_validate_json(note)
    except ValidationError as error:
        said = explain(error, SavedConversation) if note else "it holds a cache alone, for pipe.load_cache"
        raise CacheError(f"{str(path)!r} holds no conversation: {said}") from None
    return Conversation.restored(pipe, saved.opening, saved.overflow, cache, saved.turns)
