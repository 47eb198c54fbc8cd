"""A few letters that change whenever a configuration, an item, or anything made of plain values does."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import BaseModel


def digest(thing: Any, *, letters: int = 12) -> str:
    """Hexadecimal letters that change whenever an item or a configuration does.

    What stands at its default does not count, so that a new field leaves earlier results valid. A default that is
    changed leaves them valid too, wrongly: it needs a new version of the measurement.
    """
    return hashlib.sha256(_described(thing).encode(errors="surrogatepass")).hexdigest()[:letters]


def _described(thing: Any) -> str:
    """A value as text; of an object its class, the fields that differ from their default, and what is outside of it."""
    if isinstance(thing, Mapping):
        return "{" + ", ".join(sorted(f"{key!r}: {_described(value)}" for key, value in thing.items())) + "}"
    if isinstance(thing, (list, tuple)):
        return "[" + ", ".join(map(_described, thing)) + "]"
    if isinstance(thing, BaseModel):
        known = type(thing).model_fields.items()
        defaults = {name: field.get_default(call_default_factory=True) for name, field in known}
    elif is_dataclass(thing):
        defaults = {field.name: field.default for field in fields(thing)}
    else:
        return repr(thing)
    told = {name: _described(getattr(thing, name)) for name in sorted(defaults)}
    own = [f"{name}={text}" for name, text in told.items() if text != _described(defaults[name])]
    own += map(_described, getattr(thing, "outside", ()))
    return f"{type(thing).__name__}({', '.join(own)})"
