"""What is varied: an axis names a field and the values it takes, each with a label."""

from __future__ import annotations

import math
import random as randomness
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, model_validator

from lazyllm.caches import CACHES
from lazyllm.errors import ConfigError
from lazyllm.policies import SCHEDULES, SCORERS
from lazyllm.policies.base import Registry, Value

TRIES = 100
"""How often a number is drawn for each that is asked for, to find different ones."""
KINDS = ("values", "sweep", "random", "zip")
"""How an axis says what its field takes; one of these."""


def described(value: Any) -> Any:
    """A value as it would be written in a file: policies as mappings with their name."""
    registries: Sequence[Registry[Any]] = (SCORERS, SCHEDULES, CACHES)
    for registry in registries:
        if isinstance(value, registry.base):
            return registry.describe(value)
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {key: described(part) for key, part in value.items()}
    return [described(part) for part in value] if isinstance(value, (list, tuple)) else value


Written = Annotated[Any, PlainSerializer(described)]
"""Anything that may stand in a configuration."""


@dataclass(frozen=True)
class Level:
    """One point of an axis.

    Attributes:
        label: what it is called.
        changes: values by dotted path of a field.
        parts: of a sweep, its numbers by their names; each name is an axis in tables and figures.
    """

    label: str
    changes: Mapping[str, Any]
    parts: Mapping[str, str] = field(default_factory=dict)


class Span(Value):
    """Evenly spaced numbers, both ends included; evenly in their logarithms with `log`."""

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, serialize_by_alias=True)

    start: Annotated[float, Field(alias="from")]
    to: float
    steps: Annotated[int, Field(ge=2)]
    log: bool = False

    @model_validator(mode="after")
    def _check_log(self) -> Span:
        if self.log and not (self.start > 0 and self.to > 0):
            raise ValueError(f"logarithms need numbers above 0, not {self.start:g} and {self.to:g}")
        return self

    def numbers(self) -> list[float]:
        """All of them, to nine digits."""
        shares = [step / (self.steps - 1) for step in range(self.steps)]
        return [_short(_between(self.start, self.to, share, self.log)) for share in shares]


class Draw(Value):
    """Numbers drawn at random.

    Attributes:
        low, high: the ends, both included.
        log: whether they are drawn evenly in their logarithms.
        whole: whether only whole numbers are drawn.
        step: only `low` and what lies so many steps above it.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False
    step: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _check_ends(self) -> Draw:
        if not self.low < self.high:
            raise ValueError(f"low must lie below high, got {self.low:g} and {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"logarithms need numbers above 0, not {self.low:g}")
        if self.whole and not (self.low.is_integer() and (self.step or 1.0).is_integer()):
            raise ValueError(f"whole numbers begin at one and go by one, not {self.low:g} and {self.step or 1:g}")
        return self

    def numbers(self, rng: randomness.Random, count: int) -> list[float]:
        """So many different ones, or fewer where hardly any are left."""
        found: dict[float, None] = {}
        for _ in range(TRIES * count):
            if len(found) < count:
                found[self._number(rng)] = None
        return list(found)

    def _number(self, rng: randomness.Random) -> float:
        drawn = _between(self.low, self.high, rng.random(), self.log)
        step = self.step or (1.0 if self.whole else None)
        if step is None:
            return _short(drawn)
        most = math.floor((self.high - self.low) / step + 1e-9)
        return _short(self.low + step * min(most, round((drawn - self.low) / step)))


class Axis(Value):
    """A field and what it takes; the study runs every combination of its axes.

    Attributes:
        field: dotted path into a configuration (`protect.recent`), `preset`, or a field of the study (`tokens`).
        values: a list, or a mapping from labels to values.
        sweep: a text with words in capitals, which take the numbers given under the same words in small letters.
        over: these numbers: a list, or `from`, `to` and `steps`. They may also stand beside `sweep` by their own names.
        random: what numbers are drawn from, as many as `draws` says.
        zip: several fields that change together, each with as many values.
        labels: names of the values.
        name: what the axis is called; its field unless given.

    Raises:
        ConfigError: for none or several of values, sweep, random and zip, and for labels that do not fit.
    """

    field: str | None = None
    values: Annotated[tuple[Written, ...] | dict[str, Written] | None, Field(min_length=1)] = None
    sweep: str | None = None
    over: dict[str, Span | Annotated[tuple[float, ...], Field(min_length=1)]] = Field(default_factory=dict)
    random: Draw | None = None
    draws: Annotated[int, Field(ge=1)] = 1
    zip: dict[str, tuple[Written, ...]] | None = None
    labels: tuple[str, ...] | None = None
    name: str = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_collected(kwargs))
        self._check()

    def _check(self) -> None:
        kinds = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(kinds) != 1:
            raise ConfigError(f"an axis has one of {', '.join(KINDS)}; this one has {', '.join(kinds) or 'none'}")
        if (self.field is None) != (self.zip is not None):
            raise ConfigError("an axis names its field, and a zip names its fields itself")
        lengths = {len(values) for values in (self.zip or {}).values()}
        if self.zip is not None and (len(lengths) != 1 or 0 in lengths):
            counts = ", ".join(f"{path}: {len(values)}" for path, values in self.zip.items())
            raise ConfigError(f"what is zipped has equally many values, at least one; here {counts or 'none'}")
        if self.sweep is not None and not self.over:
            raise ConfigError(f"the sweep {self.sweep!r} has no numbers; write KEEP in it and give keep: [0.1, 0.3]")
        self._check_labels()

    def _check_labels(self) -> None:
        count = len(list(self._points(0)))
        if self.labels is not None and (isinstance(self.values, dict) or len(self.labels) != count):
            raise ConfigError(f"{len(self.labels)} labels for {count} values")
        labels = [level.label for level in self.levels(0)]
        if twice := [label for label in labels if labels.count(label) > 1]:
            raise ConfigError(f"two values of {self.title!r} are called {twice[0]!r}; give them labels")

    @property
    def paths(self) -> tuple[str, ...]:
        """The fields it changes."""
        return tuple(self.zip) if self.zip is not None else (str(self.field),)

    @property
    def title(self) -> str:
        """What it is called."""
        return self.name or "+".join(self.paths)

    @property
    def titles(self) -> tuple[str, ...]:
        """What cells are labelled by: its own name, and those of a sweep's numbers."""
        return tuple(dict.fromkeys((self.title, *(self.over if self.sweep is not None else ()))))

    def levels(self, seed: int) -> list[Level]:
        """Its points, in the order they were given; drawn numbers go by the seed and the axis' name."""
        found = list(self._points(seed))
        if self.labels is None:
            return found
        return [replace(level, label=label) for label, level in zip(self.labels, found, strict=False)]

    def _points(self, seed: int) -> Iterator[Level]:
        if self.zip is not None:
            for values in zip(*self.zip.values(), strict=True):
                yield Level(" + ".join(map(shown, values)), dict(zip(self.zip, values, strict=True)))
        elif self.sweep is not None:
            for parts, text in _swept(self.sweep, self.over):
                yield Level(_told(parts), {str(self.field): text}, parts)
        else:
            for label, value in self._values(seed):
                yield Level(label, {str(self.field): value})

    def _values(self, seed: int) -> Iterator[tuple[str, Any]]:
        if isinstance(self.values, dict):
            yield from self.values.items()
        elif self.random is not None:
            rng = randomness.Random(f"{seed} {self.title}")
            yield from ((shown(value), value) for value in self.random.numbers(rng, self.draws))
        else:
            yield from ((shown(value), value) for value in self.values or ())


def _collected(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Takes labels as text, and what stands beside a sweep under names of its own as its numbers.

    Raises:
        ConfigError: for a name that the sweep does not have.
    """
    if isinstance(values := fields.get("values"), Mapping):
        fields = {**fields, "values": {shown(label): value for label, value in values.items()}}
    sweep = fields.get("sweep")
    own = {key: value for key, value in fields.items() if key not in Axis.model_fields}
    if not isinstance(sweep, str) or not own:
        return dict(fields)
    if strange := [key for key in own if key.upper() not in re.findall(r"\w+", sweep)]:
        raise ConfigError(f"the sweep {sweep!r} has no {strange[0].upper()} that {strange[0]!r} could stand for")
    return {key: value for key, value in fields.items() if key not in own} | {"over": {**fields.get("over", {}), **own}}


def _swept(text: str, over: Mapping[str, Span | Sequence[float]]) -> Iterator[tuple[dict[str, str], str]]:
    """Every combination of the numbers, by name, and the text that holds them."""
    columns = [span.numbers() if isinstance(span, Span) else list(map(_short, span)) for span in over.values()]
    for numbers in product(*columns):
        parts = {name: shown(number) for name, number in zip(over, numbers, strict=True)}
        filled = text
        for name, number in parts.items():
            filled = re.sub(rf"\b{name.upper()}\b", number, filled)
        yield parts, filled


def _told(parts: Mapping[str, str]) -> str:
    """The numbers of a sweep as one label."""
    return next(iter(parts.values())) if len(parts) == 1 else ", ".join(" ".join(part) for part in parts.items())


def shown(value: Any) -> str:
    """A value as a label; policies as they stand in a file."""
    value = described(value) if isinstance(value, BaseModel) else value
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, Mapping):
        fields = ", ".join(f"{key}={shown(part)}" for key, part in value.items() if key != "name")
        return f"{value['name']}({fields})" if "name" in value else f"{{{fields}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(shown, value))}]"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _between(low: float, high: float, share: float, log: bool) -> float:
    return low * (high / low) ** share if log else low + (high - low) * share


def _short(number: float) -> float:
    """To nine digits, whole numbers as such, so that 0.3 is written 0.3 and 9 as 9."""
    rounded = float(f"{number:.9g}")
    return int(rounded) if math.isfinite(rounded) and rounded == int(rounded) else rounded
