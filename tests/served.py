"""A server of a scripted engine in a process of its own: `python -m tests.served`; it says its port."""

import time

from lazyllm.serving.http.server import Server, listen, run_server
from lazyllm.serving.http.settings import ServerSettings
from tests.fake_engine import FakeEngine, Run


def endless(run: Run) -> None:
    """A reply that goes on once the engine is told to close, and has no end."""
    run.say(["one "])
    while engine.is_open:
        time.sleep(0.01)
    run.say(["two "])
    run.wait()


if __name__ == "__main__":
    engine = FakeEngine(endless)
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        settings = ServerSettings(name="tiny")
        server = Server(engine, settings, drain_seconds=600, on_start=lambda: print(port, flush=True))
        run_server(server, listener)
