"""Prompts in files: a folder of texts, or one JSON line each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lazyllm.errors import InputError
from lazyllm.prompts import Prompt, check_not_blank, decode_text


@dataclass(frozen=True)
class NamedPrompt:
    """A prompt, a text or chat messages, where it stands, and the part of its text that asks, if it is named."""

    name: str
    prompt: Prompt
    query: str | None = None


def prompts_in(path: str | Path, *, chat: bool = False) -> list[NamedPrompt]:
    """The prompts of a folder, one in each `.txt` file, or of a `.jsonl` file.

    A line of the latter is an object with a field "prompt", a text or chat messages, and may have one "query".

    Args:
        path: of the folder or file.
        chat: wrap each text as one user message.

    Raises:
        InputError: when there is no prompt, or one that cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        found = list(_folder(path))
    elif path.suffix == ".jsonl":
        found = list(_lines(path))
    else:
        raise InputError(f"--prompts is a folder of .txt files or a .jsonl file, not {str(path)!r}")
    if not found:
        raise InputError(f"there is no {'.txt file' if path.is_dir() else 'prompt'} in {str(path)!r}")
    return [_as_chat(named) if chat else named for named in found]


def _folder(path: Path) -> Iterator[NamedPrompt]:
    for file in sorted(path.glob("*.txt")):
        yield NamedPrompt(file.name, decode_text(_read(file), f"the prompt file {str(file)!r}"))


def _lines(path: Path) -> Iterator[NamedPrompt]:
    for number, line in enumerate(_read(path).splitlines(), start=1):
        name = f"line {number} of {str(path)!r}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:  # no JSON, or no UTF-8
            raise InputError(f"{name} is not JSON: {error}") from None
        prompt = entry.get("prompt") if isinstance(entry, dict) else None
        if not isinstance(prompt, (str, list)) or not prompt:
            raise InputError(f'{name} has no field "prompt" with a text or chat messages')
        query = entry.get("query")
        if query is not None and not isinstance(query, str):
            raise InputError(f'{name} has a field "query" that is no text: {query!r}')
        yield NamedPrompt(f"line {number}", check_not_blank(prompt, name) if isinstance(prompt, str) else prompt, query)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror}") from None


def _as_chat(named: NamedPrompt) -> NamedPrompt:
    if not isinstance(named.prompt, str):
        return named
    return replace(named, prompt=[{"role": "user", "content": named.prompt}])
