"""One frozen object that says everything about a pipeline but the model; the same in Python, JSON and YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, PlainSerializer

from lazyllm.caches import CACHES, AuxCache, CachePolicy
from lazyllm.errors import ConfigError, unknown
from lazyllm.files.fields import mapping_in, text_in
from lazyllm.policies.base import Policy
from lazyllm.policies.nested import AnySchedule, AnyScorer
from lazyllm.policies.protect import Protect
from lazyllm.policies.schedules import Stages
from lazyllm.policies.scorers import LastTokenAttention

PRESET_FOLDER = Path(__file__).parent / "presets"
PAPER_STAGES: dict[int | float, float] = {0.3: 0.7, 0.6: 0.49, 0.9: 0.343}


class LazyConfig(Policy):
    """Scorer, schedule, cache, protected tokens, and how layers are run. Policies are the paper's by default.

    Each policy may be given as an object, a name, a call such as `"WindowAttention(window=16)"`, or a
    mapping with a `name`; classes outside the registries by import path, `"my_module:MyScorer"`.

    Attributes:
        scorer, schedule, cache, protect: the policies.
        chunk: most tokens a layer computes at once. A longer step goes through each layer in pieces, so that its
            activations do not grow with the prompt; what is kept is still chosen from the whole prompt.
        compile: whether steps of one token run layers compiled by torch. The first such step takes up to a minute; then
            small models with four-bit weights decode faster, others do not.

    Raises:
        ConfigError: for anything that cannot be, with the nearest name that exists.
    """

    scorer: AnyScorer = Field(default_factory=LastTokenAttention)
    schedule: AnySchedule = Field(default_factory=lambda: Stages(stages=PAPER_STAGES))
    cache: Annotated[CachePolicy, BeforeValidator(CACHES.build), PlainSerializer(CACHES.describe)] = Field(
        default_factory=AuxCache
    )
    protect: Protect = Field(default_factory=Protect)
    chunk: Annotated[int, Field(ge=1)] = 8192
    compile: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `LazyConfig(**data)` turns back into this object."""
        data: dict[str, Any] = json.loads(self.model_dump_json())
        return data

    def to_json(self) -> str:
        """The configuration as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def to_yaml(self) -> str:
        """The configuration as YAML text."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def save(self, path: str | Path) -> Path:
        """Writes a `.json`, `.yaml` or `.yml` file."""
        path = Path(path)
        path.write_text(self.to_json() if path.suffix == ".json" else self.to_yaml(), encoding="utf-8")
        return path

    @classmethod
    def from_text(cls, text: str, *, source: str = "text") -> LazyConfig:
        """The configuration in JSON or YAML text; tags of any kind are refused.

        Raises:
            ConfigError: when the text is empty, no YAML, or no configuration.
        """
        return cls(**mapping_in(text, source, known=cls.model_fields))

    @classmethod
    def load(cls, path: str | Path) -> LazyConfig:
        """Reads a JSON or YAML file.

        Raises:
            ConfigError: when there is no such file, or it is no configuration.
        """
        path = Path(path)
        return cls.from_text(text_in(path, "configuration"), source=str(path))

    @classmethod
    def preset(cls, name: str | Path) -> LazyConfig:
        """A shipped preset by name, or a configuration file by path.

        Raises:
            ConfigError: when there is neither.
        """
        shipped = preset_names()
        if str(name) in shipped:
            return cls.load(PRESET_FOLDER / f"{name}.yaml")
        if Path(name).suffix in (".json", ".yaml", ".yml"):
            return cls.load(name)
        raise ConfigError(unknown("preset", str(name), shipped) + " Or give the path of a .yaml or .json file.")


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml"))
