"""POST /v1/documents: texts that are loaded once, for many questions."""

from __future__ import annotations

from fastapi import Request, Response
from starlette.concurrency import run_in_threadpool

from lazyllm.serving.http.errors import Json
from lazyllm.serving.http.exchange import Exchange, Outlet, Work
from lazyllm.serving.http.jobs import RequestJobs
from lazyllm.serving.http.record import Record
from lazyllm.serving.http.schema import DocumentRequest
from lazyllm.serving.http.service import service_of
from lazyllm.serving.jobs import DocumentLoaded, JobFailed


async def load(request: Request, body: DocumentRequest) -> Response:
    """Loads texts as one document."""
    service = service_of(request)
    policy = body.policy or service.names.default
    service.names.check(policy, param="policy")
    return Exchange(service, _loaded(body, policy))


def _loaded(body: DocumentRequest, policy: str) -> Work:
    async def work(jobs: RequestJobs, outlet: Outlet, record: Record) -> None:
        await run_in_threadpool(jobs.load, body.texts, system=body.system, policy=policy)  # counts their tokens
        async for _, event in jobs:
            if isinstance(event, JobFailed):
                raise event.error
            if isinstance(event, DocumentLoaded):
                await outlet.whole(_told(event))

    return work


def _told(loaded: DocumentLoaded) -> Json:
    return {
        "id": loaded.document,
        "object": "document",
        "tokens": loaded.tokens,
        "depth": loaded.depth,
        "layers": loaded.layers,
        "seconds": loaded.seconds,
        "bytes": loaded.bytes,
    }
