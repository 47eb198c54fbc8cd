"""From what a user calls a prompt to token ids, protected token ranges and the query."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lazyllm.caches.row import PromptMarks
from lazyllm.errors import InputError
from lazyllm.policies.protect import Protect
from lazyllm.policies.query import AUTO_TOKENS, Query, TokenRange, Unit

Message = Mapping[str, Any]
Prompt = Any
"""A string, token ids (list or 1-D tensor), a list of chat messages, or what `pipe.encode` gave; or a list of these for
a batch."""

CharRange = tuple[int, int]

PLACEHOLDER = "\ue000"
"""Stands for a text where only its place is wanted; a character that no text has."""

BLANK_LINE = r"\n\s*\n"
SEPARATORS: dict[Unit, str] = {
    "line": r"\n+",
    "sentence": r"(?<=[.?!])\s+|(?<=[\u3002\uff01\uff1f])\s*|\n+",
    "paragraph": BLANK_LINE,
}
"""What stands between the units of a text."""
QUESTION_MARKS = ("?", "\uff1f", "\u061f")
"""The Latin, the full-width and the Arabic one."""
LONGEST_QUESTION = 400
"""Characters; a longer paragraph is a text and not a question."""
LONGEST_REMARK = 60
"""Characters that may stand behind a question and still belong to it."""
MOST_QUESTIONS = 3
"""A text with more paragraphs that ask something is a dialogue, and these are part of it."""


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of one prompt, and what its text says about them.

    Attributes:
        token_ids: the tokens.
        marks: which of them are protected, and which ask.
        text: the prompt as the tokenizer got it; None when only ids were given.
        offsets: by token, its characters (start, stop) in the text; empty when the tokenizer does not tell.
        user: tokens of what the user said last, None outside of chats.
    """

    token_ids: list[int]
    marks: PromptMarks
    text: str | None = None
    offsets: Sequence[CharRange] = ()
    user: TokenRange | None = None


@dataclass(frozen=True)
class _Text:
    """A prompt's text as the model gets it.

    Attributes:
        text: all of it; None when only ids were given.
        token_ids: its tokens.
        offsets: by token, its characters; empty when the tokenizer does not tell.
        system: characters of the system messages, and of tool definitions.
        user: characters of the last user turn, None outside of chats.
    """

    text: str | None
    token_ids: list[int]
    offsets: list[CharRange]
    system: tuple[CharRange, ...] = ()
    user: CharRange | None = None

    def tokens(self, chars: CharRange) -> TokenRange | None:
        """The tokens that touch `chars`, None when there is none."""
        return tokens_touching(chars, self.offsets)

    def ranges(self, places: Sequence[CharRange]) -> tuple[TokenRange, ...]:
        """The tokens that touch each of `places`, without those that have none."""
        return tuple(tokens for chars in places if (tokens := self.tokens(chars)) is not None)

    @cached_property
    def asking(self) -> list[CharRange]:
        """Which characters seem to ask something: in a chat, of the last user turn."""
        return [] if self.text is None else _asking(self.text, self.user)


class UnitStarts(Mapping[Unit, tuple[int, ...]]):
    """By kind of unit, the first token of each in a text; looked for when they are first read."""

    def __init__(self, known: _Text) -> None:
        self._known = known

    @cached_property
    def _found(self) -> dict[Unit, tuple[int, ...]]:
        return _starts(self._known) if self else {}

    def __getitem__(self, unit: Unit) -> tuple[int, ...]:
        return self._found[unit]

    def __iter__(self) -> Iterator[Unit]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    def __bool__(self) -> bool:
        return self._known.text is not None and bool(self._known.offsets)

    def __repr__(self) -> str:
        return repr(self._found)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self._found,)  # what is written down holds no text


def tokens_touching(chars: CharRange, offsets: Sequence[CharRange]) -> TokenRange | None:
    """Range of the tokens that touch `chars`, given each token's characters; None when there is none."""
    left, right = chars
    inside = [index for index, (start, stop) in enumerate(offsets) if start < right and stop > left]
    return (inside[0], inside[-1] + 1) if inside else None


def is_batch(prompt: Prompt) -> bool:
    """Whether `prompt` is a list of prompts rather than one."""
    if isinstance(prompt, Tensor):
        return prompt.ndim == 2
    if isinstance(prompt, str) or not isinstance(prompt, Sequence) or not prompt:
        return False
    return not isinstance(prompt[0], (int, Mapping))


def decode_text(data: bytes, name: str) -> str:
    """A prompt's text, from a file or stream called `name`.

    Raises:
        InputError: when it is blank or no UTF-8 text.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text: byte {data[error.start]:#04x} at offset {error.start}") from None
    if "\0" in text:
        raise InputError(f"{name} is not text: it has a NUL byte at offset {data.index(0)}")
    return check_not_blank(text, name)


def check_not_blank(text: str, name: str) -> str:
    """Refuses a prompt without a visible character."""
    if not text.strip():
        raise InputError(f"the prompt is empty: {name} holds {text[:20]!r}")
    return text


def encode(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase | None, protect: Protect, query: Query | None
) -> EncodedPrompt:
    """Tokenises one prompt, and finds its protected spans and its query; one that is encoded stays as it is.

    Raises:
        InputError: for an empty prompt, one of no known kind, text without a tokenizer, an absent span or query.
    """
    if isinstance(prompt, EncodedPrompt):
        return prompt
    if isinstance(prompt, (str, Sequence)) and not len(prompt):
        raise InputError(f"the prompt is empty ({prompt!r}); give at least one token")
    if isinstance(prompt, Tensor) or (isinstance(prompt, Sequence) and isinstance(prompt[0], int)):
        known = _Text(None, [int(token) for token in prompt], [])
        if not known.token_ids:
            raise InputError("the prompt is empty (no token ids); give at least one token")
    else:
        known = _tokenize(prompt, _need(tokenizer, prompt))
        if not known.token_ids:
            raise InputError(f"the prompt {prompt!r} has no tokens; give at least one")
    return _marked(known, protect, query)


def encode_chat_text(
    text: str, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, protect: Protect, query: Query | None
) -> EncodedPrompt:
    """Tokenises a text that a chat template has made of `messages`, and finds its marks as `encode` would.

    Raises:
        InputError: for an absent span or query.
    """
    return _marked(_read(text, messages, tokenizer), protect, query)


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase, *, special_tokens: bool) -> EncodedPrompt:
    """Tokenises a text as it stands, of which nothing is marked.

    Args:
        text: the text.
        tokenizer: of the model.
        special_tokens: whether the tokenizer adds those that begin a prompt.
    """
    token_ids, offsets = _token_ids(text, tokenizer, special_tokens=special_tokens)
    return EncodedPrompt(token_ids, PromptMarks(), text, offsets)


def join_encoded(pieces: Sequence[EncodedPrompt]) -> EncodedPrompt:
    """Pieces of a text that were tokenised by themselves, one behind the other; nothing is marked."""
    token_ids: list[int] = []
    offsets: list[CharRange] = []
    text = ""
    for piece in pieces:
        token_ids += piece.token_ids
        offsets += [(start + len(text), stop + len(text)) for start, stop in piece.offsets]
        text += piece.text or ""
    return EncodedPrompt(token_ids, PromptMarks(), text, offsets)


def mark(
    prompt: EncodedPrompt,
    protect: Protect,
    query: Query | None,
    *,
    system: Sequence[CharRange] = (),
    user: CharRange | None = None,
) -> EncodedPrompt:
    """The prompt with its protected spans and its query found anew.

    Args:
        prompt: a text and its tokens.
        protect: what is protected.
        query: what is asked.
        system: characters of the system messages.
        user: characters of the last user turn, None outside of chats.

    Raises:
        InputError: for an absent span or query.
    """
    return _marked(_Text(prompt.text, prompt.token_ids, list(prompt.offsets), tuple(system), user), protect, query)


def encode_turn(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    protect: Protect,
    query: Query | None,
    *,
    blank: Sequence[Message],
    tools: Sequence[Any] = (),
    pieces: Sequence[str] = (),
) -> EncodedPrompt:
    """Tokenises a conversation; what a user says last is where the query is sought.

    Tool definitions count as a system message. They, and what is said last, are found by rendering the conversation
    without them.

    Args:
        messages: the conversation.
        tokenizer, protect, query: as for every prompt.
        blank: the conversation with a `PLACEHOLDER` for what is said last.
        tools: definitions of tools.
        pieces: texts to be tokenised by themselves where the conversation begins with them.

    Raises:
        InputError: when there is no template, or it fails; for an absent span or query.
    """
    text = render(messages, tokenizer, tools)
    known = _read(text, messages, tokenizer)
    if pieces and text.startswith(head := "".join(pieces)):
        parts = [encode_text(part, tokenizer, special_tokens=False) for part in (*pieces, text[len(head) :])]
        joined = join_encoded(parts)
        known = replace(known, token_ids=joined.token_ids, offsets=list(joined.offsets))
    if messages[-1]["role"] == "user":
        known = replace(known, user=added(text, render(blank, tokenizer, tools)))
    if tools:
        known = replace(known, system=(*known.system, added(text, render(messages, tokenizer))))
    return _marked(known, protect, query)


def added(text: str, other: str) -> CharRange:
    """Which characters `text` has where `other` has none or others: from the first difference to the last."""
    start = _shared(text, other)
    return start, len(text) - _shared(text[start:][::-1], other[start:][::-1])


def _shared(text: str, other: str) -> int:
    """How many characters two texts have in common at their start."""
    pairs = enumerate(zip(text, other, strict=False))
    return next((place for place, (char, its) in pairs if char != its), min(len(text), len(other)))


def _marked(known: _Text, protect: Protect, query: Query | None) -> EncodedPrompt:
    """The prompt with its protected spans and its query."""
    protected = [_range("protected", span, known) for span in protect.spans]
    if protect.system:
        protected += known.ranges(known.system)
    marks = PromptMarks(tuple(protected), _query(query, known), _is_asked(query, known), UnitStarts(known))
    user = None if known.user is None else known.tokens(known.user)
    return EncodedPrompt(known.token_ids, marks, known.text, known.offsets, user)


def _need(tokenizer: PreTrainedTokenizerBase | None, prompt: Prompt) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise InputError(
            f"a prompt of type {type(prompt).__name__} needs a tokenizer; give the pipeline one, or token ids"
        )
    return tokenizer


def _tokenize(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> _Text:
    messages: list[Message] = []
    if isinstance(prompt, str):
        text = prompt
    elif isinstance(prompt, Sequence) and all(isinstance(part, Mapping) and "role" in part for part in prompt):
        messages = list(prompt)
        text = render(messages, tokenizer)
    else:
        raise InputError(
            "a prompt is a string, a list of token ids or a list of chat messages with a 'role', "
            f"not {type(prompt).__name__}: {repr(prompt)[:80]}"
        )
    return _read(text, messages, tokenizer)


def render(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any] = ()) -> str:
    """The text that the tokenizer's chat template makes of messages, up to where the reply begins.

    Raises:
        InputError: when there is no template, or it fails.
    """
    if tokenizer.chat_template is None:
        raise InputError("the tokenizer has no chat template; give the prompt as text")
    options: dict[str, Any] = {"tools": list(tools)} if tools else {}
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **options))
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise InputError(f"the chat template fails for these messages: {error}") from error


def _read(text: str, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> _Text:
    """A text, tokenised; the template that made it of `messages`, if any, has put the special tokens in."""
    token_ids, offsets = _token_ids(text, tokenizer, special_tokens=not messages)
    system, user = _turns(text, messages)
    return _Text(text, token_ids, offsets, system, user)


def _token_ids(
    text: str, tokenizer: PreTrainedTokenizerBase, *, special_tokens: bool
) -> tuple[list[int], list[CharRange]]:
    """Tokens of a text, and the characters of each, if the tokenizer tells."""
    with_offsets = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(text, add_special_tokens=special_tokens, return_offsets_mapping=with_offsets, verbose=False)
    return encoded["input_ids"], encoded["offset_mapping"] if with_offsets else []


def _turns(text: str, messages: Sequence[Message]) -> tuple[tuple[CharRange, ...], CharRange | None]:
    """Where the template put the system messages and the last user turn."""
    system: list[CharRange] = []
    user, start = None, 0
    for message in messages:
        content = message.get("content")
        content = content.strip() if isinstance(content, str) else ""
        found = text.find(content, start) if content else -1
        if found < 0:
            continue
        start = found + len(content)
        if message["role"] == "system":
            system.append((found, start))
        elif message["role"] == "user":
            user = (found, start)
    return tuple(system), user


def _query(query: Query | None, known: _Text) -> tuple[TokenRange, ...]:
    """Token ranges of the query, () when it is simply the last tokens."""
    length = len(known.token_ids)
    if query is None:
        return ()
    if isinstance(query, int):
        return ((max(0, length - query), length),)
    if query != "auto":
        return (_range("query", query, known),)
    if known.text is None or not known.offsets:
        return ()
    ranges = known.ranges(known.asking)
    ends_asking = known.user is not None or (known.asking and known.asking[-1][1] == len(known.text.rstrip()))
    return ranges if ends_asking else (*ranges, (max(0, length - AUTO_TOKENS), length))


def _is_asked(query: Query | None, known: _Text) -> bool:
    """Whether the query is named by its words or its place, or what the text seems to ask holds a question mark."""
    if isinstance(query, tuple) or (isinstance(query, str) and query != "auto"):
        return True
    return known.text is not None and any(_holds_mark(known.text[slice(*chars)]) for chars in known.asking)


def _holds_mark(text: str) -> bool:
    return any(mark in text for mark in QUESTION_MARKS)


def _asking(text: str, user: CharRange | None) -> list[CharRange]:
    if user is not None:
        start, stop = user
        return [(start + left, start + right) for left, right in find_questions(text[start:stop])]
    last = _pieces(text, BLANK_LINE)[-1]
    asks = _is_short(last) and _holds_mark(text[slice(*last)])
    return sorted({*lone_questions(text), *([last] if asks else [])})


def _starts(known: _Text) -> dict[Unit, tuple[int, ...]]:
    """First tokens of the text's lines, sentences and paragraphs."""
    assert known.text is not None, "asked only where there is one"
    stops = torch.tensor([stop for _, stop in known.offsets]).cummax(0).values
    starts: dict[Unit, tuple[int, ...]] = {}
    for unit, separator in SEPARATORS.items():
        places = torch.tensor([0, *(match.end() for match in re.finditer(separator, known.text))])
        tokens = torch.searchsorted(stops, places, right=True).unique()
        starts[unit] = tuple(tokens[tokens < len(stops)].tolist())
    return starts


def find_questions(text: str) -> list[CharRange]:
    """Which characters of a user's turn ask something: all of it when it is short, else what stands alone.

    That is other paragraphs that ask, unless there are so many that they belong to the text itself, and the last one
    (or the end of it, when that is long): a question, an order, or a remark behind a question that stands elsewhere,
    but not a long end of the text behind such a question. Where nothing holds a question mark, the first paragraph may
    be the order.
    """
    if len(text) <= LONGEST_QUESTION:
        return [(0, len(text))]
    asked, last = lone_questions(text), _last_piece(text)
    if not asked and not _holds_mark(text[slice(*last)]):
        first = _pieces(text, BLANK_LINE)[0]
        return sorted({last, *([first] if _is_short(first) else [])})
    if asked and not _holds_mark(text[slice(*last)]) and last[1] - last[0] > LONGEST_REMARK:
        return asked
    return sorted({*asked, last})


def lone_questions(text: str) -> list[CharRange]:
    """Short paragraphs that end in a question, or in a remark behind one; none where there are more than a few."""
    found = [chars for chars in _pieces(text, BLANK_LINE) if _is_short(chars) and _asks(text[slice(*chars)])]
    return found if len(found) <= MOST_QUESTIONS else []


def _is_short(chars: CharRange) -> bool:
    return chars[1] - chars[0] <= LONGEST_QUESTION


def _asks(paragraph: str) -> bool:
    """Whether no more than a remark, such as "Answer in one word.", stands behind its last question mark."""
    mark = max(paragraph.rfind(mark) for mark in QUESTION_MARKS)
    return mark >= 0 and len(paragraph) - mark - 1 <= LONGEST_REMARK


def _last_piece(text: str) -> CharRange:
    for separator in (BLANK_LINE, r"\n", r"(?<=[.?!])\s"):
        last = _pieces(text, separator)[-1]
        if last[1] - last[0] <= LONGEST_QUESTION:
            return last
    return len(text) - LONGEST_QUESTION, len(text)


def _pieces(text: str, separator: str) -> list[CharRange]:
    """Ranges of the pieces between separators, without surrounding space; blank ones are left out."""
    ends = [match.span() for match in re.finditer(separator, text)]
    starts = [0, *(right for _, right in ends)]
    stops = [*(left for left, _ in ends), len(text)]
    pieces = []
    for start, stop in zip(starts, stops, strict=True):
        piece = text[start:stop]
        if piece.strip():
            left = start + len(piece) - len(piece.lstrip())
            pieces.append((left, left + len(piece.strip())))
    return pieces or [(0, len(text))]


def _range(kind: str, span: TokenRange | str, known: _Text) -> TokenRange:
    length = len(known.token_ids)
    if not isinstance(span, str):
        if span[1] > length:
            raise InputError(f"the {kind} token range {span} reaches beyond the prompt's {length} tokens")
        return span
    if known.text is None or not known.offsets:
        raise InputError(f"the {kind} substring {span!r} needs a text prompt and a fast tokenizer; give a token range")
    start = known.text.find(span) if kind == "protected" else known.text.rfind(span)
    tokens = known.tokens((start, start + len(span))) if start >= 0 else None
    if tokens is None:
        raise InputError(f"the {kind} substring {span!r} does not occur in the prompt")
    return tokens


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
