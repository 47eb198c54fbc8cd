"""A server of a scripted engine in a process of its own: `python -m tests.served SCRIPT DRAIN`; it says its port."""

import sys
import time

from lazyllm.serving.http.server import Server, listen, run_server
from lazyllm.serving.http.settings import ServerSettings
from tests.fake_engine import FakeEngine, Run


def until_closing(run: Run) -> None:
    """A reply whose end comes after the engine was told to close."""
    run.say(["one "])
    while engine.is_open:
        time.sleep(0.01)
    time.sleep(0.3)
    run.say(["end"])
    run.end()


def endless(run: Run) -> None:
    """A reply that has no end."""
    run.say(["one "])
    run.wait()


if __name__ == "__main__":
    engine = FakeEngine({"until_closing": until_closing, "endless": endless}[sys.argv[1]])
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        server = Server(
            engine,
            ServerSettings(name="tiny"),
            drain_seconds=float(sys.argv[2]),
            on_start=lambda: print(port, flush=True),
        )
        run_server(server, listener)
