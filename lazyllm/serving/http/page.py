"""The page in front of the server: files of a folder, which may ask nobody else."""

from __future__ import annotations

from mimetypes import guess_type
from pathlib import Path

from fastapi import APIRouter, Response

from lazyllm.errors import unknown
from lazyllm.serving.http.errors import ApiError

FOLDER = Path(__file__).parents[1] / "page"
START = "index.html"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_router() -> APIRouter:
    """Routes to the page's files, as they are now."""
    files = {path.name: path.read_bytes() for path in sorted(FOLDER.glob("*.*"))}
    router = APIRouter(include_in_schema=False)

    async def start() -> Response:
        return await file(START)

    async def file(name: str) -> Response:
        if name not in files:
            raise ApiError(404, unknown("file", name, files), code="not_found")
        return Response(files[name], media_type=guess_type(name)[0], headers=HEADERS)

    router.add_api_route("/", start)
    router.add_api_route("/page/{name}", file)
    return router
