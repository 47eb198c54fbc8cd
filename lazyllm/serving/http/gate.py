"""Who is let in: by the name they call the server, and by their key."""

from __future__ import annotations

from hmac import compare_digest
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from lazyllm.serving.http.errors import ApiError
from lazyllm.serving.http.settings import ServerSettings

OPEN_PATHS = ("/", "/health", "/ready")
"""What needs no key: the page, which asks for one, and what says whether the server is there."""
OPEN_FOLDER = "/page/"


class Gate:
    """Lets requests in that call the server by a name of its own and have a key, where there are such."""

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app, self._hosts = app, settings.hosts
        self._keys = [key.encode() for key in settings.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses a request, or hands it on."""
        refused = self._refusal(scope) if scope["type"] == "http" else None
        await (self._app if refused is None else refused.response)(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        if self._hosts and _host_in(headers.get("host", "")) not in self._hosts:
            return ApiError(403, f"this server is not called {headers.get('host')!r}", code="host_not_allowed")
        if not self._keys or scope["path"] in OPEN_PATHS or scope["path"].startswith(OPEN_FOLDER):
            return None
        if self._knows(headers.get("authorization", "")):
            return None
        fault = "the key is none of this server's" if "authorization" in headers else "a key is needed"
        message = f"{fault}: send the header Authorization: Bearer KEY"
        challenge = {"WWW-Authenticate": "Bearer"}
        return ApiError(401, message, kind="authentication_error", code="invalid_api_key", headers=challenge)

    def _knows(self, authorization: str) -> bool:
        """Whether the header has one of the keys; how long that takes does not tell how much of it is right."""
        scheme, _, key = authorization.partition(" ")
        given = key.strip(" ").encode("latin-1")  # the bytes that were sent
        found = [compare_digest(given, known) for known in self._keys]
        return scheme.lower() == "bearer" and any(found)


def _host_in(header: str) -> str:
    """The name in a header `Host`, without port and brackets; "" for none."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""
