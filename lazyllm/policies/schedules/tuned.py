"""A schedule that was found for one model, in a file that `lazyllm tune` wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from lazyllm.errors import ConfigError
from lazyllm.models.fingerprint import fingerprint
from lazyllm.policies.base import Keep, Phase, Policy, Schedule, Value, policies_in
from lazyllm.policies.nested import AnySchedule, AnyScorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KIND = "lazyllm tune"
VERSION = 1


class Measured(Value):
    """What a configuration did on a set of prompts.

    Attributes:
        prompts: how many.
        divergence: mean Kullback-Leibler divergence of the next token from the dense model's, nats per token.
        speedup: operations of a dense prefill over those of the pruned one.
    """

    prompts: Annotated[int, Field(ge=1)]
    divergence: Annotated[float, Field(ge=0)]
    speedup: Annotated[float, Field(gt=0)]


class TunedFile(Value):
    """What stands in the file.

    Attributes:
        kind, version: of the file.
        fingerprint: of the model.
        schedule, scorer: what was found; they belong together.
        target: what was asked for, `{"speedup": 3.0}` or `{"max_loss": 0.01}`.
        new_tokens: how many tokens of each of the dense model's replies were compared.
        training, validation: what it did on the prompts that chose it, and on those that did not.
    """

    kind: Literal["lazyllm tune"] = "lazyllm tune"
    version: Literal[1] = 1
    fingerprint: Annotated[str, Field(min_length=1)]
    schedule: AnySchedule
    scorer: AnyScorer
    target: dict[Literal["speedup", "max_loss"], float]
    new_tokens: Annotated[int, Field(ge=1)]
    training: Measured
    validation: Measured

    @field_validator("schedule")
    @classmethod
    def _check_no_other_file(cls, schedule: Schedule) -> Schedule:
        if any(isinstance(part, Tuned) for part in _parts(schedule)):
            raise ValueError("a tuned schedule cannot stand in another file")
        return schedule

    def save(self, path: str | Path) -> Path:
        """Writes the file as JSON."""
        path = Path(path)
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> TunedFile:
        """Reads a file.

        Raises:
            ConfigError: when it cannot be read, or holds something else or another version.
        """
        name = f"the tuned schedule {str(path)!r}"
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {name}: {error.strerror}") from None
        except ValueError as error:  # no UTF-8, or no JSON
            raise ConfigError(f"{name} is broken or is no JSON: {error}") from None
        if not isinstance(data, dict) or data.get("kind") != KIND:
            raise ConfigError(f"{name} is not a file that `{KIND}` wrote")
        if data.get("version") != VERSION:
            raise ConfigError(f"{name} has version {data.get('version')!r}; this lazyllm reads version {VERSION}")
        try:
            return cls(**data)
        except ConfigError as error:
            raise ConfigError(f"{name} cannot be used: {error}") from None


class Tuned(Schedule):
    """The schedule in a file that `lazyllm tune` wrote; other models than the one it was found for are refused.

    The file is read once, when it is first needed.

    Attributes:
        path: of the file.
    """

    path: Annotated[str, Field(min_length=1)]

    @cached_property
    def file(self) -> TunedFile:
        """What stands in the file.

        Raises:
            ConfigError: when it cannot be used.
        """
        return TunedFile.load(self.path)

    @property
    def outside(self) -> tuple[Value, ...]:
        """The file, which another search may have written anew."""
        return (self.file,)

    def check_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Refuses a model with other weights than the one the schedule was found for."""
        if (found := fingerprint(model)) != self.file.fingerprint:
            raise ConfigError(
                f"the schedule in {self.path!r} was tuned for a model with fingerprint {self.file.fingerprint}, this "
                f"{type(model).__name__} has {found}; load the same weights in the same dtype, or tune it for this one"
            )
        self.file.schedule.check_model(model, tokenizer)

    def cuts(self, layers: int, phase: Phase) -> dict[int, Keep]:
        """Those of the schedule in the file."""
        return self.file.schedule.cuts(layers, phase)


def _parts(policy: Policy) -> Iterator[Policy]:
    """A policy and all it is made of."""
    yield policy
    values: list[Any] = [getattr(policy, name) for name in type(policy).model_fields]
    for part in policies_in(values):
        yield from _parts(part)
