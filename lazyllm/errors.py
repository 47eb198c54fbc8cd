"""Every exception lazyllm raises on purpose.

    LazyLLMError
    ├── ConfigError            a policy, preset or config file says something impossible
    ├── PolicyError            a policy broke its own contract while running
    ├── UnsupportedModelError  the model's layers do not follow the contract lazyllm needs
    ├── AttachError            the model already runs under a LazyStack
    ├── CacheError             a cache is of the wrong kind, model, batch or in use
    ├── InputError             a prompt, mask, position or requested output cannot be used
    │   ├── TooLong            it needs more positions than the model has
    │   └── MissingExtra       a package is not installed that only some uses need
    ├── EngineError            another engine, run beside lazyllm to compare them, failed
    └── ServingError           a job cannot be done now, or no more
        ├── QueueFull          as many jobs wait as may; try again later
        ├── Closed             the engine takes no more jobs
        ├── ReplicaLost        the process that did it is gone
        └── Cancelled          the job was given up by whoever asked for it

`ConfigError` and `InputError` are also `ValueError`, and `MissingExtra` is an `ImportError` too, so generic callers may
catch these.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class LazyLLMError(Exception):
    """Base of all errors lazyllm raises on purpose."""


class ConfigError(LazyLLMError, ValueError):
    """A policy, preset or configuration file says something impossible."""


class PolicyError(LazyLLMError):
    """A policy broke its contract while running, e.g. a scorer returned NaN."""


class UnsupportedModelError(LazyLLMError):
    """The model does not follow the layer contract; the message names what is missing."""


class AttachError(LazyLLMError):
    """The model already runs under a LazyStack."""


class CacheError(LazyLLMError):
    """A cache is of the wrong kind, belongs to another model or batch, or is in use."""


class InputError(LazyLLMError, ValueError):
    """A prompt, mask, position or requested output cannot be used."""


class TooLong(InputError):
    """A prompt and its reply need more positions than the model has."""


class DocumentGone(InputError):
    """A document that an engine was asked for is not loaded, or no more."""


class MissingExtra(InputError, ImportError):
    """A package is not installed that only some uses need; the message names the extra that has it."""


class EngineError(LazyLLMError):
    """Another engine, run beside lazyllm to compare them, failed; the message says what it said last."""


class ServingError(LazyLLMError):
    """A job cannot be done now, or no more; nothing is wrong with it."""


class QueueFull(ServingError):
    """As many jobs wait as may.

    Attributes:
        retry_seconds: when it may be worth trying again.
    """

    def __init__(self, message: str, retry_seconds: float) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds

    def __reduce__(self) -> tuple[type[QueueFull], tuple[str, float]]:
        """For its way between processes."""
        return type(self), (str(self), self.retry_seconds)


class Closed(ServingError):
    """The engine takes no more jobs."""


class ReplicaLost(ServingError):
    """The process that did the job is gone; it may be tried again."""


class Cancelled(ServingError):
    """The job was given up by whoever asked for it."""

    def __init__(self, message: str = "the job was given up") -> None:
        super().__init__(message)


LEAST_BEGUN = 3
"""Letters by which the rest of a name can be guessed."""


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """Message for an unknown name: shows it, the nearest one that exists, and all that exist."""
    names, given = sorted(known), str(name)
    begun = [one for one in names if one.startswith(given)] if len(given) >= LEAST_BEGUN else []
    near = begun or get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}."
