"""A folder of results that survives anything: lines are appended, carry a digest, and are on disk before they count."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from lazyllm.ablation.units import Record
from lazyllm.errors import InputError
from lazyllm.files.lines import Appender, locked, whole_lines

RESULTS, ITEMS, PLAN, STUDY, LOCK = "results.jsonl", "items.jsonl", "plan.json", "study.yaml", "lock"
MARK = b'{"check": "'
"""How every line begins."""


def written(data: Mapping[str, Any]) -> bytes:
    """Plain data as one line with its digest in front.

    Raises:
        ValueError: for data that JSON has no words for, such as NaN.
    """
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return MARK + _check(text).encode() + b'", "data": ' + text.encode() + b"}\n"


def read(line: bytes) -> Any:
    """The data of a line, None when it is damaged."""
    head, found, text = line.partition(b'", "data": ')
    if not (found and head.startswith(MARK) and text.endswith(b"}")):
        return None
    try:
        body = text[:-1].decode("ascii")
        return json.loads(body) if head[len(MARK) :] == _check(body).encode() else None
    except ValueError:
        return None


def _check(text: str) -> str:
    return blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass
class Lines:
    """What a file of lines holds.

    Attributes:
        data: of every whole line, in order.
        damaged: numbers of lines that were changed since they were written, from 1.
        size: bytes of whole lines; what stands behind was cut off in the middle.
    """

    data: list[Any] = field(default_factory=list)
    damaged: list[int] = field(default_factory=list)
    size: int = 0


def read_lines(path: Path) -> Lines:
    """Every line of a file that `written` made; an absent file has none.

    Raises:
        InputError: when it cannot be read, or is of something else.
    """
    whole, _ = whole_lines(path, MARK, "no file of a study; move it away, or take another folder")
    found = Lines(size=sum(len(line) + 1 for line in whole))
    for number, line in enumerate(whole, 1):
        data = read(line)
        found.damaged.append(number) if data is None else found.data.append(data)
    return found


@dataclass(frozen=True)
class Kept:
    """What a folder holds.

    Attributes:
        records: every result, in the order it came.
        items: contents by digest.
        plan: what was planned last; None before anything was.
        notices: what is damaged.
    """

    records: list[Record]
    items: dict[str, dict[str, Any]]
    plan: dict[str, Any] | None
    notices: list[str]


def look_into(folder: Path) -> Kept:
    """Reads a folder, whoever writes to it meanwhile.

    Raises:
        InputError: when it is of something else.
    """
    results, items = read_lines(folder / RESULTS), read_lines(folder / ITEMS)
    try:
        records = [Record(**data) for data in results.data]
        contents = {data["digest"]: data["item"] for data in items.data}
        plan = json.loads((folder / PLAN).read_bytes()) if (folder / PLAN).exists() else None
    except (TypeError, KeyError, ValueError, OSError) as error:
        raise InputError(f"{str(folder)!r} holds no study that can be read: {error}") from None
    notices = [
        f"{folder / name}: {_numbered(lines.damaged)} damaged; what stood there is computed again"
        for name, lines in ((RESULTS, results), (ITEMS, items))
        if lines.damaged
    ]
    return Kept(records, contents, plan, notices)


def _numbered(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    return f"line {shown} is" if len(numbers) == 1 else f"lines {shown} are"


class Store:
    """A folder that this process alone writes to, while `opened`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kept = look_into(folder)
        self._results = Appender(folder / RESULTS, read_lines(folder / RESULTS).size)

    @classmethod
    @contextmanager
    def opened(cls, folder: Path) -> Iterator[Store]:
        """The folder, made where it is missing and locked against other processes.

        Raises:
            InputError: when another process writes to it, or it cannot be used.
        """
        with _locked(folder):
            store = cls(folder)
            try:
                yield store
            finally:
                store._results.close()

    def keep(self, study: str, plan: Mapping[str, Any], items: Mapping[str, Mapping[str, Any]]) -> None:
        """Writes the study, what is planned, and the items that are not there yet.

        Raises:
            InputError: when they cannot be written.
        """
        new = {name: item for name, item in items.items() if name not in self.kept.items}
        file = Appender(self.folder / ITEMS, read_lines(self.folder / ITEMS).size)
        try:
            file.append(written({"digest": name, "item": item}) for name, item in new.items())
        finally:
            file.close()
        self._replace(STUDY, study)
        self._replace(PLAN, json.dumps(plan, separators=(",", ":")))

    def add(self, record: Record) -> None:
        """Writes one result.

        Raises:
            InputError: when it cannot be written.
        """
        self._results.append([written(vars(record))])
        self.kept.records.append(record)

    def _replace(self, name: str, text: str) -> None:
        """Writes a file that is there as a whole or not at all."""
        path, new = self.folder / name, self.folder / f"{name}.new"
        try:
            with new.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        except OSError as error:
            raise InputError(f"cannot write {str(path)!r}: {error.strerror}") from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    unusable = f"cannot use the folder {str(folder)!r}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{unusable}: {error.strerror}") from None
    busy = f"another process is running the study in {str(folder)!r}; wait for it, or take another folder"
    with locked(folder / LOCK, unusable=unusable, busy=busy):
        yield
