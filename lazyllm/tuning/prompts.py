"""The prompts that a schedule is tuned on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lazyllm.errors import InputError
from lazyllm.prompts import Prompt, check_not_blank, decode_text

VALIDATION_SHARE = 1 / 3
"""Of the prompts, those that choose nothing."""


@dataclass(frozen=True)
class NamedPrompt:
    """A prompt, a text or chat messages, and where it stands."""

    name: str
    prompt: Prompt


def read_prompts(path: str | Path, *, chat: bool = False) -> list[NamedPrompt]:
    """The prompts of a folder, one in each `.txt` file, or of a `.jsonl` file, the field "prompt" of each line.

    A prompt that stands there twice counts once, so that none can both choose and validate.

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
    unique: dict[str, NamedPrompt] = {}
    for named in found:
        unique.setdefault(json.dumps(named.prompt), named)
    return [_as_chat(named) if chat else named for named in unique.values()]


def split(prompts: list[NamedPrompt], seed: int) -> tuple[list[NamedPrompt], list[NamedPrompt]]:
    """Those that choose, and a third, drawn by the seed, that validates; at least one each.

    Raises:
        InputError: when there are fewer than two.
    """
    if len(prompts) < 2:
        raise InputError(
            f"{len(prompts)} prompt is too few to tune on: one is needed to choose a schedule and another to validate "
            "it, and more make both mean more"
        )
    order = random.Random(seed).sample(range(len(prompts)), len(prompts))
    drawn = set(order[: max(1, round(VALIDATION_SHARE * len(prompts)))])
    training = [prompt for index, prompt in enumerate(prompts) if index not in drawn]
    return training, [prompt for index, prompt in enumerate(prompts) if index in drawn]


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
        yield NamedPrompt(f"line {number}", check_not_blank(prompt, name) if isinstance(prompt, str) else prompt)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror}") from None


def _as_chat(named: NamedPrompt) -> NamedPrompt:
    if not isinstance(named.prompt, str):
        return named
    return NamedPrompt(named.name, [{"role": "user", "content": named.prompt}])
