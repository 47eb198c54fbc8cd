"""Conversations: turns over one cache, of which only what is new is computed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from lazyllm.caches.lazy_cache import LazyCache
from lazyllm.contexts.documents import Document
from lazyllm.contexts.prefixes import take_up
from lazyllm.contexts.turns import Opening, Tool, Turn, message_of, schema_of
from lazyllm.errors import CacheError, InputError
from lazyllm.generation.options import Options
from lazyllm.generation.result import GenerationResult
from lazyllm.models.names import CACHE_NAMES
from lazyllm.policies.query import Query, check_query
from lazyllm.prompts import PLACEHOLDER, EncodedPrompt, Message, encode_turn

if TYPE_CHECKING:
    from lazyllm.generation.streams import TextStream
    from lazyllm.pipeline import LazyPipeline

Overflow = Literal["error", "slide"]
"""What a turn does that finds the context full."""

NEW_TOKENS = 256
"""The longest reply, unless asked otherwise."""
Documents = str | Document | Sequence[str | Document]
"""Texts, or documents that were loaded."""


@dataclass(frozen=True)
class _State:
    """All that changes in a conversation; replaced as a whole."""

    cache: LazyCache
    turns: tuple[Turn, ...] = ()

    @property
    def forgotten_turns(self) -> int:
        return self.turns[-1].forgotten_turns if self.turns else 0


@dataclass(frozen=True)
class _Question:
    """A turn that is about to be answered.

    Attributes:
        asked: the message that asks.
        encoded: the whole conversation up to the reply.
        forgotten_turns: how many of the oldest turns it leaves out.
        cache: a fork that holds what the reply can go on from.
        rewritten_tokens: how many tokens of the cache it does not hold.
        new_tokens: longest reply.
        seconds: how long it took to come this far.
    """

    asked: dict[str, Any]
    encoded: EncodedPrompt
    forgotten_turns: int
    cache: LazyCache
    rewritten_tokens: int
    new_tokens: int
    seconds: float

    def timed(self, result: GenerationResult) -> GenerationResult:
        """The result, with the time that rendering and tokenisation took before it."""
        return replace(result, stats=replace(result.stats, ttft_seconds=self.seconds + result.stats.ttft_seconds))

    def answered(self, result: GenerationResult) -> Turn:
        """The turn, with its reply."""
        before = self.encoded.user[0] if self.encoded.user is not None else result.stats.reused_tokens
        reply = {"role": "assistant", "content": result.text}
        return Turn(self.asked, reply, result.stats, self.rewritten_tokens, before, self.forgotten_turns)


class Conversation:
    """Questions and replies over one cache; made by `pipe.conversation` and `pipe.load_conversation`.

    Every turn renders the whole conversation by the tokenizer's chat template and goes on from the longest beginning
    that the cache holds: what is new is computed, and what the question revives. A template that renders earlier turns
    otherwise than they were, or text that is tokenised otherwise than it was generated, costs what stands behind the
    first difference (`Turn.rewritten_tokens`). The last token of a reply has no K/V yet and belongs to the next turn.

    The system message and tool definitions are never pruned. Documents given as texts open the first question's
    message, where they may be pruned and where every template has a place for them.

    A turn is all or nothing: it works on a fork, so that after an exception of any kind the conversation is what it
    was. While a turn runs, the cache may take its memory twice. A stream that is closed early leaves the reply so far
    as the turn's reply, or no turn when there was no token yet.
    """

    def __init__(
        self,
        pipe: LazyPipeline,
        *,
        documents: Documents = (),
        system: str | None = None,
        tools: Sequence[Tool] = (),
        overflow: Overflow = "error",
    ) -> None:
        if pipe.tokenizer is None or pipe.tokenizer.chat_template is None:
            raise InputError("a conversation needs a tokenizer with a chat template; use generate for plain text")
        if overflow not in ("error", "slide"):
            raise InputError(f"overflow is 'error' or 'slide', not {overflow!r}")
        self.overflow = overflow
        self._pipe, self._busy = pipe, threading.Lock()
        given = list(documents) if isinstance(documents, (list, tuple)) else [documents]
        loaded = [document for document in given if isinstance(document, Document)]
        if loaded and (len(given) > 1 or system is not None):
            raise InputError(
                "a loaded document opens a conversation by itself, with the system message it was loaded with; "
                "join() several, or give texts"
            )
        if loaded:
            opening, cache = Opening.of_loaded(loaded[0]), loaded[0].cache.fork()
        else:
            opening, cache = Opening.of(cast(list[str], given), system), pipe.bound_cache()
        self._opening, self._state = replace(opening, tools=tuple(map(schema_of, tools))), _State(cache)

    @classmethod
    def restored(
        cls, pipe: LazyPipeline, opening: Opening, overflow: Overflow, cache: LazyCache, turns: Sequence[Turn]
    ) -> Conversation:
        """A conversation that goes on after `turns`, which `cache` holds as far as they are computed."""
        chat = cls(pipe, overflow=overflow)
        chat._opening, chat._state = opening, _State(cache, tuple(turns))
        return chat

    # -- asking ------------------------------------------------------------------------------------

    def ask(
        self, text: str | Message, *, max_new_tokens: int = NEW_TOKENS, query: Query = "auto", **options: Any
    ) -> GenerationResult:
        """Takes a turn: asks, and returns the reply.

        Args:
            text: what the user says, or a message of another role, such as a tool's result.
            max_new_tokens: longest reply.
            query: what of it asks, as in `generate`; "auto" finds the questions in a long text, and takes all of a
                short one.
            options: any other option of `pipe.generate`, but for a cache.

        Raises:
            InputError: for a blank question, a template that fails, or a context that is full; nothing has run then.
            CacheError: while another turn of this conversation runs.
        """
        with self._turn():
            return self._answer(self._question(text, max_new_tokens, query, options), **options)

    def stream(
        self, text: str | Message, *, max_new_tokens: int = NEW_TOKENS, query: Query = "auto", **options: Any
    ) -> TextStream:
        """Takes a turn in the background and yields the reply as it comes; the turn counts once it has all come.

        Raises:
            InputError, CacheError: as `ask`, at once.
        """
        self._begin()
        try:
            question = self._question(text, max_new_tokens, query, options)
            return self._pipe.stream_of(partial(self._answer_and_end, question), options)
        except BaseException:
            self._busy.release()
            raise

    def undo(self) -> list[dict[str, Any]]:
        """Takes the last turn back and returns its messages.

        Its tokens are forgotten; what they revived stays at the depth it has, and what a cache evicted stays away.

        Raises:
            InputError: when there is none.
            CacheError: while a turn runs.
        """
        with self._turn():
            if not self._state.turns:
                raise InputError("there is no turn to take back")
            *left, last = self._state.turns
            cache = self._state.cache.fork()
            cache.crop(-max(0, cache.columns - last.context_tokens))
            self._state = _State(cache, tuple(left))
            return [last.asked, last.reply]

    def fork(self) -> Conversation:
        """A conversation that goes on from here by itself; both share their memory until one of them writes."""
        state = self._state  # which a turn in another thread may replace meanwhile
        return Conversation.restored(self._pipe, self.opening, self.overflow, state.cache.fork(), state.turns)

    def save(self, path: str | Path) -> Path:
        """Writes messages, statistics and cache to one file, which `pipe.load_conversation` reads.

        Raises:
            CacheError: when it cannot be written; what was there before stays.
        """
        from lazyllm.contexts.conversation_file import save_conversation  # which needs this class

        return save_conversation(self.fork(), path)

    # -- what it is --------------------------------------------------------------------------------

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The chat that is in the context, as the template gets it."""
        state = self._state
        return self._messages(state.turns[state.forgotten_turns :])

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All turns, those that are no longer in the context too."""
        return self._state.turns

    @property
    def cache(self) -> LazyCache:
        """What is computed so far, the last turn included; another one after every turn."""
        return self._state.cache

    @property
    def opening(self) -> Opening:
        """What it began with."""
        return self._opening

    def __repr__(self) -> str:
        return f"Conversation(turns={len(self.turns)}, cache={self.cache})"

    # -- helpers -----------------------------------------------------------------------------------

    def _begin(self) -> None:
        if not self._busy.acquire(blocking=False):
            raise CacheError("this conversation is in the middle of a turn; wait for its end, or fork it")

    @contextmanager
    def _turn(self) -> Iterator[None]:
        self._begin()
        try:
            yield
        finally:
            self._busy.release()

    def _question(self, text: str | Message, new_tokens: int, query: Query, options: Mapping[str, Any]) -> _Question:
        """Everything that can be refused before the model runs."""
        began = time.perf_counter()
        if taken := sorted({*CACHE_NAMES, "prefixes"} & options.keys()):
            raise InputError(f"a conversation has a cache of its own; leave out {taken[0]}")
        if (rows := Options(options, self._pipe.model).copies) > 1:
            raise InputError(f"a conversation goes on from one row, these options make {rows}; ask for one reply")
        asked = message_of(text)
        forgotten, encoded = self._fitting(asked, new_tokens, check_query(query))
        cache = self._state.cache.fork()
        rewritten = cache.columns - take_up(cache, encoded.token_ids)
        seconds = time.perf_counter() - began
        return _Question(asked, encoded, forgotten, cache, rewritten, new_tokens, seconds)

    def _fitting(self, asked: dict[str, Any], new_tokens: int, query: Query) -> tuple[int, EncodedPrompt]:
        """How many of the oldest turns are left out, and the conversation without them.

        Raises:
            InputError: when it does not fit.
        """
        longest, skipped = self._pipe.max_positions, _skipped_positions(self._state.cache)
        encoded = None
        for left_out in self._choices(asked):
            encoded = self._encode(self.turns[left_out:], asked, query)
            if longest is None or skipped + len(encoded.token_ids) + new_tokens <= longest:
                return left_out, encoded
        if encoded is None:
            raise InputError(f"a conversation begins with a user's message, not with one of role {asked['role']!r}")
        slides = self.overflow == "slide"
        hint = "" if slides else "; overflow='slide' would let go of the oldest turns"
        raise InputError(
            f"the context is full: with this question{' alone' * slides} the conversation has "
            f"{skipped + len(encoded.token_ids)} tokens, the reply may take max_new_tokens={new_tokens}, and the model "
            f"has positions for {longest}{hint}"
        )

    def _choices(self, asked: Message) -> list[int]:
        """How many of the oldest turns may be left out: as many as now, or more where the context may slide."""
        now = self._state.forgotten_turns
        last = len(self.turns) if self.overflow == "slide" else now
        roles = [turn.asked["role"] for turn in self.turns] + [asked["role"]]
        return [left_out for left_out in range(now, last + 1) if roles[left_out] == "user"]

    def _messages(self, turns: Sequence[Turn], *asked: Message) -> list[dict[str, Any]]:
        said = [message for turn in turns for message in (turn.asked, turn.reply)]
        return self._opening.messages([*said, *asked])

    def _encode(self, turns: Sequence[Turn], asked: dict[str, Any], query: Query) -> EncodedPrompt:
        return encode_turn(
            self._messages(turns, asked),
            cast(Any, self._pipe.tokenizer),
            self._pipe.config.protect.model_copy(update={"system": True}),
            query,
            blank=self._messages(turns, {**asked, "content": PLACEHOLDER}),
            tools=self._opening.tools,
            pieces=self._opening.pieces,
        )

    def _answer(self, question: _Question, **options: Any) -> GenerationResult:
        made = self._pipe.generate(
            question.encoded, past_key_values=question.cache, max_new_tokens=question.new_tokens, **options
        )
        result = question.timed(cast(GenerationResult, made))
        self._state = _State(question.cache, (*self._state.turns, question.answered(result)))
        return result

    def _answer_and_end(self, question: _Question, **options: Any) -> GenerationResult:
        try:
            return self._answer(question, **options)
        finally:
            self._busy.release()


def _skipped_positions(cache: LazyCache) -> int:
    """Positions that no token has, between documents that were loaded apart."""
    ledger = cache.rows[0].ledger if cache.rows else None
    return int(ledger.position[-1]) + 1 - len(ledger) if ledger is not None and len(ledger) else 0
