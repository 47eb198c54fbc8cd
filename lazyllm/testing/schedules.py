"""The check of schedules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor

from lazyllm.caches.aux_cache import AuxCache
from lazyllm.errors import ConfigError
from lazyllm.pipeline import LazyPipeline
from lazyllm.policies.base import Keep, Phase, Schedule
from lazyllm.policies.scorers import Random
from lazyllm.testing.models import LEAST_LAYERS, tiny_models, untouched
from lazyllm.testing.rules import ContractViolation, check_kind, check_value, require, running, stateless
from lazyllm.testing.runs import PROTECT, Run, batch_ids, check_steps, difference

MOST_LAYERS = 40
CONTEXTS = (1, 2, 3, 17, 100, 511, 512, 1000, 4096, 10_000)
PHASES = [Phase(*values) for values in product((True, False), CONTEXTS, (True, False))]
ASKED_LAYERS, ASKED_CONTEXTS, PROTECTED = (1, 2, 4, 12, 32, 40), (1, 17, 512, 10_000), (0, 1, 5)
"""Models, contexts, and numbers of protected tokens for which a `Keep` is asked."""

Cuts = dict[int, Keep]


def check_schedule(*schedules: Schedule) -> None:
    """Checks schedules for models of 1 to 40 layers and contexts of 1 to 10,000 tokens, then runs them on tiny models.

    A schedule may refuse a model with a `ConfigError`, as one that names layer 30 refuses a model of 4 layers.

    Args:
        schedules: instances.

    Raises:
        ContractViolation: for the first rule that is broken.
        ConfigError: for what is no schedule.
    """
    for schedule in schedules:
        check_kind(schedule, Schedule)
        with stateless(schedule):
            check_value(schedule, "schedule")
            fitting = [layers for layers in range(1, MOST_LAYERS + 1) if _fits(schedule, layers)]
            require(bool(fitting), "runs", schedule, f"it refuses every model of 1 to {MOST_LAYERS} layers")
            _check_again(schedule, [layers for layers in fitting if layers in ASKED_LAYERS])
            _run(schedule, next((layers for layers in fitting if layers >= LEAST_LAYERS), None))


def _fits(schedule: Schedule, layers: int) -> bool:
    """Whether the schedule takes a model of so many layers; if so, what it says of it is checked."""
    if type(schedule).keep_ratios is not Schedule.keep_ratios and not _ratios_fit(schedule, layers):
        return False
    for phase in PHASES:
        cuts = _cuts(schedule, layers, phase)
        if cuts is None:
            return False
        _check_cuts(schedule, layers, phase, cuts)
    return True


def _ratios_fit(schedule: Schedule, layers: int) -> bool:
    """As `_fits`, for the keep ratios."""
    try:
        with running(schedule, f"keep_ratios({layers})"):
            ratios = schedule.keep_ratios(layers)
    except ContractViolation as error:
        if isinstance(error.__cause__, ConfigError):
            return False
        raise
    where = f"for {layers} layers"
    require(len(ratios) == layers, "ratios", schedule, f"{where}, it gives {len(ratios)}")
    for layer, ratio in enumerate(ratios):
        require(0 < ratio <= 1, "ratios", schedule, f"{where}, the ratio of layer {layer} is {ratio}")
    for layer, (before, ratio) in enumerate(pairwise(ratios), start=1):
        require(ratio <= before, "falling", schedule, f"{where}, it rises from {before} to {ratio} at layer {layer}")
    return True


def _cuts(schedule: Schedule, layers: int, phase: Phase) -> Cuts | None:
    """What the schedule cuts; None where it refuses the model."""
    try:
        with running(schedule, f"cuts({layers}, {phase})"):
            cuts: Any = schedule.cuts(layers, phase)
    except ContractViolation as error:
        if isinstance(error.__cause__, ConfigError):
            return None
        raise
    kinds = isinstance(cuts, dict) and all(isinstance(keep, Keep) for keep in cuts.values())
    require(kinds, "cuts", schedule, f"for {layers} layers and {phase}, it gives {cuts!r}")
    return dict(cuts)


def _check_cuts(schedule: Schedule, layers: int, phase: Phase, cuts: Cuts) -> None:
    """The rules "cuts", "falling" and "adapts"."""
    where = f"for {layers} layers and {phase}"
    strange = [layer for layer in cuts if not (isinstance(layer, int) and 0 <= layer < layers)]
    require(not strange, "cuts", schedule, f"{where}, it cuts before layer {next(iter(strange), None)}")
    limits = []
    for layer, keep in sorted(cuts.items()):
        require(0 < keep.ratio <= 1, "cuts", schedule, f"{where}, the ratio of layer {layer} is {keep.ratio}")
        with running(schedule, f"limit({phase.context_tokens})"):
            limit = keep.limit(phase.context_tokens)
        found = f"{where}, the limit of layer {layer} is {limit!r}"
        require(isinstance(limit, int) and limit >= 1, "cuts", schedule, found)
        limits.append(limit)
        if layers in ASKED_LAYERS and phase.context_tokens in ASKED_CONTEXTS:
            _check_keep(schedule, f"{where}, at layer {layer}", keep, phase.context_tokens)
    for (left, before), (right, limit) in pairwise(zip(sorted(cuts), limits, strict=True)):
        found = f"{where}, it rises from {before} tokens at layer {left} to {limit} at layer {right}"
        require(limit <= before, "falling", schedule, found)


def _check_keep(schedule: Schedule, where: str, keep: Keep, context_tokens: int) -> None:
    """The rule "adapts"."""
    limit = keep.limit(context_tokens)
    for name, scores, protected in _asked(context_tokens):
        found = _free(schedule, keep, scores, protected, context_tokens)
        if found is None:
            continue
        shown = f"{where}, of {scores.numel()} {name} scores and {protected} protected tokens it takes {found!r}"
        most = min(scores.numel(), max(0, limit - protected))
        whole = isinstance(found, int) and 0 <= found <= most
        require(whole, "adapts", schedule, f"{shown}; the limit of {limit} leaves at most {most}")
        told = keep.adapts or found == most
        require(told, "adapts", schedule, f"{shown} and not {most}, but does not say that it adapts")


def _free(schedule: Schedule, keep: Keep, scores: Tensor, protected: int, context_tokens: int) -> Any:
    """How many tokens it takes; None where it refuses such scores."""
    found = None
    with running(schedule, f"free_tokens of {type(keep).__name__}", may_refuse=True):
        found = keep.free_tokens(scores.clone(), protected, context_tokens)
    return found


def _asked(context_tokens: int) -> Iterator[tuple[str, Tensor, int]]:
    """Scores [f] of the tokens that are not protected, their kind, and how many are protected."""
    generator = torch.Generator().manual_seed(0)
    for protected in PROTECTED:
        free = min(context_tokens - protected, 200)
        if free < 1:
            continue
        peaked = torch.zeros(free)
        peaked[free // 2] = 1.0
        yield "random", torch.rand(free, generator=generator), protected
        yield "negative", -torch.rand(free, generator=generator), protected
        yield "equal", torch.ones(free), protected
        yield "zero", torch.zeros(free), protected
        yield "peaked", peaked, protected


def _check_again(schedule: Schedule, layers: Sequence[int]) -> None:
    """The rule "stateless": the same questions in another order get the same answers."""
    before = {(number, phase): _described(schedule, number, phase) for number in layers for phase in PHASES}
    for (number, phase), said in reversed(before.items()):
        found = _described(schedule, number, phase)
        shown = f"for {number} layers and {phase} it gave {said}, and when asked again {found}"
        require(found == said, "stateless", schedule, shown)


def _described(schedule: Schedule, layers: int, phase: Phase) -> list[object]:
    """Everything a schedule says of a model, as plain values: layer, kind of keep, its limit, what it takes."""
    tokens = phase.context_tokens
    asked = list(_asked(tokens)) if tokens in ASKED_CONTEXTS else []
    cuts = _cuts(schedule, layers, phase) or {}
    return [
        (layer, str(keep), keep.limit(tokens), [_free(schedule, keep, *one[1:], tokens) for one in asked])
        for layer, keep in sorted(cuts.items())
    ]


def _run(schedule: Schedule, layers: int | None) -> None:
    """Runs it on tiny models, where it takes one that is deep enough for the kit."""
    for model in tiny_models(layers) if layers is not None else []:
        with untouched(model, schedule):
            with running(schedule, "made into a pipeline"):
                pipe = LazyPipeline(model, scorer=Random(), schedule=schedule, cache=AuxCache(), protect=PROTECT)
            with running(schedule, "in a batch of two"):
                batch = Run(pipe, rows=2).play(batch_ids())
            check_steps(batch, schedule)
            for row, own in enumerate(batch_ids()):
                with running(schedule, f"row {row} alone"):
                    alone = Run(pipe, rows=1).play([own])
                found = difference(alone.row(0), batch.row(row))
                require(found is None, "rows", schedule, f"row {row}, alone and in a batch, has other logits, {found}")
