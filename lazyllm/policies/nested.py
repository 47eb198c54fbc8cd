"""Policies inside policies: fields that take whatever a registry can build, and write it down the same way."""

from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

from lazyllm.policies.base import Schedule, Scorer


def _scorer(spec: Any) -> Scorer:
    from lazyllm.policies.scorers import SCORERS

    return SCORERS.build(spec)


def _describe_scorer(scorer: Scorer) -> dict[str, Any]:
    from lazyllm.policies.scorers import SCORERS

    return SCORERS.describe(scorer)


def _schedule(spec: Any) -> Schedule:
    from lazyllm.policies.schedules import SCHEDULES

    return SCHEDULES.build(spec)


def _describe_schedule(schedule: Schedule) -> dict[str, Any]:
    from lazyllm.policies.schedules import SCHEDULES

    return SCHEDULES.describe(schedule)


AnyScorer = Annotated[Scorer, BeforeValidator(_scorer), PlainSerializer(_describe_scorer)]
AnySchedule = Annotated[Schedule, BeforeValidator(_schedule), PlainSerializer(_describe_schedule)]
