"""What every command of the command line shares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from lazyllm.errors import LazyLLMError


@contextmanager
def errors_as_lines() -> Iterator[None]:
    """Prints an error lazyllm raised on purpose as one line on stderr, exit code 2."""
    try:
        yield
    except LazyLLMError as error:
        typer.echo("lazyllm: " + "; ".join(str(error).splitlines()), err=True)
        raise typer.Exit(2) from None
