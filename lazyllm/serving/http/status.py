"""Routes that say what there is and how the server does."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client.exposition import choose_encoder

from lazyllm.serving.http.errors import Json
from lazyllm.serving.http.service import service_of

router = APIRouter()


@router.get("/health")
async def health() -> Json:
    """The process is alive."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(request: Request) -> JSONResponse:
    """Whether new requests are taken."""
    is_open = service_of(request).engine.is_open
    return JSONResponse({"status": "ready" if is_open else "closed"}, 200 if is_open else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Counts, as Prometheus reads them."""
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(service_of(request).metrics.registry), headers={"Content-Type": content_type})


@router.get("/v1/models")
async def models(request: Request) -> Json:
    """What models are called: one entry for each policy."""
    service = service_of(request)
    return {"object": "list", "data": service.names.listed(service.started)}


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> Json:
    """One of the models."""
    service = service_of(request)
    meant = service.names.name(service.names.of_model(name))
    return next(entry for entry in service.names.listed(service.started) if entry["id"] == meant)
