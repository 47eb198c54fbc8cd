"""Servers for tests: apps that are called in this process, and servers on a port."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.testclient import TestClient

from lazyllm.serving.http import ServerSettings, create_app
from lazyllm.serving.http.server import Server, listen, run_server
from tests.fake_engine import PATIENCE

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "w1 w2 ?"}]}
TEXT = {"model": "tiny", "prompt": "w1 w2 w3"}
CHATS, TEXTS, DOCUMENTS = "/v1/chat/completions", "/v1/completions", "/v1/documents"


def client_of(engine: Any, **settings: Any) -> TestClient:
    """A client of an app in this process."""
    return TestClient(create_app(engine, ServerSettings(**{"name": "tiny", **settings})))


@contextmanager
def serving(engine: Any, *, drain_seconds: float = 2.0, **settings: Any) -> Iterator[int]:
    """The port of a server in a thread."""
    started = threading.Event()
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        server = Server(
            engine,
            ServerSettings(**{"name": "tiny", **settings}),
            drain_seconds=drain_seconds,
            on_start=started.set,
        )
        thread = threading.Thread(target=run_server, args=(server, listener), daemon=True)
        thread.start()
        assert started.wait(PATIENCE)
        try:
            yield port
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive(), "the server did not end"


def request_bytes(path: str, body: Any, *, headers: str = "") -> bytes:
    """A request as it goes over the wire."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


@contextmanager
def connection(port: int, *, buffer: int | None = None) -> Iterator[socket.socket]:
    """A connection to a server; `buffer` bounds what the kernel keeps of what was not read."""
    with socket.socket() as sock:
        if buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        sock.settimeout(PATIENCE)
        sock.connect(("127.0.0.1", port))
        yield sock


def events(text: str) -> list[Any]:
    """The events of a stream; the last one says that it is complete."""
    told = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [one if one == "[DONE]" else json.loads(one) for one in told]


def soon(condition: Any) -> bool:
    """Whether something comes true before patience is over."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.005)
    return False
