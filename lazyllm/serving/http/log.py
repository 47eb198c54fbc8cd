"""One line of JSON for each request: what it was, how it ended and what it cost; never what it said."""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from datetime import UTC, datetime
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lazyllm.serving.http.errors import CLIENT_GONE, Json, as_api_error
from lazyllm.serving.http.metrics import Metrics
from lazyllm.serving.http.record import Record
from lazyllm.serving.http.replies import usage_of

LOGGER = logging.getLogger("lazyllm.serving")
REQUEST_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
"""What a client may call its request."""


class RequestLog:
    """Gives every request an id and a record, and tells log and metrics how it ended."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hands a request on; an error that nobody foresaw is one of the server."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        record = Record(given if REQUEST_ID.fullmatch(given) else uuid4().hex)
        scope.setdefault("state", {})["record"] = record

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"], headers["X-Content-Type-Options"] = record.request_id, "nosniff"
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception as error:
            record.failed(error)
            if record.status is None:
                await as_api_error(error).response(scope, receive, noted)
        finally:
            self._tell(scope, record)

    def _tell(self, scope: Scope, record: Record) -> None:
        route = getattr(scope.get("route"), "path", "none")
        status = record.status or CLIENT_GONE
        metrics = self._metrics
        metrics.requests.labels(route, str(status)).inc()
        metrics.seconds.labels(route).observe(record.seconds)
        metrics.disconnects.inc(record.code == "client_gone")
        metrics.slow_readers.inc(record.code == "reader_too_slow")
        for usage, replies in record.usages:
            metrics.count_job(usage, replies)
        level = logging.INFO if record.error is None else logging.ERROR
        LOGGER.log(
            level, "request", exc_info=record.error, extra={"fields": _fields(record, scope["method"], route, status)}
        )


def _fields(record: Record, method: str, route: str, status: int) -> Json:
    fields = {
        "request_id": record.request_id,
        "method": method,
        "route": route,
        "status": status,
        "seconds": round(record.seconds, 6),
    }
    if record.code is not None:
        fields["code"] = record.code
    return fields | ({"usage": usage_of(record.costs)} if record.usages else {})


class JsonLines(logging.Formatter):
    """Records of logging as lines of JSON. Of an exception they tell kind and place, since its message may quote."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        line: Json = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage().strip(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and (error := record.exc_info[1]) is not None:
            frames = traceback.extract_tb(error.__traceback__)
            line["error"] = type(error).__name__
            line["frames"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        return json.dumps(line, ensure_ascii=False, default=str)


def log_to_stderr(level: str) -> None:
    """Has this server, and what it stands on, log to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in (LOGGER.name, "uvicorn", "ray.serve"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
