"""Packages that only some uses need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lazyllm.errors import InputError


def needed(module: str, *, what: str, extra: str) -> Any:
    """A module of an extra.

    Raises:
        InputError: when it is not installed, with what needs it and how to get it.
    """
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise InputError(
            f"{what} needs {package}, which is not installed: pip install lazyllm-torch[{extra}]"
        ) from None
