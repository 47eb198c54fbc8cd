"""Writing at the end of a file so that nothing that was written is lost."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from lazyllm.errors import InputError


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
