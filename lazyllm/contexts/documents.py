"""Documents that are loaded once, a few layers deep, and asked many times."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import PreTrainedTokenizerBase

from lazyllm.caches.lazy_cache import LazyCache
from lazyllm.callbacks import Callback
from lazyllm.errors import CacheError, InputError, TooLong
from lazyllm.generation.result import GenerationResult
from lazyllm.models.names import CACHE, CACHE_NAMES
from lazyllm.policies.base import explain
from lazyllm.policies.query import Query, check_query
from lazyllm.prompts import (
    CharRange,
    EncodedPrompt,
    check_not_blank,
    encode_text,
    join_encoded,
    mark,
    render,
)

if TYPE_CHECKING:
    from lazyllm.generation.streams import TextStream
    from lazyllm.pipeline import LazyPipeline

LAYOUT = "{documents}\n\n{question}"
"""The user's message where no other layout is asked for."""
SEPARATOR = "\n\n"
"""What stands between two documents."""
_DOCUMENTS, _QUESTION = "{documents}", "{question}"
_SAMPLE = "<<documents>>"
"""Stands for the documents where only what comes behind them is wanted."""


class Frame(BaseModel):
    """What a prompt has around its documents.

    Attributes:
        layout: the user's message, with `{documents}` before `{question}`.
        system: a system message before it.
        chat: whether the tokenizer's chat template makes the prompt; else the layout is all of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layout: str
    system: str | None
    chat: bool

    def content(self, documents: str, question: str) -> str:
        """The user's message."""
        before, rest = self.layout.split(_DOCUMENTS, 1)
        between, after = rest.split(_QUESTION, 1)
        return f"{before}{documents}{between}{question}{after}"

    def messages(self, documents: str, question: str) -> list[dict[str, str]]:
        """The chat that asks a question about documents."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*first, {"role": "user", "content": self.content(documents, question)}]

    def head(self, documents: str, tokenizer: PreTrainedTokenizerBase) -> str:
        """The prompt up to the end of the documents."""
        return self._split(documents, "0", tokenizer)[0]

    def tail(self, question: str, tokenizer: PreTrainedTokenizerBase) -> str:
        """The prompt behind the documents."""
        return self._split(_SAMPLE, question, tokenizer)[1]

    def _split(self, documents: str, question: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
        chat = self.messages(documents, question)
        text = render(chat, tokenizer) if self.chat else str(chat[-1]["content"])
        start = text.find(documents)
        if start < 0 or text.find(question, start + len(documents)) < 0:
            raise InputError(
                "the chat template changes the documents or the question, or puts the question first; "
                "give a tokenizer with a template that leaves messages as they are"
            )
        stop = start + len(documents)
        return text[:stop], text[stop:]


@dataclass(frozen=True)
class LoadStats:
    """What loading has cost.

    Attributes:
        tokens: number of tokens, those of the template before the documents included.
        depth: how many layers computed them.
        layers: number of layers of the model.
        seconds: how long it took, tokenisation included.
        kv_bytes, aux_bytes: of keys and values, and of states that wait or that a scorer looks back on.
    """

    tokens: int
    depth: int
    layers: int
    seconds: float
    kv_bytes: int
    aux_bytes: int

    @property
    def computed_fraction(self) -> float:
        """Layer-tokens computed, of those of a dense prefill."""
        return self.depth / self.layers

    @property
    def bytes_per_token(self) -> float:
        """All bytes held, per token."""
        return (self.kv_bytes + self.aux_bytes) / self.tokens


class Document:
    """One or several documents in a cache, taken only as deep as a scorer needs; made by `pipe.load` and `pipe.open`.

    A question takes deeper what it needs, and what it has computed is there for the next one: no token is computed
    twice by a layer, whatever is asked. What a token was computed with is what the policies chose then, so the answer
    to a question may differ with the questions before it; ask a `fork()` where it must not.

    Attributes:
        pipe: the pipeline that loaded it.
        cache: what was computed.
        frame: what stands around the documents in a prompt.
        pieces: its text, in parts that were tokenised by themselves.
        loaded: what loading has cost; None for a document that was opened or joined.
    """

    def __init__(
        self,
        pipe: LazyPipeline,
        cache: LazyCache,
        frame: Frame,
        pieces: Sequence[EncodedPrompt],
        loaded: LoadStats | None = None,
    ) -> None:
        self.pipe, self.cache, self.frame, self.pieces, self.loaded = pipe, cache, frame, tuple(pieces), loaded
        self._held = join_encoded(self.pieces)

    # -- asking ------------------------------------------------------------------------------------

    def ask(
        self, question: str, *, query: Query | None = None, **options: Any
    ) -> GenerationResult | list[GenerationResult]:
        """Answers a question about the documents.

        Args:
            question: what is asked.
            query: what scorers take for the question; None = all of it.
            options: any option of `pipe.generate` but `past_key_values`.

        Returns:
            One result, a list for `num_return_sequences` > 1.

        Raises:
            InputError: for a blank question, a part that does not begin at position 0, or when positions run out.
            CacheError: while another question is answered; ask a `fork()`, or wait for its end.
        """
        if taken := [name for name in CACHE_NAMES if name in options]:
            raise InputError(f"a document has its own cache; give {taken[0]} to pipe.generate")
        encoded = self.prompt(question, query=query)
        if not self.pipe.config.cache.revives:  # a question takes nothing deeper, and may evict
            return self.pipe.generate(encoded, past_key_values=self.cache.fork(), **options)
        with self.cache.claim("question"):
            loaded = self.cache.columns
            try:
                return self.pipe.generate(encoded, past_key_values=self.cache, **options)
            finally:
                self.cache.crop(loaded - self.cache.columns)
                self.cache.batch_select_indices(torch.tensor([0]))  # of several replies

    def stream(self, question: str, **options: Any) -> TextStream:
        """Answers a question in the background and yields text as it comes; as `ask` otherwise."""
        return self.pipe.stream_of(partial(self.ask, question), options)

    def prompt(self, question: str, *, query: Query | None = None) -> EncodedPrompt:
        """The whole prompt that asks a question, for `pipe.generate`; it begins with the tokens held.

        Raises:
            InputError: as `ask`.
        """
        asked = check_not_blank(question, "the question").strip()
        if self._first_position:
            raise InputError(
                f"this document begins at position {self._first_position}; join it behind one that begins at 0"
            )
        config, tokenizer = self.pipe.config, _tokenizer(self.pipe)
        tail = encode_text(self.frame.tail(asked, tokenizer), tokenizer, special_tokens=False)
        self._check_positions(len(tail.token_ids))
        whole = join_encoded([self._held, tail])
        if query is None and (query := config.scorer.reads_query) == "auto":
            query = asked if whole.offsets else (len(self), len(whole.token_ids))
        at = str(whole.text).rindex(asked)
        user = (at, at + len(asked)) if self.frame.chat else None
        query = query if query is None else check_query(query)
        return mark(whole, config.protect, query, system=self._system(), user=user)

    def _system(self) -> list[CharRange]:
        """Characters of the system message."""
        system = (self.frame.system or "").strip()
        start = str(self._held.text).find(system) if system and self.frame.chat else -1
        return [(start, start + len(system))] if start >= 0 else []

    def _check_positions(self, more: int) -> None:
        longest = self.pipe.max_positions
        if longest is not None and self.end + more > longest:
            raise TooLong(
                f"the documents end at position {self.end - 1} and the question needs {more} more, the model has "
                f"positions for {longest}"
            )

    # -- what it is --------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self._held.token_ids)

    @property
    def token_ids(self) -> list[int]:
        """Vocabulary ids of its tokens."""
        return self._held.token_ids

    @property
    def text(self) -> str:
        """All of its text, what the template puts before the documents included."""
        return str(self._held.text)

    @property
    def documents(self) -> str:
        """The documents alone, without what the template and the layout put before them."""
        before = self.frame.head(_SAMPLE, _tokenizer(self.pipe)).removesuffix(_SAMPLE)
        return self.text[len(before) :]

    @property
    def end(self) -> int:
        """The first position behind it: where another document that is to be joined may start."""
        return int(self._ledger.position[-1]) + 1

    @property
    def computed_fraction(self) -> float:
        """Layer-tokens computed so far, by loading and by questions, of those of a dense prefill."""
        return float(self._ledger.depth.double().mean()) / self._ledger.layers

    @property
    def _ledger(self) -> Any:
        return self.cache.rows[0].ledger

    @property
    def _first_position(self) -> int:
        return int(self._ledger.position[0])

    def __repr__(self) -> str:
        return f"Document(tokens={len(self)}, computed_fraction={self.computed_fraction:.3f}, cache={self.cache})"

    # -- several of them ---------------------------------------------------------------------------

    def fork(self) -> Document:
        """The same document, which goes on from here by itself; memory is shared until one of both writes."""
        return Document(self.pipe, self.cache.fork(), self.frame, self.pieces, self.loaded)

    def join(self, *others: Document) -> Document:
        """This document and others behind it in one context; all stay as they are.

        None of them has seen the others so far: a token attends to those before it from the layer on where it waits.
        Each must have been loaded with `start=` at a position behind the one before; one that no layer has computed
        (`depth=0`) is moved there.

        Raises:
            InputError: when positions do not allow it, or the documents are framed in different ways.
            CacheError: when they come from different models or cache policies.
        """
        joined = self
        for other in others:
            joined = joined._with(other)
        return joined

    def _with(self, other: Document) -> Document:
        if self.frame != other.frame:
            raise InputError(f"documents to be joined need the same frame, got {self.frame!r} and {other.frame!r}")
        first, moved = other._first_position, 0
        if first and not bool(other._ledger.depth.any()):
            moved = self.end - first
        if first + moved < self.end:
            raise InputError(
                f"a document at positions {first} to {other.end - 1} cannot stand behind one that ends at "
                f"{self.end - 1}, and was computed where it is; load it with start={self.end}"
            )
        cache = self.cache.join(other.cache, moved=moved)
        return Document(self.pipe, cache, self.frame, [*self.pieces, *other.pieces])

    def save(self, path: str | Path) -> Path:
        """Writes all that was computed to one file, which `pipe.open` reads; its texts are part of it.

        Raises:
            CacheError: when the file cannot be written; what was there before stays.
        """
        note = SavedDocument(frame=self.frame, pieces=[str(piece.text) for piece in self.pieces])
        return self.cache.save(path, note=note.model_dump_json())


class SavedDocument(BaseModel):
    """What is said about a document beside its cache.

    Attributes:
        frame: what stands around the documents in a prompt.
        pieces: its text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    frame: Frame
    pieces: list[str]


def load_document(
    pipe: LazyPipeline,
    texts: str | Sequence[str],
    *,
    layout: str,
    system: str | None,
    depth: int | None,
    start: int,
    callbacks: Sequence[Callback] = (),
) -> Document:
    """See `LazyPipeline.load`."""
    began = time.perf_counter()
    tokenizer = _tokenizer(pipe)
    given = [texts] if isinstance(texts, str) else list(texts)
    if not given:
        raise InputError("load takes one text or several, got none")
    documents = SEPARATOR.join(checked_texts(given))
    frame = Frame(layout=_checked_layout(layout), system=system, chat=tokenizer.chat_template is not None)
    if system is not None and not frame.chat:
        raise InputError("a system message needs a tokenizer with a chat template; make it part of the layout")
    if start < 0:
        raise InputError(f"a document starts at position 0 or later, not at {start}")
    text = SEPARATOR + documents if start else frame.head(documents, tokenizer)
    piece = _encoded(text, frame, tokenizer, first=not start)
    tokens, longest = len(piece.token_ids), pipe.max_positions
    if longest is not None and start + tokens > longest:
        raise TooLong(
            f"a document of {tokens} tokens that starts at position {start} needs positions up to "
            f"{start + tokens - 1}, the model has {longest}"
        )
    cache = pipe.new_cache(marks=[piece.marks])
    ids = torch.tensor([piece.token_ids], device=pipe.model.device)
    positions = torch.arange(start, start + tokens, device=ids.device)[None]
    with torch.no_grad(), pipe.loading(depth, callbacks=callbacks) as (model, layers):
        model(ids, position_ids=positions, **{CACHE: cache}, logits_to_keep=1)
    ledger = cache.rows[0].ledger
    seconds = time.perf_counter() - began
    stats = LoadStats(tokens, layers, ledger.layers, seconds, cache.kv_bytes, cache.aux_bytes)
    return Document(pipe, cache, frame, [piece], stats)


def open_document(pipe: LazyPipeline, path: str | Path, *, mapped: bool) -> Document:
    """See `LazyPipeline.open`."""
    tokenizer = _tokenizer(pipe)
    cache, note = pipe.load_noted_cache(path, mapped=mapped)
    try:
        saved = SavedDocument.model_validate_json(note)
    except ValidationError as error:
        fault = explain(error, SavedDocument) if note else "it is a cache, to be read with pipe.load_cache"
        raise CacheError(f"{str(path)!r} holds no document: {fault}") from None
    ledger = cache.rows[0].ledger
    begins = int(ledger.position[0]) == 0
    pieces = [
        _encoded(text, saved.frame, tokenizer, first=begins and not index) for index, text in enumerate(saved.pieces)
    ]
    if join_encoded(pieces).token_ids != ledger.token_id.tolist():
        raise CacheError(f"{str(path)!r} was saved with another tokenizer: its text has other tokens with this one")
    return Document(pipe, cache, saved.frame, pieces)


def _encoded(text: str, frame: Frame, tokenizer: PreTrainedTokenizerBase, *, first: bool) -> EncodedPrompt:
    return encode_text(text, tokenizer, special_tokens=first and not frame.chat)


def _tokenizer(pipe: LazyPipeline) -> PreTrainedTokenizerBase:
    if pipe.tokenizer is None:
        raise InputError("documents are texts: the pipeline needs a tokenizer")
    return pipe.tokenizer


def checked_texts(texts: Sequence[str]) -> list[str]:
    """Texts without surrounding space.

    Raises:
        InputError: when one is blank or no text.
    """
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"document {number} is of type {type(text).__name__}, not a text: {repr(text)[:80]}")
        check_not_blank(text, f"document {number}")
    return [text.strip() for text in texts]


def _checked_layout(layout: str) -> str:
    if (
        layout.count(_DOCUMENTS) != 1
        or layout.count(_QUESTION) != 1
        or layout.find(_QUESTION) < layout.find(_DOCUMENTS)
    ):
        raise InputError(f"a layout has {_DOCUMENTS} once and {_QUESTION} once behind it, got {layout!r}")
    return layout
