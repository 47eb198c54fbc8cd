"""Items of one's own, from a JSON-lines file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from lazyllm.errors import InputError, unknown
from lazyllm.evaluation.tasks.item import Item


class Message(TypedDict):
    """A turn of a chat."""

    role: str
    content: str


class Fields(TypedDict, total=False):
    """What a line may say of an item; `prompt` is needed. See `Item`."""

    prompt: str | list[Message]
    answers: str | list[str]
    reference: str
    evidence: str | list[str]
    new_tokens: int
    follow_up: str
    said: str
    metric: str
    classes: list[str]


def file_items(path: Path, count: int) -> list[Item]:
    """The first `count` items of a file, or all where it has fewer.

    Raises:
        InputError: when there is no such file, it holds none, or a line is no item.
    """
    items = [_item(fields, f"{path}, line {line}", path.stem) for line, fields in objects(path, count)]
    if not items:
        raise InputError(f'{path} holds no items; each line is an object such as {{"prompt": ..., "answers": [...]}}')
    return items


def objects(path: Path, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The first `count` objects of a JSON-lines file, each with the number of its line.

    Raises:
        InputError: when it cannot be read, or a line is no object.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # texts may hold other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read items from {str(path)!r}: {error}") from None
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    for number, line in filled[:count]:
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number} is no JSON: {error}") from None
        if not isinstance(value, dict):
            raise InputError(f"{path}, line {number} holds {line.strip()[:60]!r}, not an object")
        yield number, value


def _item(fields: Mapping[str, Any], where: str, task: str) -> Item:
    if strange := sorted(set(fields) - set(Fields.__annotations__)):
        raise InputError(f"{where}: " + unknown("field", strange[0], Fields.__annotations__))
    if not fields.get("prompt"):
        raise InputError(f"{where}: an item needs a prompt, a text or chat messages, not {fields.get('prompt')!r}")
    try:
        known: dict[str, Any] = dict(TypeAdapter(Fields).validate_python(fields, strict=True))
        answers, evidence = (_several(known.pop(name, ())) for name in ("answers", "evidence"))
        classes = tuple(known.pop("classes", ()))
        reference = known.pop("reference", "")
        return Item(task, known.pop("prompt"), reference, answers, evidence, classes=classes, **known)
    except ValidationError as error:
        fault = max(error.errors(), key=lambda fault: len(fault["loc"]))  # of a union, the member it came nearest to
        place = ".".join(map(str, fault["loc"]))
        raise InputError(f"{where}: {place}: {fault['msg']}, got {fault['input']!r}") from None
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _several(value: str | list[str] | tuple[()]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
