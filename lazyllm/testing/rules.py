"""The rules of the kit, the error that names one, and those that every policy has to keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from lazyllm.config import LazyConfig
from lazyllm.errors import ConfigError, LazyLLMError
from lazyllm.policies.base import Policy

RULES: dict[str, str] = {
    "frozen": "no field of a policy can be set",
    "round trip": "a configuration that holds the policy comes back equal from JSON and from YAML, by its import path",
    "runs": "it works on a prompt of any length, or says in an error of lazyllm's why it cannot",
    "stateless": "it answers the same whatever it was asked before, and its fields stay as they are",
    "untouched": "the model is as it was before, after an error too (law 7)",
    "shape": "a scorer gives one score per visible token, [v]",
    "dtype": "scores are floating",
    "finite": "scores are neither NaN nor infinite",
    "deterministic": "asked twice with the same context, a scorer gives the same scores",
    "pure": "what a policy is shown it does not change",
    "remembered": "features are finite, one row per computed token and as wide as `remembered_values` says",
    "observed": "what a scorer observes of a step is finite, one number per attended token, [k]",
    "protected": "protected tokens enter every layer",
    "nested": "what is visible at a layer was visible at the layer before",
    "rows": "a row of a batch gets what it gets alone",
    "cuts": "`cuts` maps layers of the model to `Keep`s, with a ratio in (0, 1] and a limit of at least one token",
    "ratios": "`keep_ratios` gives one ratio in (0, 1] per layer",
    "falling": "what may enter does not rise from layer to layer",
    "adapts": "a `Keep` that goes by the scores sets `adapts`; it takes what exists, and no more than its limit",
    "stores": "new stores are empty, each of its own, and give back what was put into them",
    "law 1": "no token is computed twice at a layer, but for what `retreat` gave up",
    "ledger": "the depths of the tokens, and their counts, say what was computed",
    "kept": "a layer stores K/V of the tokens that are deeper, and no others; fewer where `eviction` lets them go",
    "frontier": "each token that waits has one finite state to go on from, where the cache revives; else none has",
    "bound": "no more is stored than `eviction` and `retreat` allow",
    "bytes": "bytes are counted, and none after a reset",
    "crop": "a crop takes the last columns out, and leaves the K/V of the others as they were",
    "reorder": "rows change places, and go on as they would have",
    "fork": "a fork and a deep copy go on by themselves, and leave what they came from as it was",
    "saved": "what is saved to a file and loaded holds the same, and goes on the same",
    "failing step": "a step that raises leaves the cache as it was",
}
"""What the kit checks, by the name a violation gives."""


class ContractViolation(AssertionError):
    """A policy broke a rule.

    Attributes:
        rule: which one, a key of `RULES`.
        policy: the policy, as text.

    Args:
        rule: which one.
        policy: the policy.
        found: what was seen, with the value.
    """

    def __init__(self, rule: str, policy: object, found: str) -> None:
        super().__init__(f"{policy} breaks the rule {rule!r}, {RULES[rule]}: {found}")
        self.rule, self.policy = rule, str(policy)


def require(kept: bool, rule: str, policy: object, found: object) -> None:
    """Raises a `ContractViolation` that shows what was found, unless the rule was kept."""
    if not kept:
        raise ContractViolation(rule, policy, str(found))


@contextmanager
def running(policy: object, doing: str, *, may_refuse: bool = False) -> Iterator[None]:
    """Takes any error for a breach of the rule "runs"; with `may_refuse`, lets those of lazyllm's end what is done."""
    try:
        yield
    except ContractViolation:
        raise
    except LazyLLMError as error:
        if not may_refuse:
            raise ContractViolation("runs", policy, f"{doing}: {type(error).__name__}: {error}") from error
    except Exception as error:
        raise ContractViolation("runs", policy, f"{doing}: {type(error).__name__}: {error}") from error


def check_kind(policy: object, kind: type[Policy]) -> None:
    """Refuses what is no instance of the kind the check is for.

    Raises:
        ConfigError: in that case.
    """
    if not isinstance(policy, kind):
        what = f"the class {policy.__name__}" if isinstance(policy, type) else repr(policy)
        raise ConfigError(f"the check takes instances of {kind.__name__}, not {what}")


def check_value(policy: Policy, axis: str) -> None:
    """The rules "frozen" and "round trip"."""
    for name in type(policy).model_fields:
        try:
            setattr(policy, name, getattr(policy, name))
        except ValidationError:
            continue
        raise ContractViolation("frozen", policy, f"the field {name!r} can be set")
    require(bool(type(policy).model_config.get("frozen")), "frozen", policy, "its model_config says frozen=False")
    config = LazyConfig(**{axis: policy})
    for form, write in (("JSON", config.to_json), ("YAML", config.to_yaml)):
        back = _read_back(policy, form, write, axis)
        same = type(back) is type(policy) and back == policy
        require(same, "round trip", policy, f"{form} gives back {back!r}")


def _read_back(policy: Policy, form: str, write: Callable[[], str], axis: str) -> Any:
    try:
        return getattr(LazyConfig.from_text(write()), axis)
    except Exception as error:
        hint = "" if "<locals>" not in type(policy).__qualname__ else "; define the class at the top of a module"
        raise ContractViolation("round trip", policy, f"{form}: {type(error).__name__}: {error}{hint}") from error


@contextmanager
def stateless(policy: Policy) -> Iterator[None]:
    """The rule "stateless", as far as it is about fields."""
    before = _inner(policy)
    yield
    after = _inner(policy)
    require(after == before, "stateless", policy, f"its fields were {before} and are {after}")


def _inner(policy: Policy) -> str:
    """Fields and private attributes as text."""
    return repr((dict(policy), policy.__pydantic_private__))
