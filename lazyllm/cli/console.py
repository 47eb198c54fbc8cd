"""What every command of the command line shares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console

from lazyllm.costs import Device, calibrate
from lazyllm.costs.device import HERE
from lazyllm.errors import LazyLLMError


@contextmanager
def errors_as_lines() -> Iterator[None]:
    """Prints an error lazyllm raised on purpose as one line on stderr, exit code 2."""
    try:
        yield
    except LazyLLMError as error:
        typer.echo("lazyllm: " + "; ".join(str(error).splitlines()), err=True)
        raise typer.Exit(2) from None


def device_named(name: str) -> Device:
    """A device by name, from a file, or this machine, measured."""
    if name == HERE:
        with Console(stderr=True).status("measuring this machine") as status:
            return calibrate(on_part=lambda part: status.update(f"measuring this machine: {part}"))
    return Device.load(name) if Path(name).suffix == ".json" else Device.named(name)
