"""From plain data and a template to one HTML file that asks for nothing else."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from gzip import compress
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from lazyllm.errors import InputError

ASSETS = files("lazyllm.pages") / "assets"
UNSAFE = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}
"""What could end a script or open a comment, as JSON may write it instead."""


def asset(name: str) -> str:
    """Text of a file that belongs to the pages."""
    return (ASSETS / name).read_text(encoding="utf-8")


def render(name: str, *, title: str, data: object, **parts: Any) -> str:
    """The page of the template `NAME.html`, with the styles and the script that its name goes with.

    Args:
        name: of the template, the style sheet and the script.
        title: of the page.
        data: what the script reads.
        parts: what else the template names; text in them is escaped.
    """
    templates = {"base.html": asset("base.html"), "page": asset(f"{name}.html")}
    environment = Environment(loader=DictLoader(templates), autoescape=True, undefined=StrictUndefined)
    script = asset("common.js") + asset(f"{name}.js")
    return environment.get_template("page").render(
        title=title,
        data=Markup(as_json(data)),
        style=Markup(asset("common.css") + asset(f"{name}.css")),
        script=Markup(script),
        script_digest=b64encode(sha256(script.encode()).digest()).decode(),
        **parts,
    )


def save(html: str, path: str | Path) -> Path:
    """Writes a page; half of a character that takes two (a lone surrogate) becomes a replacement character.

    Raises:
        InputError: when the file cannot be written.
    """
    path = Path(path)
    try:
        path.write_bytes(html.encode("utf-8", "xmlcharrefreplace"))
    except OSError as error:
        raise InputError(f"cannot write the page {str(path)!r}: {error.strerror}") from None
    return path


def as_json(data: object) -> str:
    """JSON in ASCII that can stand in a script element whatever the texts in it hold."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).translate(UNSAFE)


def as_numbers(values: NDArray[Any] | Sequence[float], kind: str) -> str:
    """Numbers as base64 of little-endian values of a kind such as "f4"."""
    return b64encode(np.ascontiguousarray(values, dtype=f"<{kind}").tobytes()).decode()


def as_block(data: object) -> str:
    """JSON as base64 of gzip, for what is read only when it is looked at; the same bytes for the same data."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return b64encode(compress(text.encode(), compresslevel=6, mtime=0)).decode()
