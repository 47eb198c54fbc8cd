"""What a study runs: one cell is a configuration under the conditions of a setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lazyllm.config import LazyConfig
from lazyllm.errors import ConfigError, InputError, unknown
from lazyllm.evaluation.quality import STOCK
from lazyllm.evaluation.tasks import Layout, check_task
from lazyllm.models.loading import dtype_named
from lazyllm.models.quantize import weights_named

Question = Literal["last", "first", "middle", "later"]
LAYOUTS: dict[Question, Layout] = {
    "last": "question last",
    "first": "question first",
    "middle": "question in the middle",
    "later": "question last",
}
SHORTEST = 300
"""Tokens of a prompt that every task can fill."""
PRESET, CONFIG = "preset", "config"
"""The paths that replace a whole configuration."""


@dataclass(frozen=True)
class ModelRef:
    """What has to be loaded: a model by path or hub id, its dtype, bits of its weights, and a device."""

    model: str
    dtype: str
    weights: str | None
    device: str


@dataclass(frozen=True)
class Setting:
    """The conditions of a cell; the unmodified model is run once under each.

    Attributes:
        ref: the model.
        tokens: length of the prompts.
        question: where in them the question stands; "later" is last, asked once the rest is loaded.
        seed: of the items.
        tasks: how many items of each.
    """

    ref: ModelRef
    tokens: int
    question: Question
    seed: int
    tasks: tuple[tuple[str, int], ...]

    def to_dict(self) -> dict[str, Any]:
        """By the names of a study's fields."""
        return {**vars(self.ref), "tokens": self.tokens, "question": self.question, "seed": self.seed}


@dataclass(frozen=True)
class Cell:
    """One configuration under one setting.

    Attributes:
        name: unique in a study.
        labels: by axis, where on it the cell lies.
        setting: the conditions.
        config: what runs; None for the unmodified model.
    """

    name: str
    setting: Setting
    config: LazyConfig | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_stock(self) -> bool:
        """Whether it is the unmodified model."""
        return self.config is None


def stock_cells(cells: list[Cell]) -> list[Cell]:
    """The unmodified model under each setting of the cells; its name tells where settings differ."""
    settings = list(dict.fromkeys(cell.setting for cell in cells))
    told = [
        setting.to_dict() | {"tasks": "+".join(f"{task}:{count}" for task, count in setting.tasks)}
        for setting in settings
    ]
    varied = [name for name in told[0] if len({facts[name] for facts in told}) > 1]
    return [
        Cell(", ".join([STOCK, *(f"{name}={facts[name]}" for name in varied)]), setting)
        for setting, facts in zip(settings, told, strict=True)
    ]


def apply(setting: Setting, config: LazyConfig, changes: Mapping[str, Any]) -> tuple[Setting, LazyConfig]:
    """Setting and configuration with other values at dotted paths: presets first, then whole policies, then fields.

    Raises:
        ConfigError: for a path that does not exist, or a value that cannot stand there.
    """
    for path in sorted(changes, key=lambda path: (path not in (PRESET, CONFIG), path.count("."))):
        value = changes[path]
        if path in (PRESET, CONFIG):
            config = base_config(value)
        elif path in SETTERS:
            setting = SETTERS[path](setting, value)
        else:
            config = changed(config, path, value)
    return setting, config


def base_config(spec: Any) -> LazyConfig:
    """A configuration, from itself, a preset's name, a path, or a mapping of fields with an optional `preset`.

    Raises:
        ConfigError: when it describes none.
    """
    if isinstance(spec, LazyConfig):
        return spec
    if isinstance(spec, (str, Path)):
        return LazyConfig.preset(spec)
    if not isinstance(spec, Mapping):
        raise ConfigError(f"config is a preset, a path or a mapping of fields, not {spec!r}")
    fields = dict(spec)
    config = LazyConfig.preset(fields.pop("preset")) if "preset" in fields else LazyConfig()
    for path, value in sorted(fields.items(), key=lambda field: field[0].count(".")):
        config = changed(config, path, value)
    return config


def changed(config: LazyConfig, path: str, value: Any) -> LazyConfig:
    """The configuration with another value at a dotted path, such as `protect.recent` or `scorer.pool`.

    Raises:
        ConfigError: when there is no such field, or it cannot have this value.
    """
    head, *rest = path.split(".")
    if head not in LazyConfig.model_fields:
        raise ConfigError(unknown("field", path, [*LazyConfig.model_fields, *SETTERS, PRESET, CONFIG]))
    if not rest:
        return LazyConfig(**dict(config) | {head: value})
    data = config.to_dict()
    inner: Any = data
    for step, name in enumerate([head, *rest[:-1]]):
        inner = _within(inner, name, ".".join(path.split(".")[: step + 1]))
    _put(inner, rest[-1], value, path)
    return LazyConfig(**data)


def _within(inner: Any, name: str, where: str) -> Any:
    if isinstance(inner, list) and name.isdecimal() and int(name) < len(inner):
        return inner[int(name)]
    if isinstance(inner, dict) and name in inner:
        return inner[name]
    known = inner if isinstance(inner, dict) else map(str, range(len(inner))) if isinstance(inner, list) else ()
    raise ConfigError(unknown("field", where, known))


def _put(inner: Any, name: str, value: Any, path: str) -> None:
    if isinstance(inner, list) and name.isdecimal() and int(name) < len(inner):
        inner[int(name)] = value
    elif isinstance(inner, dict):
        inner[name] = value
    else:
        raise ConfigError(f"{path!r} leads into {inner!r}, which has no field {name!r}")


def check_tasks(value: Any, items: int) -> dict[str, int]:
    """Numbers of items by task, from names or from a mapping.

    Raises:
        ConfigError: for an unknown task or option, or a number of items below one.
    """
    names = [value] if isinstance(value, str) else value
    counts = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, items)
    if not counts:
        raise ConfigError("a study has at least one task")
    for task, count in counts.items():
        try:
            check_task(task)
        except InputError as error:
            raise ConfigError(str(error)) from None
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError(f"the task {task!r} needs a whole number of items of at least 1, got {count!r}")
    return counts


def _with_ref(name: str) -> Any:
    def put(setting: Setting, value: Any) -> Setting:
        return check_setting(replace(setting, ref=replace(setting.ref, **{name: value})))

    return put


def _with(name: str) -> Any:
    return lambda setting, value: check_setting(replace(setting, **{name: value}))


def _with_tasks(setting: Setting, value: Any) -> Setting:
    """Tasks without numbers take those they have in the study, or as many items as its first task."""
    known = dict(setting.tasks)
    if not isinstance(value, Mapping):
        names = [value] if isinstance(value, str) else value
        value = {name: known.get(name, setting.tasks[0][1]) for name in names}
    return replace(setting, tasks=tuple(check_tasks(value, 1).items()))


def check_setting(setting: Setting) -> Setting:
    """The setting itself.

    Raises:
        ConfigError: for a value that cannot be.
    """
    try:
        dtype_named(setting.ref.dtype)
        if setting.ref.weights is not None:
            weights_named(setting.ref.weights)
    except InputError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(setting.tokens, int) or setting.tokens < SHORTEST:
        raise ConfigError(f"prompts have at least {SHORTEST} tokens, got {setting.tokens!r}")
    if setting.question not in LAYOUTS:
        raise ConfigError(unknown("place of the question", setting.question, LAYOUTS))
    if isinstance(setting.seed, bool) or not isinstance(setting.seed, int):
        raise ConfigError(f"a seed is a whole number, got {setting.seed!r}")
    return setting


SETTERS: dict[str, Any] = {
    **{name: _with_ref(name) for name in ("model", "dtype", "weights", "device")},
    **{name: _with(name) for name in ("tokens", "question", "seed")},
    "tasks": _with_tasks,
}
"""By field of the study: how it changes a setting."""
