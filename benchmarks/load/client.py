"""Clients that ask a server, each request within its time, and note what comes of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import cast

import httpx2

from .plan import Ask, Json, Message, Talk, said

CHATS = "/v1/chat/completions"
DONE = "[DONE]"


@dataclass
class Outcome:
    """What came of a request, as far as it got.

    Attributes:
        ask: what was asked.
        body: what was sent.
        began, ended: when, by `time.perf_counter`.
        status: of the answer; None where none came.
        retry_after: the header of that name.
        texts: what each reply says.
        reasons: why each reply ended, of those that did.
        arrivals: when pieces of text came, of all replies.
        usage: what the server says it has cost.
        error: the error the server told.
        done: whether the answer came to its end.
        left: whether the client went away, as planned.
        trouble: what went wrong on the way.
    """

    ask: Ask
    body: bytes = field(repr=False)
    began: float = 0.0
    ended: float = 0.0
    status: int | None = None
    retry_after: str | None = None
    texts: dict[int, str] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    arrivals: list[float] = field(default_factory=list)
    usage: Json = field(default_factory=dict)
    error: Json | None = None
    done: bool = False
    left: bool = False
    trouble: str | None = None

    @property
    def seconds(self) -> float:
        """From the request to the last that came of it."""
        return self.ended - self.began

    @property
    def ttft_seconds(self) -> float | None:
        """From the request to the first text of a stream; None where none came."""
        return self.arrivals[0] - self.began if self.arrivals else None

    @property
    def reply_tokens(self) -> int:
        """Tokens of all replies, as the server counts them."""
        return int(self.usage.get("completion_tokens", 0))

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were kept of earlier ones, as the server counts them."""
        return int((self.usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0))

    @property
    def seconds_per_token(self) -> float | None:
        """Mean time from one token of a stream to the next; None for less than two."""
        if not self.arrivals or self.reply_tokens < 2:
            return None
        return (self.arrivals[-1] - self.arrivals[0]) / (self.reply_tokens - 1)

    def take_event(self, data: str) -> None:
        """Notes an event of a stream."""
        if data == DONE:
            self.done = True
            return
        chunk = json.loads(data)
        self.error = chunk.get("error") or self.error
        self.usage = chunk.get("usage") or self.usage
        for choice in chunk.get("choices", ()):
            self._take(choice["index"], choice["delta"].get("content"), choice.get("finish_reason"))

    def take_whole(self, data: bytes) -> None:
        """Notes an answer that is one object."""
        answer = json.loads(data)
        self.error = answer.get("error")
        self.usage = answer.get("usage") or {}
        for choice in answer.get("choices", ()):
            self._take(choice["index"], choice["message"]["content"], choice["finish_reason"], told=False)
        self.done = True

    def _take(self, choice: int, text: str | None, reason: str | None, *, told: bool = True) -> None:
        self.texts[choice] = self.texts.get(choice, "") + (text or "")
        if text and told:
            self.arrivals.append(time.perf_counter())
        if reason is not None:
            self.reasons[choice] = reason


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[httpx2.AsyncClient]:
    """Connections to a server, as many as are needed; each request has a time of its own."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False) as http:
        yield http


async def send(http: httpx2.AsyncClient, outcome: Outcome, *, deadline_seconds: float) -> Outcome:
    """Sends a request and notes what comes of it; its client goes away as planned, or when the deadline is over."""
    leaving = outcome.ask.leave.seconds if outcome.ask.leave else float("inf")
    outcome.began = time.perf_counter()
    try:
        async with asyncio.timeout(min(leaving, deadline_seconds)):
            await _exchange(http, outcome)
    except TimeoutError:
        outcome.left = leaving < deadline_seconds
        outcome.trouble = None if outcome.left else f"no end within {deadline_seconds:g} s"
    except (httpx2.HTTPError, ValueError, KeyError) as error:
        outcome.trouble = f"{type(error).__name__}: {error}"
    outcome.ended = time.perf_counter()
    return outcome


async def _exchange(http: httpx2.AsyncClient, outcome: Outcome) -> None:
    ask = outcome.ask
    headers = {"Content-Type": ask.fault.content_type if ask.fault else "application/json"}
    pieces = ask.leave.pieces if ask.leave else None
    async with http.stream("POST", CHATS, content=outcome.body, headers=headers) as response:
        outcome.status, outcome.retry_after = response.status_code, response.headers.get("retry-after")
        if pieces == 0:
            outcome.left = True
        elif response.headers.get("content-type", "").startswith("text/event-stream"):
            await _read(response, outcome, pieces)
        else:
            outcome.take_whole(await response.aread())


async def _read(response: httpx2.Response, outcome: Outcome, pieces: int | None) -> None:
    """Reads a stream, to its end or so many pieces of text."""
    source = cast("AsyncGenerator[httpx2.ServerSentEvent, None]", aiter(httpx2.EventSource(response)))
    async with aclosing(source) as events:
        async for event in events:
            outcome.take_event(event.data)
            if pieces is not None and len(outcome.arrivals) >= pieces:
                outcome.left = True
                return


async def converse(http: httpx2.AsyncClient, talk: Talk, *, deadline_seconds: float) -> list[Outcome]:
    """What comes of requests one after the other, to the first that is not answered."""
    history: list[Message] = []
    outcomes: list[Outcome] = []
    for ask in talk:
        outcome = await send(http, Outcome(ask, ask.body(history)), deadline_seconds=deadline_seconds)
        outcomes.append(outcome)
        if 0 not in outcome.reasons:
            break
        history += [said("user", ask.question), said("assistant", outcome.texts[0])]
    return outcomes


async def drive(
    http: httpx2.AsyncClient, talks: Sequence[Talk], clients: int, *, deadline_seconds: float
) -> list[Outcome]:
    """What comes of talks, in their order, by so many clients, each of which takes a talk when it is done with one."""
    waiting = deque(enumerate(talks))
    outcomes: list[list[Outcome]] = [[] for _ in talks]

    async def client() -> None:
        while waiting:
            number, talk = waiting.popleft()
            outcomes[number] = await converse(http, talk, deadline_seconds=deadline_seconds)

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    return list(chain.from_iterable(outcomes))


async def again(http: httpx2.AsyncClient, outcomes: Sequence[Outcome], *, deadline_seconds: float) -> list[Outcome]:
    """What comes of the same requests, one at a time."""
    return [await send(http, Outcome(one.ask, one.body), deadline_seconds=deadline_seconds) for one in outcomes]
