"""A server that says on the wire what a test has written for it; it has no model."""

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

PAGE = files("lazyllm.serving") / "page"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
KINDS = {"html": "text/html; charset=utf-8", "css": "text/css", "js": "text/javascript"}
PATIENCE_SECONDS = 20

Event = dict[str, Any]


class Lost(Exception):
    """Raised by a script: the connection breaks."""


@dataclass(frozen=True)
class Reply:
    """What is said to one request.

    Attributes:
        events: makes the events of a stream; None for a reply in one piece.
        body: of that reply, JSON unless it is a string.
        status, headers: of either.
        piece: bytes of a stream that are written at once; 0 = one event.
        newline: how its lines end.
        done: whether it ends as it should.
    """

    events: Callable[[], Iterator[Event]] | None = None
    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    piece: int = 0
    newline: str = "\n"
    done: bool = True


class Stub:
    """What it was asked, and what it will say.

    Attributes:
        requests: (path, headers, body) of each POST.
        replies: what is said to the next ones, in their order.
        models: ids that are listed, with the policy of each.
        key: without it every request is refused; None = it asks for none.
        left: set when a client goes away within a stream.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.replies: deque[Reply] = deque()
        self.models = {"SmolLM": "recommended", "SmolLM:paper": "paper", "SmolLM:dense": "dense"}
        self.key: str | None = None
        self.left = threading.Event()
        self.url = ""

    def says(self, *replies: Reply) -> None:
        self.replies.extend(replies)

    @property
    def bodies(self) -> list[Any]:
        return [body for _, _, body in self.requests]


@contextmanager
def stub_server() -> Iterator[Stub]:
    """A stub that listens on a free port."""
    stub = Stub()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, stub)) as server:
        stub.url = f"http://127.0.0.1:{server.server_port}/"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield stub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, stub: Stub, *args) -> None:
        self.stub = stub
        super().__init__(*args)

    def log_message(self, *args) -> None:
        """Nothing is logged."""

    def do_GET(self) -> None:
        name = "index.html" if self.path == "/" else self.path.removeprefix("/page/")
        if self.path == "/v1/models":
            listed = self.stub.models.items()
            data = [{"id": name, "object": "model", "lazyllm": {"policy": policy}} for name, policy in listed]
            self._say(Reply(body={"object": "list", "data": data}) if self._is_known() else refusal(401, "no key"))
        elif name in (file.name for file in PAGE.iterdir()):
            kind = KINDS[name.rpartition(".")[2]]
            text = (PAGE / name).read_text(encoding="utf-8")
            self._say(Reply(body=text, headers={"Content-Type": kind, "Content-Security-Policy": POLICY}))
        else:
            self._say(refusal(404, f"no {self.path}"))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.stub.requests.append((self.path, dict(self.headers), body))
        reply = self.stub.replies.popleft() if self._is_known() else refusal(401, "no key")
        if reply.events is None:
            self._say(reply)
        else:
            self._stream(reply, reply.events)

    def _is_known(self) -> bool:
        return self.stub.key is None or self.headers["Authorization"] == f"Bearer {self.stub.key}"

    def _say(self, reply: Reply) -> None:
        data = (reply.body if isinstance(reply.body, str) else json.dumps(reply.body)).encode()
        self._begin(reply, {"Content-Type": "application/json", "Content-Length": str(len(data))})
        self.wfile.write(data)

    def _begin(self, reply: Reply, headers: dict[str, str]) -> None:
        self.send_response(reply.status)
        for name, value in (headers | reply.headers).items():
            self.send_header(name, value)
        self.end_headers()

    def _stream(self, reply: Reply, events: Callable[[], Iterator[Event]]) -> None:
        self._begin(reply, {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"})
        self.close_connection = True
        lines = (json.dumps(event, ensure_ascii=False) for event in events())
        try:
            for data in lines:
                self._write(f"data: {data}{reply.newline * 2}".encode(), reply.piece)
            if reply.done:
                self._write(f"data: [DONE]{reply.newline * 2}".encode(), reply.piece)
            self.wfile.write(b"0\r\n\r\n")
        except Lost:
            return
        except OSError:
            self.stub.left.set()

    def _write(self, data: bytes, piece: int) -> None:
        size = piece or len(data)
        for start in range(0, len(data), size):
            part = data[start : start + size]
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")


# -- what it may say -------------------------------------------------------------------------------


def refusal(status: int, message: str, **headers: str) -> Reply:
    """An error in OpenAI's shape."""
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    return Reply(status=status, body=body, headers={name.replace("_", "-"): text for name, text in headers.items()})


def prompt(*pieces: str) -> Event:
    return {"choices": [], "lazyllm": {"prompt": list(pieces)}}


def depths(reached: dict[int, int] | list[int], layers: int = 30) -> Event:
    """By token, how many layers have computed it."""
    by_token = dict(enumerate(reached)) if isinstance(reached, list) else reached
    told = {"reply": 0, "layers": layers, "tokens": list(by_token), "depths": list(by_token.values())}
    return {"choices": [], "lazyllm": {"depths": told}}


def text(content: str, reason: str | None = None) -> Event:
    return {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": reason}]}


def usage(*, tokens: int = 100, cached: int = 40, reply: int = 3, revived: int = 2, fraction: float = 0.25) -> Event:
    times = {"queued_seconds": 0.0, "ttft_seconds": 0.25, "seconds": 1.5}
    return {
        "choices": [],
        "usage": {
            "prompt_tokens": tokens,
            "completion_tokens": reply,
            "prompt_tokens_details": {"cached_tokens": cached},
            "lazyllm": {"computed_fraction": fraction, "revived_tokens": revived, **times},
        },
    }


def answer(*contents: str) -> Reply:
    """A whole stream without a trace."""
    return Reply(lambda: iter([*map(text, contents), text("", "stop"), usage()]))
