"""One request and its answer: work that goes on while its client is there, reads, and has time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeAlias

from fastapi import Response
from fastapi.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from lazyllm.serving.http.errors import CLIENT_GONE, Json, as_api_error, client_gone, reader_too_slow, timed_out
from lazyllm.serving.http.jobs import RequestJobs
from lazyllm.serving.http.record import Record
from lazyllm.serving.http.service import Service

PARTING_SECONDS = 1.0
"""How long a client is given to take the error that ends its stream."""
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Outlet:
    """The way back to a client: one JSON object, or a stream of events.

    Attributes:
        started: whether something was sent, so that the status can no longer change.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self.started = False

    async def whole(self, body: Json) -> None:
        """Sends one object."""
        self.started = True
        await JSONResponse(body)(self._scope, self._receive, self._send)

    async def event(self, data: Json | str) -> None:
        """Sends one event of a stream, which the first one opens."""
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
        await self._send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})

    async def end(self) -> None:
        """Ends a stream."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


Work: TypeAlias = Callable[[RequestJobs, Outlet, Record], Coroutine[Any, Any, None]]
"""What answers a request: it submits jobs and sends what comes of them."""


class Exchange(Response):
    """An answer in the making: its jobs are given up as soon as nobody waits for it.

    Args:
        service: what the app has.
        work: makes the answer.
        lag_events: most events that may wait for the reader; None = any number.
    """

    def __init__(self, service: Service, work: Work, *, lag_events: int | None = None) -> None:
        super().__init__()
        self._service, self._work, self._lag_events = service, work, lag_events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Makes the answer and sends it."""
        record: Record = scope["state"]["record"]
        outlet = Outlet(scope, receive, send)
        seconds = self._service.settings.request_seconds - record.seconds
        with RequestJobs(self._service.engine, lag_events=self._lag_events) as jobs:
            work = self._work(jobs, outlet, record)
            try:
                await while_wanted(work, receive=receive, lagging=jobs.lagging, seconds=seconds)
            except TimeoutError:
                await self._fail(timed_out(self._service.settings.request_seconds), outlet, record)
            except Exception as error:
                await self._fail(error, outlet, record)

    async def _fail(self, error: Exception, outlet: Outlet, record: Record) -> None:
        """Tells the client what went wrong: by the status, or in the stream where that was sent."""
        record.failed(error)
        refused = as_api_error(error)
        if not outlet.started:
            raise refused from error
        if refused.status_code != CLIENT_GONE:
            with suppress(TimeoutError):
                async with asyncio.timeout(PARTING_SECONDS):
                    await outlet.event(refused.body)
                    await outlet.end()


async def while_wanted(work: Awaitable[None], *, receive: Receive, lagging: asyncio.Event, seconds: float) -> None:
    """Does `work` to its end, unless that is not wanted any more; it has then stopped.

    Args:
        work: what is to be done.
        receive: says when the client has gone.
        lagging: set when the client reads too slowly.
        seconds: how much time there is.

    Raises:
        ApiError: when the client has gone, or reads too slowly.
        TimeoutError: when the time is over.
    """
    working = asyncio.ensure_future(work)
    leaving, lag = asyncio.create_task(_gone(receive)), asyncio.create_task(_set(lagging))
    tasks = (working, leaving, lag)
    try:
        done, _ = await asyncio.wait(tasks, timeout=max(0.0, seconds), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if working in done:
        working.result()
    elif leaving in done:
        raise client_gone()
    elif lag in done:
        raise reader_too_slow()
    else:
        raise TimeoutError


async def _gone(receive: Receive) -> None:
    """Returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _set(event: asyncio.Event) -> None:
    await event.wait()
