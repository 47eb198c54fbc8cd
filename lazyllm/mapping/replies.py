"""Replies, and the file that keeps them: one JSON line each, with a digest, on disk before it counts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path

from lazyllm.files.lines import Appender, locked, whole_lines

MARK = b'{"id": "'
"""How every line begins."""


@dataclass(frozen=True)
class Reply:
    """What came of one prompt.

    Attributes:
        id: what it depends on, as hexadecimal digits; "" where nothing is kept.
        index: the how many-th prompt it was, from 0.
        text: the new tokens as text; "" without a tokenizer.
        token_ids: the new tokens, the end token included.
        prompt_tokens: length of the prompt.
        computed_fraction: layer-tokens computed, of those of a dense run.
        error: why there is no reply; None when there is one.
    """

    id: str
    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    prompt_tokens: int = 0
    computed_fraction: float = 1.0
    error: str | None = None

    def line(self) -> bytes:
        """As one line of a file."""
        data = asdict(self)
        return json.dumps({**data, "check": _check(data)}).encode() + b"\n"

    @classmethod
    def read(cls, line: bytes) -> Reply | None:
        """The reply of a line, None when it was changed since it was written."""
        try:
            data = json.loads(line)
            if data.pop("check") != _check(data):
                return None
            return cls(**{**data, "token_ids": tuple(data["token_ids"])})
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


def _check(data: object) -> str:
    return blake2b(json.dumps(data).encode(), digest_size=8).hexdigest()


@dataclass
class Kept:
    """What a file holds.

    Attributes:
        replies: by id, those that are whole; a prompt that failed is not among them.
        notices: what is damaged.
        size: bytes of whole lines.
    """

    replies: dict[str, Reply] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    size: int = 0


def look_into(path: Path) -> Kept:
    """Reads a file of replies; an absent one has none.

    Raises:
        InputError: when it cannot be read, or is of something else.
    """
    whole, rest = whole_lines(path, MARK, "no file of replies; move it away, or take another one")
    kept = Kept(size=sum(len(line) + 1 for line in whole))
    if rest:
        kept.notices.append(f"{path}: the last line was cut off; it is taken away, and its prompt computed again")
    for number, line in enumerate(whole, 1):
        if (reply := Reply.read(line)) is None:
            kept.notices.append(f"{path}: line {number} is damaged; its prompt is computed again")
        elif reply.error is None:
            kept.replies[reply.id] = reply
    return kept


class ReplyFile:
    """A file that this process alone writes to, while `opened`.

    Attributes:
        kept: what it held when it was opened.
    """

    def __init__(self, path: Path) -> None:
        self.kept = look_into(path)
        self._lines = Appender(path, self.kept.size)

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator[ReplyFile]:
        """The file, made where it is missing, without a last line that was cut off.

        Raises:
            InputError: when another process writes to it, or it cannot be used.
        """
        busy = f"another process writes to {str(path)!r}; wait for it, or take another file"
        with locked(path, unusable=f"cannot write {str(path)!r}", busy=busy):
            replies = cls(path)
            try:
                yield replies
            finally:
                replies._lines.close()

    def add(self, replies: Iterable[Reply]) -> None:
        """Writes replies.

        Raises:
            InputError: when they cannot be written.
        """
        self._lines.append(reply.line() for reply in replies)
