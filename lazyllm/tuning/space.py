"""What is searched: where the cuts stand, how much they keep, and the numbers in a scorer's fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lazyllm.config import LazyConfig
from lazyllm.errors import ConfigError, InputError, unknown
from lazyllm.policies import AttentionMass, Funnel, Schedule, Scorer, Stages

RULES = ("share", "ratio")
"""How a cut may say how much it keeps: a share of the score (`AttentionMass`), or a keep ratio (`Stages`)."""
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""What a number in a scorer's field is multiplied with, as far as the field allows the product."""
UNTUNED = frozenset({"seed", "query"})
"""Fields whose numbers are no amounts: the best of several seeds is a matter of luck, a query names tokens."""
SHARES = {"share": (0.2, 0.98), "second share": (0.2, 0.98)}
RATIOS = {"ratio": (0.02, 0.95), "second ratio": (0.1, 0.9)}
"""The second ratio is a fraction of the first."""
POWERS = (1.0, 3.0)
DIGITS = 3
"""Numbers are rounded before they are tried, so that the file says exactly what was measured."""

Parameters = Mapping[str, Any]


class Space:
    """Configurations with one or two cuts, as parameters of a search.

    Args:
        base: what is not searched: cache, protected tokens, how layers are run, and the scorer to vary.
        layers: of the model.
        rules: those of `RULES` to try.

    Raises:
        InputError: for a rule that does not exist, a cache that prunes nothing, a model with no layer to cut before.
    """

    def __init__(self, base: LazyConfig, layers: int, rules: Sequence[str] = RULES) -> None:
        if strange := [rule for rule in rules if rule not in RULES]:
            raise InputError(unknown("rule", strange[0], RULES))
        if not base.cache.prunes:
            raise InputError(f"with {base.cache} nothing is pruned, so there is nothing to tune")
        self.base, self.layers = base, layers
        self.rules = tuple(rule for rule in RULES if rule in rules)
        self.lowest = int(base.scorer.needs_attention)
        if layers <= self.lowest:
            raise InputError(f"a model of {layers} layer has none to cut before with {base.scorer}")
        self.ladders = ladders(base.scorer)

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """By parameter, what it may be. `place` counts from the first layer that a cut may stand before."""
        found: dict[str, BaseDistribution] = {
            "rule": CategoricalDistribution(self.rules),
            "cuts": IntDistribution(1, 2),
            "place": IntDistribution(1, self.layers - self.lowest, log=True),
            "gap": IntDistribution(1, max(1, self.layers - 1), log=True),
        }
        if "share" in self.rules:
            found |= {name: FloatDistribution(*bounds) for name, bounds in SHARES.items()}
            found["power"] = FloatDistribution(*POWERS)
        if "ratio" in self.rules:
            found |= {name: FloatDistribution(*bounds, log=True) for name, bounds in RATIOS.items()}
        steps = {f"scorer.{path}": IntDistribution(0, len(ladder) - 1) for path, ladder in self.ladders.items()}
        return {**found, **steps}

    @property
    def starts(self) -> list[dict[str, Any]]:
        """What is tried first: early cuts that did well elsewhere, with the scorer as it was given."""
        third = max(1, self.layers // 3)
        known = [
            {"rule": "share", "cuts": 2, "share": 0.9, "second share": 0.7, "power": 1.5},
            {"rule": "ratio", "cuts": 2, "ratio": 0.5, "second ratio": 0.4, "gap": third},
            {"rule": "share", "cuts": 1, "share": 0.5, "power": 1.5},
            {"rule": "ratio", "cuts": 1, "ratio": 0.2},
        ]
        given = numbers(self.base.scorer)
        own = {f"scorer.{path}": ladder.index(given[path]) for path, ladder in self.ladders.items()}
        return [{**self._least, **own, **start} for start in known if start["rule"] in self.rules]

    def config(self, parameters: Parameters) -> LazyConfig:
        """The configuration that parameters mean."""
        scorer = with_fields(self.base.scorer, self._fields(parameters))
        return LazyConfig(**{**dict(self.base), "scorer": scorer, "schedule": self._schedule(parameters)})

    def summary(self, parameters: Parameters) -> str:
        """The cuts and the scorer's own fields in a line."""
        cuts = ", ".join(f"{kept} at {layer}" for layer, kept in self._kept(parameters).items())
        power = f", power {_rounded(parameters['power'])}" if parameters["rule"] == "share" else ""
        fields = "; ".join(f"{path} {value}" for path, value in self._fields(parameters).items())
        return f"{parameters['rule']} {cuts}{power}" + (f"; {fields}" if fields else "")

    def _schedule(self, parameters: Parameters) -> Schedule:
        kept = self._kept(parameters)
        if parameters["rule"] == "ratio":
            return Stages(stages=dict(kept))
        power = _rounded(parameters["power"])
        cuts = [AttentionMass(share=share, start=layer, power=power) for layer, share in kept.items()]
        return cuts[0] if len(cuts) == 1 else Funnel(schedules=tuple(cuts))

    def _kept(self, parameters: Parameters) -> dict[int, float]:
        """By layer of a cut, the share or ratio it keeps. A second cut behind the last layer is none."""
        rule = parameters["rule"]
        first = self.lowest + parameters["place"] - 1
        kept = {first: _rounded(parameters[rule])}
        second = first + parameters["gap"]
        if parameters["cuts"] == 2 and second < self.layers:
            value = parameters[f"second {rule}"]
            kept[second] = _rounded(value if rule == "share" else value * kept[first])
        return kept

    def _fields(self, parameters: Parameters) -> dict[str, Any]:
        """By path of a field of the scorer, its value."""
        return {path: ladder[parameters[f"scorer.{path}"]] for path, ladder in self.ladders.items()}

    @property
    def _least(self) -> dict[str, Any]:
        """By parameter, the first value it may have."""
        return {
            name: known.choices[0] if isinstance(known, CategoricalDistribution) else cast(Any, known).low
            for name, known in self.distributions.items()
        }


def numbers(scorer: Scorer) -> dict[str, Any]:
    """By path, the fields of a scorer and of the scorers in its fields that hold a number, or several."""
    found: dict[str, Any] = {}
    for name in type(scorer).model_fields:
        value = getattr(scorer, name)
        if isinstance(value, Scorer):
            found |= {f"{name}.{path}": number for path, number in numbers(value).items()}
        elif name not in UNTUNED and all(map(_is_number, value if isinstance(value, tuple) else (value,))):
            found[name] = value
    return found


def ladders(scorer: Scorer) -> dict[str, list[Any]]:
    """By path of a field, its value times each of `FACTORS`, as far as the field takes it; where that is several."""
    found = {}
    for path, value in numbers(scorer).items():
        tried = [_scaled(scorer, path, value, factor) for factor in FACTORS]
        rungs = list(dict.fromkeys(rung for rung in tried if rung is not None))
        if len(rungs) > 1:
            found[path] = rungs
    return found


def with_fields(scorer: Scorer, values: Mapping[str, Any]) -> Scorer:
    """A scorer with other values at some paths.

    Raises:
        ConfigError: when a field does not take its value.
    """
    fields = dict(scorer)
    for path, value in values.items():
        name, _, rest = path.partition(".")
        fields[name] = with_fields(fields[name], {rest: value}) if rest else value
    return type(scorer)(**fields)


def _scaled(scorer: Scorer, path: str, value: Any, factor: float) -> Any:
    """The product, as a whole number where the value is one; the next odd one where the field takes no other."""
    for odd in (False, True):
        parts = tuple(_times(part, factor, odd) for part in (value if isinstance(value, tuple) else (value,)))
        scaled = parts if isinstance(value, tuple) else parts[0]
        try:
            with_fields(scorer, {path: scaled})
        except ConfigError:
            continue
        return scaled
    return None


def _times(value: float, factor: float, odd: bool) -> float:
    if factor == 1:
        return value
    if isinstance(value, float):
        return float(f"{value * factor:.4g}")
    return round(value * factor) | odd


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
