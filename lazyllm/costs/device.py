"""How fast a device is at the kinds of work a decoder does."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import numpy as np
import yaml
from pydantic import Field, ValidationError, model_validator

from lazyllm.errors import ConfigError, InputError, unknown
from lazyllm.models.loading import dtype_named
from lazyllm.policies.base import Value

Positive = Annotated[float, Field(gt=0)]
Seconds = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]

STANDARDISING_PASSES = 6
"""Times a scorer reads or writes each state, where memory is all that limits it."""
HERE = "here"
"""Name of the device that is measured instead of looked up."""


class Rate(Value):
    """Work per second, measured on a grid of sizes; straight lines between logarithms, the nearest value outside.

    Attributes:
        tokens: how many rows the work has, ascending.
        widths: how wide each row is, ascending.
        per_second: by tokens, by width.
    """

    tokens: Annotated[tuple[Positive, ...], Field(min_length=1)]
    widths: Annotated[tuple[Positive, ...], Field(min_length=1)]
    per_second: tuple[tuple[Positive, ...], ...]

    @model_validator(mode="after")
    def _check_grid(self) -> Rate:
        for sizes in (self.tokens, self.widths):
            if list(sizes) != sorted(set(sizes)):
                raise ValueError(f"sizes must ascend, got {sizes}")
        if [len(row) for row in self.per_second] != [len(self.widths)] * len(self.tokens):
            raise ValueError(f"needs {len(self.tokens)} rows of {len(self.widths)} values")
        return self

    @classmethod
    def flat(cls, per_second: float) -> Rate:
        """The same rate at every size."""
        return cls(tokens=(1,), widths=(1,), per_second=((per_second,),))

    def at(self, tokens: float, width: float) -> float:
        """Work per second on `tokens` rows of `width`."""
        rates = np.log(self.per_second)
        by_width = [np.interp(np.log(tokens), np.log(self.tokens), column) for column in rates.T]
        return float(np.exp(np.interp(np.log(width), np.log(self.widths), by_width)))


class Device(Value):
    """A device's numbers, in the dtype they hold for.

    Attributes:
        name: what to call it.
        dtype: of weights, states, keys and values.
        linear: operations per second of a matrix product, by tokens and the root of its inputs times its outputs.
        attention: operations per second of causal attention, by tokens and head size.
        moving: bytes per second of norms, activations and additions, by tokens and numbers per token.
        standardising: bytes per second of states that a scorer standardises and normalises, in float32.
        bytes_per_second: at which weights and K/V are read.
        memory_bytes: that there are.
        layer_seconds: of the host per layer and step, to launch its kernels.
        step_seconds: of the host per step.
        cut_seconds: of the host per cut, however many tokens.
        ranked_token_seconds: of the host per token that a cut ranks.
        parked_token_seconds: of the host per token whose frontier state is put away.
        overlaps: whether the device works while the host launches, so that the longer of the two counts.
        link_bytes_per_second: from a device to the others of its group.
        link_seconds: until a message between two of them begins.
    """

    name: str
    dtype: str
    linear: Rate
    attention: Rate
    moving: Rate
    standardising: Positive
    bytes_per_second: Positive
    memory_bytes: Positive
    layer_seconds: Seconds = 0.0
    step_seconds: Seconds = 0.0
    cut_seconds: Seconds = 0.0
    ranked_token_seconds: Seconds = 0.0
    parked_token_seconds: Seconds = 0.0
    overlaps: bool = False
    link_bytes_per_second: Positive | None = None
    link_seconds: Seconds = 0.0

    @model_validator(mode="after")
    def _check_dtype(self) -> Device:
        dtype_named(self.dtype)
        return self

    @property
    def value_bytes(self) -> int:
        """Bytes of one number."""
        return dtype_named(self.dtype).itemsize

    @classmethod
    def named(cls, name: str) -> Device:
        """A device of `devices.yaml`, e.g. `"h100-sxm"`.

        Raises:
            InputError: for a name that is not there.
        """
        sheets = data_sheets()
        if name not in sheets:
            raise InputError(unknown("device", name, [*sheets, HERE]) + " Or give the path of a .json file.")
        return sheets[name].device(name)

    def save(self, path: str | Path) -> Path:
        """Writes the numbers as JSON."""
        path = Path(path)
        path.write_text(self.model_dump_json(indent=2), encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Device:
        """Reads what `save` wrote.

        Raises:
            InputError: when it cannot be read, or holds no device.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise InputError(f"cannot read the device file {str(path)!r}: {error.strerror}") from None
        except (ValidationError, ConfigError) as error:
            raise InputError(f"{str(path)!r} is no device file: {' '.join(str(error).split())}") from None


class DataSheet(Value):
    """Published peaks, and the share of each that is assumed to be reached.

    Attributes:
        memory_gigabytes: in units of 10**9 bytes.
        teraflops: peak of dense bfloat16 products.
        gigabytes_per_second: peak of the memory.
        link_gigabytes_per_second: peak to the other devices, one direction.
        linear_share, attention_share, memory_share, link_share: reached of these peaks.
        layer_seconds, step_seconds, cut_seconds, ranked_token_seconds, parked_token_seconds, link_seconds: as in
            `Device`.
    """

    memory_gigabytes: Positive
    teraflops: Positive
    gigabytes_per_second: Positive
    link_gigabytes_per_second: Positive
    linear_share: Share = 0.6
    attention_share: Share = 0.35
    memory_share: Share = 0.8
    link_share: Share = 0.7
    layer_seconds: Seconds = 3e-4
    step_seconds: Seconds = 3e-3
    cut_seconds: Seconds = 1e-3
    ranked_token_seconds: Seconds = 2e-7
    parked_token_seconds: Seconds = 4e-7
    link_seconds: Seconds = 2e-5

    def device(self, name: str) -> Device:
        """The device this describes."""
        reached = self.memory_share * self.gigabytes_per_second * 1e9
        return Device(
            name=name,
            dtype="bfloat16",
            linear=Rate.flat(self.linear_share * self.teraflops * 1e12),
            attention=Rate.flat(self.attention_share * self.teraflops * 1e12),
            moving=Rate.flat(reached),
            standardising=reached / STANDARDISING_PASSES,
            bytes_per_second=reached,
            memory_bytes=self.memory_gigabytes * 1e9,
            layer_seconds=self.layer_seconds,
            step_seconds=self.step_seconds,
            cut_seconds=self.cut_seconds,
            ranked_token_seconds=self.ranked_token_seconds,
            parked_token_seconds=self.parked_token_seconds,
            overlaps=True,
            link_bytes_per_second=self.link_share * self.link_gigabytes_per_second * 1e9,
            link_seconds=self.link_seconds,
        )


@cache
def data_sheets() -> dict[str, DataSheet]:
    """Every data sheet of `devices.yaml` by name."""
    text = (files("lazyllm.costs") / "devices.yaml").read_text(encoding="utf-8")
    return {name: DataSheet(**fields) for name, fields in yaml.safe_load(text).items()}
