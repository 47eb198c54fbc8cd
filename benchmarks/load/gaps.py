"""How long running replies wait for their next token while a long prompt is computed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from typing import Any

from lazyllm.errors import EngineError
from lazyllm.evaluation.sections import Section

from .client import Outcome, connected, send
from .figures import percentiles
from .plan import Ask, Texts, streamed

WARM_TOKENS = 4
"""How many tokens each reply has before anything is measured."""
CALM_TOKENS = 40
"""How many more it has before the long prompt is asked."""
ENDLESS_TOKENS = 4000
SHORT_PROMPT = 64
POLLING_SECONDS = 0.02


@dataclass
class Gaps:
    """Seconds between two tokens of a running reply, of all replies.

    Attributes:
        calm: while nothing else was asked.
        during: while a long prompt was computed.
        prefills: seconds to the first token of each long prompt.
    """

    calm: list[float] = field(default_factory=list)
    during: list[float] = field(default_factory=list)
    prefills: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Scene:
    """What goes on while gaps are measured.

    Attributes:
        prompt_tokens: of the long prompt.
        replies: how many run.
        bias: of their logits, by token, so that they do not end.
        deadline_seconds: for all of it.
    """

    prompt_tokens: int
    replies: int
    bias: Mapping[str, float]
    deadline_seconds: float


def gaps_within(arrivals: Sequence[float], began: float, ended: float) -> list[float]:
    """Gaps between arrivals that lie in a time, in full or in part."""
    return [after - before for before, after in pairwise(arrivals) if after > began and before < ended]


async def measure(url: str, model: str, texts: Texts, scene: Scene, random: Random, found: Gaps) -> None:
    """Starts replies that do not end, asks a long prompt beside them, and notes the gaps in `found`.

    Raises:
        EngineError: when the long prompt is not answered, or a reply ends before it is.
    """
    options = {"model": model, "temperature": 0, **streamed(True)}
    endless = {**options, "max_tokens": ENDLESS_TOKENS, "logit_bias": dict(scene.bias)}
    replies = [prepared(texts.piece(SHORT_PROMPT, random), endless) for _ in range(scene.replies)]
    long = prepared(texts.piece(scene.prompt_tokens, random), {**options, "max_tokens": 1})
    async with connected(url) as http:
        streams = [asyncio.create_task(send(http, one, deadline_seconds=scene.deadline_seconds)) for one in replies]
        try:
            await _further(replies, WARM_TOKENS)
            calm = time.perf_counter()
            await _further(replies, CALM_TOKENS)
            await send(http, long, deadline_seconds=scene.deadline_seconds)
            await _further(replies, 1)
            ended = [one for one in replies if one.ended]
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
    for one in (*ended, *([] if 0 in long.reasons else [long])):
        raise EngineError(f"a reply of {model} ended too early: {one.trouble or one.error or one.reasons}")
    first = long.arrivals[0] if long.arrivals else long.ended  # an end token has no text
    for one in replies:
        found.calm += gaps_within([at for at in one.arrivals if calm <= at <= long.began], calm, long.began)
        found.during += gaps_within(one.arrivals, long.began, first)
    found.prefills.append(first - long.began)


def prepared(question: str, options: Mapping[str, Any]) -> Outcome:
    """A request that is to be sent, whose outcome is looked at meanwhile."""
    ask = Ask("running", question, options)
    return Outcome(ask, ask.body())


async def _further(replies: Sequence[Outcome], tokens: int) -> None:
    """Returns once each reply has so many more tokens, or has ended."""
    wanted = [len(one.arrivals) + tokens for one in replies]
    while any(len(one.arrivals) < most and not one.ended for one, most in zip(replies, wanted, strict=True)):
        await asyncio.sleep(POLLING_SECONDS)


def table(found: Mapping[tuple[str, int], Gaps], prompt_tokens: int, said: str) -> Section:
    """One line for each preset and size of piece."""
    rows = []
    for (preset, piece), gaps in found.items():
        calm, during = percentiles(gaps.calm, (50, 99, 100)), percentiles(gaps.during, (50, 99, 100))
        rows.append(
            [
                f"`{preset}`",
                f"{piece:,}",
                *(f"{1000 * value:.0f}" for value in (*calm, *during)),
                f"{len(gaps.during)}",
                f"{percentiles(gaps.prefills, (50,))[0]:.2f}",
            ]
        )
    columns = ["preset", "piece", *(f"calm, {name}, ms" for name in ("median", "99 %", "worst"))]
    columns += [f"beside the prompt, {name}, ms" for name in ("median", "99 %", "worst")]
    columns += ["tokens meanwhile", "TTFT of the prompt, seconds"]
    title = f"Gaps between tokens while a prompt of {prompt_tokens:,} tokens is computed"
    return Section(title, said, columns, rows)
