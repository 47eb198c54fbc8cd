"""What every command of the command line shares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lazyllm.costs import Device, calibrate
from lazyllm.costs.device import HERE
from lazyllm.errors import InputError, LazyLLMError
from lazyllm.evaluation.data import model_source
from lazyllm.models.loading import dtype_named, load_model


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


def device_of(name: str) -> torch.device:
    """Where a model is to run.

    Raises:
        InputError: when there is no such device.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"cannot use the device {name!r}: {str(error).splitlines()[0]}") from None


def load_or_refuse(
    model: str,
    gguf_file: str | None,
    dtype: str,
    weights: str | None,
    *,
    device: torch.device | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer.

    Args:
        model: hub id, folder or `.gguf` file; "packaged" is the SmolLM2 that comes as a Python package.
        gguf_file, weights, options: as for `load_model`.
        dtype: "auto", or the name of one.
        device: where the model is moved; None = it stays where it was loaded.

    Raises:
        InputError: whatever keeps it from loading, such as a folder that was copied half.
    """
    kind = dtype if dtype == "auto" else dtype_named(dtype)
    try:
        loaded, tokenizer = load_model(model_source(model), gguf_file=gguf_file, dtype=kind, weights=weights, **options)
        return (loaded if device is None else loaded.to(device)), tokenizer
    except InputError:
        raise
    except Exception as error:  # whatever a checkpoint, a tokenizer or a device comes up with
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"cannot load the model {model!r}: {reason}") from None
