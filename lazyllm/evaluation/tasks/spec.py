"""Names of tasks with options, as they are written on a command line."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from typing import Any

from lazyllm.errors import InputError


def parsed(text: str) -> tuple[str, dict[str, Any]]:
    """Name and options of a task, from `needle` or `needle(depth=0.5)`.

    Raises:
        InputError: when it is written otherwise.
    """
    match = re.fullmatch(r"\s*([\w-]+)\s*(?:\((.*)\))?\s*", text)
    try:
        if match is None:
            raise ValueError(text)
        call = ast.parse(f"task({match[2] or ''})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError(text)
        return match[1], {str(part.arg): ast.literal_eval(part.value) for part in call.keywords}
    except (ValueError, SyntaxError):
        raise InputError(f"a task is written like needle or needle(depth=0.5, tokens=4000), not {text!r}") from None


def options_of(task: Callable[..., Any]) -> set[str]:
    """Names of the options that a task takes."""
    parameters = inspect.signature(task).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
