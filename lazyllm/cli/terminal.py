"""What a conversation in a terminal is written with and read from."""

from __future__ import annotations

import re
import sys
import time
import unicodedata
from collections.abc import Iterator
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.status import Status

from lazyllm.callbacks import Callback, LayerEnd, PrefillStart
from lazyllm.errors import InputError
from lazyllm.prompts import decode_text


def printable(text: str) -> str:
    """A model's text without characters that would control the terminal."""
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")


class Wrapped:
    """Writes text as it comes; where a width is known, lines break between words.

    Args:
        out: where to.
        width: columns of the terminal; None = lines are left as they are.
    """

    def __init__(self, out: TextIO, width: int | None) -> None:
        self._out, self._width = out, width
        self._column, self._space = 0, ""

    def write(self, piece: str) -> None:
        """Writes a piece of text; where lines break, space at its end waits for the next word."""
        if self._width is None:
            self._out.write(piece)
        else:
            for part in re.findall(r"\n|[^\S\n]+|\S+", piece):
                self._part(part, self._width)
        self._out.flush()

    def _part(self, part: str, width: int) -> None:
        """A line break, space, or a word."""
        if part == "\n":
            self._break()
        elif part.isspace():
            self._space += part
        else:
            if self._column and self._column + cell_len(self._space + part) > width:
                self._break()
            self._out.write(self._space + part)
            self._column, self._space = self._column + cell_len(self._space + part), ""

    def _break(self) -> None:
        self._out.write("\n")
        self._column, self._space = 0, ""

    def end(self) -> None:
        """Ends the line."""
        self._out.write("\n")
        self._out.flush()


class LiveLine(Callback):
    """A line that says how far the prompt is computed, until the reply begins; nothing where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._status = Status("reading", console=console) if console.is_terminal else None
        self._began = time.perf_counter()
        self._new = self._computed = self._revived = 0
        if self._status is not None:
            self._status.start()

    def on_prefill_start(self, event: PrefillStart) -> None:
        """Notes how much is new."""
        self._new = sum(event.new_tokens)

    def on_layer_end(self, event: LayerEnd) -> None:
        """Shows one layer more."""
        status = self._status
        if status is None or not event.is_prefill:
            return
        self._computed += sum(row.computed.numel() for row in event.rows)
        self._revived += sum(row.revived.numel() for row in event.rows)
        context = sum(row.first_new for row in event.rows) + self._new
        share = self._computed / (context * (event.layer + 1))
        seconds = time.perf_counter() - self._began
        status.update(
            f"layer {event.layer + 1}/{event.layers}, {seconds:.1f} s, computed {share:.0%}, revived {self._revived:,}"
        )

    def stop(self) -> None:
        """Takes the line away."""
        if self._status is not None:
            self._status.stop()
            self._status = None


def typed(prompt: str) -> str | None:
    """A line from the keyboard, to be edited while it is typed; None at the end.

    Raises:
        InputError: when it is not text.
    """
    import readline  # noqa: F401  # makes input() edit lines

    try:
        return input(prompt if sys.stdout.isatty() else "")
    except EOFError:
        return None
    except UnicodeDecodeError:
        raise InputError("what was typed is not UTF-8 text") from None


def piped() -> Iterator[str]:
    """The lines of stdin that are not blank.

    Raises:
        InputError: when there is none, or one is not text.
    """
    empty = True
    for line in sys.stdin.buffer:
        if line.strip():
            empty = False
            yield decode_text(line, "stdin")
    if empty:
        raise InputError("there is no question: stdin is empty")
