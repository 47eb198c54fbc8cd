"""A conversation in a terminal, or through a pipe."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lazyllm.cli.terminal import LiveLine, Wrapped, piped, printable, typed
from lazyllm.contexts.conversation import Conversation
from lazyllm.contexts.turns import Turn
from lazyllm.errors import InputError, LazyLLMError, unknown
from lazyllm.prompts import decode_text

if TYPE_CHECKING:
    from lazyllm.pipeline import LazyPipeline

COMMANDS = {
    "undo": ("", "takes the last turn back"),
    "fork": ("[NAME]", "goes on in a copy of the conversation"),
    "go": ("[NAME]", "goes to another copy; without a name, lists them"),
    "save": ("PATH", "writes the conversation to a file, for --load"),
    "stats": ("", "shows what each turn has cost"),
    "docs": ("", "lists the documents"),
    "help": ("", "shows this"),
    "quit": ("", "leaves; so do Ctrl-D, and Ctrl-C twice"),
}
"""Argument and help of every command."""
FIRST = "main"
"""Name of the conversation that there is at the start."""


# -- documents ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NamedText:
    """A document and where it comes from."""

    name: str
    text: str

    @property
    def titled(self) -> str:
        """The text under its name, so that questions can name it."""
        return f"{self.name}:\n\n{self.text}"


def read_documents(paths: Sequence[Path], *, left_out: Callable[[str], None]) -> list[NamedText]:
    """The texts of files, and of all files in folders, in order of their names.

    Args:
        paths: files and folders.
        left_out: told what in a folder is no text.

    Raises:
        InputError: for a path that does not exist, a file that is no text, or a folder without any.
    """
    return [text for path in paths for text in (_folder(path, left_out) if path.is_dir() else [_file(path)])]


def _folder(folder: Path, left_out: Callable[[str], None]) -> list[NamedText]:
    texts = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")):
        try:
            texts.append(_file(path, path.relative_to(folder)))
        except InputError as error:
            left_out(str(error))
    if not texts:
        raise InputError(f"the folder {str(folder)!r} holds no text file")
    return texts


def _file(path: Path, name: Path | None = None) -> NamedText:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the document {str(path)!r}: {error.strerror}") from None
    return NamedText(str(name or path.name), decode_text(data, f"the document {str(path)!r}").strip())


def loaded_documents(pipe: LazyPipeline, texts: Sequence[NamedText], system: str | None) -> dict[str, Any]:
    """Options of `pipe.conversation`: texts as a document that is loaded now, where the cache lets tokens wait."""
    titled = [text.titled for text in texts]
    if titled and pipe.config.cache.revives:
        return {"documents": pipe.load(titled, system=system)}
    return {"documents": titled, "system": system}


# -- the loop ----------------------------------------------------------------------------------------


def computed_share(turn: Turn) -> float:
    """Layer-tokens a turn has computed, of those of a dense run over the whole conversation up to its end."""
    stats = turn.stats
    computed = sum(layer.computed for step in stats.tokens_per_layer for layer in step)
    return computed / (stats.layers * (stats.prompt_tokens + stats.new_tokens - 1))


def cost_line(turn: Turn) -> str:
    """What a turn has cost, in a line."""
    stats = turn.stats
    parts = [
        f"TTFT {stats.ttft_seconds:.2f} s",
        f"computed {computed_share(turn):.1%}",
        f"revived {stats.revived_tokens:,}",
        f"reused {stats.reused_tokens:,} of {stats.prompt_tokens:,} tokens",
    ]
    if turn.rewritten_tokens:
        parts.append(f"rewritten {turn.rewritten_tokens:,}")
    if turn.forgotten_turns:
        parts.append(f"without the {turn.forgotten_turns} oldest turns")
    return ", ".join(parts)


class Chat:
    """Takes lines, asks or obeys, and writes replies to `out` and everything else to `notes`.

    Args:
        chat: the conversation to begin with.
        documents: name and text of its documents.
        options: of every reply.
        out: where replies go.
        notes: where all else goes.
    """

    def __init__(
        self,
        chat: Conversation,
        *,
        documents: Sequence[NamedText] = (),
        options: Mapping[str, Any] | None = None,
        out: TextIO | None = None,
        notes: Console | None = None,
    ) -> None:
        self.chats, self.name = {FIRST: chat}, FIRST
        self._documents, self._options = list(documents), dict(options or {})
        self._out = out if out is not None else sys.stdout
        self._notes = notes if notes is not None else Console(stderr=True)

    @property
    def chat(self) -> Conversation:
        """The conversation that is spoken to."""
        return self.chats[self.name]

    @property
    def prompt(self) -> str:
        """What stands before a question."""
        return "> " if len(self.chats) == 1 else f"{self.name}> "

    def talk(self, read: Callable[[str], str | None]) -> None:
        """Takes lines until there is none; an error costs its line alone, and Ctrl-C the reply."""
        warned = False
        while True:
            try:
                line = read(self.prompt)
                warned = False
                if line is None or not self.take(line):
                    return
            except KeyboardInterrupt:
                if warned:
                    return
                warned = True
                self._note("Ctrl-C again, or Ctrl-D, leaves")
            except LazyLLMError as error:
                self._note(f"lazyllm: {'; '.join(str(error).splitlines())}")

    def take(self, line: str) -> bool:
        """Answers a question or obeys a command; whether to go on.

        Raises:
            LazyLLMError: when that cannot be done.
        """
        line = line.encode("utf-8", "replace").decode("utf-8").strip()
        if not line.startswith("/") or line.startswith("//"):
            if line:
                self._ask(line.removeprefix("/") if line.startswith("//") else line)
            return True
        name, _, argument = line[1:].partition(" ")
        if name not in COMMANDS:
            raise InputError(f"{unknown('command', name, COMMANDS)} A question that begins with / is written with //.")
        if name != "quit":
            getattr(self, f"_{name}")(argument.strip())
        return name != "quit"

    def _ask(self, text: str) -> None:
        turns = len(self.chat.turns)
        line = LiveLine(self._notes)
        try:
            stream = self.chat.stream(text, callbacks=[line], **self._options)
            self._show(stream, line)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise InputError("there is not enough memory for this turn; the conversation is as it was") from error
        finally:
            line.stop()
        if len(self.chat.turns) > turns:
            self._note(cost_line(self.chat.turns[-1]))
        else:
            self._note("stopped before the reply began; the question is taken back")

    def _show(self, stream: Any, line: LiveLine) -> None:
        """Writes a reply as it comes; Ctrl-C ends it where it is."""
        writer = Wrapped(self._out, shutil.get_terminal_size().columns if self._out.isatty() else None)
        begun = False
        try:
            for piece in stream:
                line.stop()
                begun = True
                writer.write(printable(piece))
        except KeyboardInterrupt:
            stream.close()
        finally:
            line.stop()
            if begun:
                writer.end()

    def _note(self, text: str) -> None:
        self._notes.print(Text(text, style="" if self._notes.no_color else "dim"))

    # -- commands ----------------------------------------------------------------------------------

    def _undo(self, argument: str) -> None:
        asked, _ = self.chat.undo()
        self._note(f"taken back: {asked['content']}")

    def _fork(self, argument: str) -> None:
        name = argument or next(f"copy{number}" for number in range(1, 10_000) if f"copy{number}" not in self.chats)
        if name in self.chats:
            raise InputError(f"there is a conversation {name!r} already; /go {name} goes there")
        self.chats[name] = self.chat.fork()
        self.name = name
        self._note(f"in {name}; /go {FIRST} goes back")

    def _go(self, argument: str) -> None:
        if not argument:
            for name, chat in self.chats.items():
                self._note(f"{'*' if name == self.name else ' '} {name}: {_count(len(chat.turns), 'turn')}")
            return
        if argument not in self.chats:
            raise InputError(unknown("conversation", argument, self.chats))
        self.name = argument

    def _save(self, argument: str) -> None:
        if not argument:
            raise InputError("/save takes the path of a file")
        self._note(f"saved as {self.chat.save(Path(argument).expanduser())}")

    def _stats(self, argument: str) -> None:
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for column in ("#", "tokens", "reused", "share", "revived", "TTFT"):
            table.add_column(column, justify="right", no_wrap=True)
        for number, turn in enumerate(self.chat.turns, start=1):
            stats = turn.stats
            counts = (f"{count:,}" for count in (number, stats.prompt_tokens, stats.reused_tokens))
            costs = (f"{computed_share(turn):.1%}", f"{stats.revived_tokens:,}", f"{stats.ttft_seconds:.2f}")
            table.add_row(*counts, *costs)
        self._notes.print(table)
        cache = self.chat.cache
        self._note(f"{cache.columns:,} tokens held, {(cache.kv_bytes + cache.aux_bytes) / 1e6:,.1f} MB")

    def _docs(self, argument: str) -> None:
        for document in self._documents:
            self._note(f"{document.name}: {len(document.text):,} characters")
        characters = len(self.chat.opening.documents)
        if not self._documents:  # a conversation that was loaded knows texts, not files
            self._note(f"documents of {characters:,} characters" if characters else "no documents")

    def _help(self, argument: str) -> None:
        for name, (arguments, said) in COMMANDS.items():
            self._note(f"/{name} {arguments}".ljust(14) + said)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory could not be had: torch has a kind of its own on accelerators alone."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def run_chat(chat: Chat) -> None:
    """Talks with the keyboard; of a pipe, takes the lines one by one and ends at the first error.

    Raises:
        LazyLLMError: of a pipe, what kept a line from being answered.
    """
    if sys.stdin.isatty():
        chat.talk(typed)
        return
    for line in piped():
        if not chat.take(line):
            return
