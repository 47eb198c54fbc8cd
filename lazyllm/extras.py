"""Packages that only some uses need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lazyllm.errors import MissingExtra


def installed_by(extra: str) -> str:
    """The command that installs an extra, as a shell takes it."""
    return f'pip install "lazyllm-torch[{extra}]"'


def needed(module: str, *, what: str, extra: str) -> Any:
    """A module of an extra.

    Raises:
        MissingExtra: when it is not installed, with what needs it and how to get it.
    """
    try:
        return import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        missing = MissingExtra(f"{what} needs {package}, which is not installed: {installed_by(extra)}")
        missing.name = package
        raise missing from None
