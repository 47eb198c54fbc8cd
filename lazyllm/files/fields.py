"""Fields as people write them down: a mapping in JSON or YAML, in a text or a file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from lazyllm.errors import ConfigError, unknown


def mapping_in(text: str, source: str, *, known: Iterable[str]) -> dict[str, Any]:
    """The mapping of fields in JSON or YAML text; tags of any kind are refused.

    Args:
        text: what was written.
        source: where it stands, for messages.
        known: names of fields, for messages.

    Raises:
        ConfigError: when the text is empty, no YAML, or no mapping with names.
    """
    try:
        data = _read(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not plain YAML or JSON: {error}") from None
    if not isinstance(data, dict):
        told = "nothing" if data is None else repr(data)[:60]
        raise ConfigError(f"{source} holds {told}, not a mapping of fields")
    if strange := [key for key in data if not isinstance(key, str)]:
        raise ConfigError(f"{source}: {unknown('field', strange[0], known)}")
    return data


def _read(text: str) -> Any:
    """Plain data; JSON first, since YAML would split characters that JSON escapes as surrogate pairs."""
    try:
        return json.loads(text)
    except ValueError:
        return yaml.safe_load(text)


def text_in(path: Path, what: str) -> str:
    """The text of a file.

    Args:
        path: of the file.
        what: it holds, for messages.

    Raises:
        ConfigError: when it cannot be read, or is no text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the {what} {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the {what} {str(path)!r} is not text") from None
