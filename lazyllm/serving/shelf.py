"""Documents that were loaded, for as long as there is room."""

from __future__ import annotations

import secrets
import threading

from lazyllm.contexts.documents import Document
from lazyllm.errors import DocumentGone, InputError


class Shelf:
    """Documents by id; those asked longest ago leave when they hold too much together.

    Args:
        most_bytes: of keys, values and waiting states of all of them.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._lock = threading.Lock()
        self._documents: dict[str, Document] = {}  # asked longest ago first

    def add(self, document: Document) -> str:
        """Takes a document, and gives its id.

        Raises:
            InputError: when it alone holds more than there is room for.
        """
        if _bytes(document) > self.most_bytes:
            raise InputError(
                f"the document holds {_bytes(document):,} bytes, there is room for {self.most_bytes:,} in all"
            )
        name = f"doc-{secrets.token_hex(12)}"
        with self._lock:
            self._documents[name] = document
            self._make_room()
        return name

    def get(self, name: str) -> Document:
        """A document, which is the one used last now.

        Raises:
            DocumentGone: when there is none of that id, or no more.
        """
        with self._lock:
            document = self._documents.pop(name, None)
            if document is None:
                raise DocumentGone(f"there is no document {name[:60]!r} (any more); load it (again)")
            self._documents[name] = document
            return document

    def deepen(self, name: str, question: Document) -> None:
        """What a question has taken deeper is there for the next one, if the document is.

        Args:
            name: its id.
            question: a fork of it, with the question and its reply taken away again.
        """
        with self._lock:
            known = self._documents.get(name)
            if known is not None and question.computed_fraction > known.computed_fraction:
                self._documents[name] = question
                self._make_room()

    @property
    def bytes(self) -> int:
        """What all of them hold."""
        with self._lock:
            return sum(map(_bytes, self._documents.values()))

    def __len__(self) -> int:
        return len(self._documents)

    def _make_room(self) -> None:
        held = sum(map(_bytes, self._documents.values()))
        for name in list(self._documents)[:-1]:
            if held <= self.most_bytes:
                return
            held -= _bytes(self._documents.pop(name))


def _bytes(document: Document) -> int:
    return document.cache.kv_bytes + document.cache.aux_bytes
