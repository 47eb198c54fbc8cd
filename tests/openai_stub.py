"""A server that speaks as much of OpenAI's API as the LangChain example needs, and keeps what it was asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

USAGE = {
    "prompt_tokens": 5000,
    "completion_tokens": 3,
    "total_tokens": 5003,
    "prompt_tokens_details": {"cached_tokens": 0},
    "lazyllm": {
        "computed_fraction": 0.125,
        "revived_tokens": 42,
        "queued_seconds": 0.0,
        "ttft_seconds": 0.5,
        "seconds": 1.0,
    },
}


class Handler(BaseHTTPRequestHandler):
    """Keeps every request's body in `server.asked`."""

    def do_GET(self) -> None:
        self._send({"object": "list", "data": [{"id": "tiny", "object": "model", "created": 0, "owned_by": "lazyllm"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        said = f"asked with {asked['lazyllm']['policy']}"
        if asked.get("stream"):
            self._stream([*said], asked["model"])
        else:
            choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
            self._send(body("chat.completion", asked["model"], [choice], usage=USAGE))

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, data: dict[str, Any]) -> None:
        content = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _stream(self, pieces: list[str], model: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for piece in pieces:
            choice = {"index": 0, "delta": {"content": piece}, "finish_reason": None}
            self._event(body("chat.completion.chunk", model, [choice]))
        self._event(body("chat.completion.chunk", model, [{"index": 0, "delta": {}, "finish_reason": "stop"}]))
        self._event(body("chat.completion.chunk", model, [], usage=USAGE))
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, data: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")


def body(kind: str, model: str, choices: list[Any], **more: Any) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "object": kind, "created": 0, "model": model, "choices": choices, **more}


@contextmanager
def openai_stub() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Where its API is, and what it was asked so far."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", server.asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
