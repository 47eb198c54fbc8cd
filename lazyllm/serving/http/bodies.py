"""Bodies of requests: how large they may be, how long they may take, and what counts as JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.requests import ClientDisconnect

from lazyllm.serving.http.errors import ApiError, client_gone
from lazyllm.serving.http.service import service_of


class LimitedRequest(Request):
    """A request whose body is read within the server's limits."""

    async def body(self) -> bytes:
        """The body.

        Raises:
            ApiError: when it is no JSON by its header, too large, or does not come in time.
        """
        if not hasattr(self, "_body"):
            settings = service_of(self).settings
            _check_type(self.headers.get("content-type", ""))
            try:
                async with asyncio.timeout(settings.request_seconds):
                    self._body = await self._read(settings.max_body_bytes)
            except TimeoutError:
                raise ApiError(408, f"the body took longer than {settings.request_seconds:g} s") from None
            except ClientDisconnect:
                raise client_gone() from None
        return self._body

    async def _read(self, most: int) -> bytes:
        announced = self.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > most:
            raise _too_large(most)
        body = bytearray()
        async for piece in self.stream():
            body += piece
            if len(body) > most:
                raise _too_large(most)
        return bytes(body)

    async def json(self) -> Any:
        """The body as plain data; nesting is bounded, and numbers are finite.

        Raises:
            ApiError: when it is no such JSON.
        """
        try:
            return from_json(await self.body(), allow_inf_nan=False, cache_strings="none")
        except ValueError as error:
            raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None


def _check_type(content_type: str) -> None:
    """Refuses what pages of other origins could send without being asked."""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, f"the body must be application/json, not {content_type!r}", code="unsupported_media_type")


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most:,} bytes", code="body_too_large")


class LimitedRoute(APIRoute):
    """A route that reads bodies as `LimitedRequest` does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The route's handler."""
        handler = super().get_route_handler()

        async def limited(request: Request) -> Response:
            return await handler(LimitedRequest(request.scope, request.receive))

        return limited
