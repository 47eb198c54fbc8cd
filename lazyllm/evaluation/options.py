"""Options of a command line that take a list."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lazyllm.errors import InputError, unknown


def names_in(text: str, *, known: Iterable[str] | None = None) -> list[str]:
    """The names between commas; commas in brackets are part of a name, as in `needle(depth=0.5, tokens=4000)`.

    Raises:
        InputError: when there is none, or one that is not `known`.
    """
    names = [name.strip() for name in re.split(r",(?![^()]*\))", text) if name.strip()]
    if not names:
        raise InputError(f"an option that takes a list got an empty one ({text!r}); separate its values by commas")
    if known is not None and (strange := [name for name in names if name not in known]):
        raise InputError(unknown("value", strange[0], known))
    return names


def numbers_in(text: str) -> list[int]:
    """The positive whole numbers between commas.

    Raises:
        InputError: when there is none, or something else.
    """
    names = names_in(text)
    if wrong := [name for name in names if not name.isdecimal() or int(name) == 0]:
        raise InputError(f"a number of tokens is a positive whole number, not {wrong[0]!r}")
    return [int(name) for name in names]
