"""Writing at the end of a file so that nothing that was written is lost."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lazyllm.errors import InputError


def whole_lines(path: Path, mark: bytes, foreign: str) -> tuple[list[bytes], bytes]:
    """The whole lines of a file, and what stands behind the last of them; an absent file has none.

    Args:
        path: the file.
        mark: how its lines begin.
        foreign: what to say of a file none of whose lines begins so.

    Raises:
        InputError: when it cannot be read, or is of something else.
    """
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r}: {error.strerror}") from None
    *whole, rest = content.split(b"\n")
    if content and not any(mark.startswith(line[: len(mark)]) for line in whole or [rest]):
        raise InputError(f"{str(path)!r} is {foreign}")
    return whole, rest


@contextmanager
def locked(path: Path, *, unusable: str, busy: str) -> Iterator[None]:
    """Keeps other processes from a file that is made where it is missing.

    Raises:
        InputError: `unusable` and the reason when it cannot be opened, `busy` when another process has it.
    """
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise InputError(f"{unusable}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(busy) from None
        yield
    finally:
        os.close(file)


class Appender:
    """Writes lines at the end of a file, each on disk before the next; what was cut off before is dropped."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self._size = path, size
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.ftruncate(self._file, size)
        except OSError as error:
            raise InputError(f"cannot write {str(path)!r}: {error.strerror}") from None

    def append(self, lines: Iterable[bytes]) -> None:
        """Writes all of `lines`, or raises with the file as it was before.

        Raises:
            InputError: when the disk is full, or fails otherwise.
        """
        content = b"".join(lines)
        try:
            self._write(content)
            os.fsync(self._file)
        except OSError as error:
            with suppress(OSError):  # else the rest of the line is dropped when the file is opened next
                os.ftruncate(self._file, self._size)
            raise InputError(
                f"cannot write {str(self.path)!r}: {error.strerror}; everything before is kept, "
                "and the same command goes on from there"
            ) from None
        self._size += len(content)

    def _write(self, content: bytes) -> None:
        done = 0
        while done < len(content):
            done += os.pwrite(self._file, content[done:], self._size + done)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)
