"""How long running replies wait for their next token while a long prompt is computed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

import httpx2

from lazyllm.errors import EngineError
from lazyllm.evaluation.sections import Section

from .client import Outcome, connected, send
from .figures import percentiles
from .plan import Ask, Texts, streamed

WARM_TOKENS = 4
"""How many tokens each reply has before anything is measured."""
CALM_SECONDS = 3.0
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


def gaps_within(arrivals: Sequence[float], began: float, ended: float) -> list[float]:
    """Gaps between arrivals that lie in a time, in full or in part."""
    return [after - before for before, after in pairwise(arrivals) if after > began and before < ended]


async def measure(
    url: str,
    model: str,
    texts: Texts,
    found: Gaps,
    *,
    prompt_tokens: int,
    replies: int,
    bias: Mapping[str, float],
    random: Random,
    deadline_seconds: float,
) -> None:
    """Starts replies that do not end, asks a long prompt beside them, and notes the gaps in `found`.

    Raises:
        EngineError: when the long prompt is not answered, or a reply ends before it is.
    """
    options = {"model": model, "temperature": 0, **streamed(True)}
    endless = {**options, "max_tokens": ENDLESS_TOKENS, "logit_bias": dict(bias)}
    async with connected(url) as http:
        outcomes = [Outcome(Ask("running", texts.piece(SHORT_PROMPT, random), endless), b"") for _ in range(replies)]
        async with asyncio.timeout(deadline_seconds), asyncio.TaskGroup() as group:
            streams = [group.create_task(follow(http, outcome)) for outcome in outcomes]
            while any(len(outcome.arrivals) < WARM_TOKENS for outcome in outcomes):
                await asyncio.sleep(POLLING_SECONDS)
            calm = time.perf_counter()
            await asyncio.sleep(CALM_SECONDS)
            long = Ask("long", texts.piece(prompt_tokens, random), {**options, "max_tokens": 1})
            answer = await send(http, long, long.body(), deadline_seconds=deadline_seconds)
            ended = [stream for stream in streams if stream.done()]
            for stream in streams:
                stream.cancel()
    if answer.trouble or answer.status != 200 or ended:
        why = answer.trouble or answer.error or f"{len(ended)} of the running replies ended before"
        raise EngineError(f"{model} did not answer a prompt of {prompt_tokens} tokens: {why}")
    first = answer.arrivals[0] if answer.arrivals else answer.ended
    for outcome in outcomes:
        found.calm += gaps_within([at for at in outcome.arrivals if calm <= at <= answer.began], calm, answer.began)
        found.during += gaps_within(outcome.arrivals, answer.began, first)
    found.prefills.append(first - answer.began)


async def follow(http: httpx2.AsyncClient, outcome: Outcome) -> None:
    """Reads a stream into an outcome that others look at meanwhile."""
    body = outcome.ask.body()
    async with http.stream("POST", "/v1/chat/completions", json=None, content=body, headers=JSON) as response:
        async for event in httpx2.EventSource(response):
            outcome.take_event(event.data)


JSON = {"Content-Type": "application/json"}


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
