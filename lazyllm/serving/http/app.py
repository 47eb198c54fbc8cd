"""The app: routes, what stands before them, and what they share."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import lazyllm
from lazyllm.errors import LazyLLMError
from lazyllm.serving.engine import Engine
from lazyllm.serving.http import chat, completions, documents, status
from lazyllm.serving.http.bodies import LimitedRoute
from lazyllm.serving.http.errors import ApiError, as_api_error, refused_body
from lazyllm.serving.http.gate import Gate
from lazyllm.serving.http.log import RequestLog
from lazyllm.serving.http.metrics import Metrics
from lazyllm.serving.http.models import ModelNames
from lazyllm.serving.http.page import page_router
from lazyllm.serving.http.record import record_of
from lazyllm.serving.http.service import Service
from lazyllm.serving.http.settings import ServerSettings

READABLE_HEADERS = ("X-Request-Id", "Retry-After")
"""What scripts of other origins may read, where they may ask at all."""


def create_app(engine: Engine, settings: ServerSettings) -> FastAPI:
    """The API in front of an engine; all it keeps is in `app.state.service`, and the engine is not closed with it.

    Args:
        engine: runs the jobs.
        settings: names, keys and limits.
    """
    app = FastAPI(title="lazyllm", version=lazyllm.__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    metrics = Metrics(engine)
    app.state.service = Service(engine, settings, ModelNames(settings.name, engine.policies), metrics)
    app.include_router(_asking())
    app.include_router(status.router)
    app.include_router(page_router())
    for kind in (HTTPException, RequestValidationError, LazyLLMError):
        app.add_exception_handler(kind, _answer_error)
    app.add_middleware(Gate, settings=settings)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=READABLE_HEADERS,
        )
    app.add_middleware(RequestLog, metrics=metrics)  # the outermost: it sees what the others refuse
    return app


def _asking() -> APIRouter:
    """Routes that ask the engine for something."""
    router = APIRouter(prefix="/v1", route_class=LimitedRoute)
    router.add_api_route("/chat/completions", chat.chat, methods=["POST"], response_model=None)
    router.add_api_route("/completions", completions.complete, methods=["POST"], response_model=None)
    router.add_api_route("/documents", documents.load, methods=["POST"], response_model=None)
    return router


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    """The answer to a request that a route refuses, or fails on."""
    refused: ApiError = refused_body(error) if isinstance(error, RequestValidationError) else as_api_error(error)
    record = record_of(request)
    record.code = record.code or refused.code
    if refused.status_code == 500:
        record.error = record.error or error
    return refused.response
