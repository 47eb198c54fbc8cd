"""Runs an app until it is told to end, and then lets running replies come to their end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable
from math import ceil
from types import FrameType

import uvicorn

from lazyllm.errors import InputError
from lazyllm.serving.engine import Engine
from lazyllm.serving.http.app import create_app
from lazyllm.serving.http.settings import ServerSettings

PARTING_SECONDS = 5
"""How long connections may stay open once the engine is closed."""
INTERRUPTED = 130
"""Exit code after a second Ctrl-C."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that has the port, so that nobody else gets it while a model is loaded.

    Raises:
        InputError: when there is no such host, or the port is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise InputError(f"there is no host {host!r}: {error.strerror}") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise InputError(f"cannot listen on port {port} of {host}: {error.strerror}") from None
    return listener


class Server(uvicorn.Server):
    """A server that closes its engine when it ends.

    Args:
        engine: what the app runs on.
        settings: of the app.
        drain_seconds: how long running replies may go on when the server is to end.
        on_start: called once requests are taken.
    """

    def __init__(
        self,
        engine: Engine,
        settings: ServerSettings,
        *,
        drain_seconds: float = 30.0,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(engine, settings),
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=ceil(drain_seconds) + PARTING_SECONDS,
            )
        )
        self._engine, self._drain_seconds, self._on_start = engine, drain_seconds, on_start

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begins to take requests."""
        await super().startup(sockets)
        self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes nothing new, and waits for what runs."""
        closing = threading.Thread(target=self._engine.close, kwargs={"timeout": self._drain_seconds}, daemon=True)
        closing.start()
        await super().shutdown(sockets)
        await asyncio.to_thread(closing.join)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Ends the server at the first signal, and the process at a second Ctrl-C."""
        if self.should_exit and sig == signal.SIGINT:
            os._exit(INTERRUPTED)  # threads of the engine and the tokenizers would be waited for
        self.should_exit = True


def run_server(server: Server, listener: socket.socket) -> None:
    """Serves until a signal says to end.

    Raises:
        InputError: when another process listens on the port by now.
    """
    try:
        server.run(sockets=[listener])
    except OSError as error:
        raise InputError(f"cannot listen on port {listener.getsockname()[1]}: {error.strerror}") from None
