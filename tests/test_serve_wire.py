"""The server on a port: clients that go away, read slowly or come too late, and signals."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lazyllm import InputError
from lazyllm.serving.http.server import listen
from lazyllm.serving.jobs import Delta
from tests.fake_engine import PATIENCE, FakeEngine, scripted
from tests.servers import CHAT, CHATS, connection, events, request_bytes, serving, soon

STREAM = {**CHAT, "stream": True}


def said(port: int, line: str) -> bool:
    """Whether a line is among the metrics."""
    caller = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    caller.request("GET", "/metrics")
    text = caller.getresponse().read().decode()
    caller.close()
    return line in text.splitlines()


def read_until(sock: socket.socket, part: bytes) -> bytes:
    data = b""
    while part not in data:
        piece = sock.recv(65536)
        assert piece, data
        data += piece
    return data


# -- clients that go away ---------------------------------------------------------------------------


def test_a_client_that_goes_before_it_has_asked_leaves_nothing_behind():
    engine = FakeEngine()
    with serving(engine) as port:
        with connection(port) as sock:
            sock.sendall(request_bytes(CHATS, CHAT)[:-20])
        line = 'lazyllm_requests_total{route="/v1/chat/completions",status="499"} 1.0'
        assert soon(lambda: said(port, line))
        assert said(port, "lazyllm_disconnects_total 1.0")
    assert not engine.runs


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["whole", "stream"])
def test_a_client_that_goes_while_its_prompt_is_read_gives_its_job_up(body):
    with scripted(lambda run: run.wait()) as engine, serving(engine) as port:
        with connection(port) as sock:
            sock.sendall(request_bytes(CHATS, body))
            run = engine.run()
            assert not run.given_up.wait(0.1)
        assert run.given_up.wait(PATIENCE)
        assert soon(lambda: said(port, "lazyllm_disconnects_total 1.0"))


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["whole", "stream"])
def test_a_client_that_goes_while_its_prompt_is_tokenised_gives_its_job_up(body):
    go_on = threading.Event()
    with scripted(lambda run: run.wait()) as engine, serving(engine) as port:
        encode, begun = engine.encode, threading.Event()

        def slowly(*args, **options):
            begun.set()
            assert go_on.wait(PATIENCE)
            return encode(*args, **options)

        engine.encode = slowly
        with connection(port) as sock:
            sock.sendall(request_bytes(CHATS, body))
            assert begun.wait(PATIENCE)
        time.sleep(0.05)
        go_on.set()
        assert soon(lambda: said(port, "lazyllm_disconnects_total 1.0"))
        assert all(run.given_up.is_set() for run in engine.runs)


def test_a_client_that_goes_while_a_document_is_counted_gives_it_up():
    go_on = threading.Event()
    with scripted(lambda run: run.wait()) as engine, serving(engine) as port:
        begun, start = threading.Event(), engine._start

        def slowly(run, script):
            begun.set()
            assert go_on.wait(PATIENCE)
            return start(run, lambda run: run.wait())

        engine._start = slowly
        with connection(port) as sock:
            sock.sendall(request_bytes("/v1/documents", {"texts": ["w1"]}))
            assert begun.wait(PATIENCE)
        assert soon(lambda: said(port, "lazyllm_disconnects_total 1.0"))
        go_on.set()
        assert engine.run().given_up.wait(PATIENCE)


def test_a_client_that_goes_in_the_middle_of_a_stream_gives_its_job_up():
    def endless(run):
        run.say(["one "])
        run.wait()

    with scripted(endless) as engine, serving(engine) as port:
        with connection(port) as sock:
            sock.sendall(request_bytes(CHATS, STREAM))
            read_until(sock, b"one ")
            assert not engine.run().given_up.is_set()
        assert engine.run().given_up.wait(PATIENCE)


def test_a_reader_that_lags_is_cut_off_and_others_are_not():
    def chatter(run):
        if run.job.sampling.max_tokens == 1:
            run.say()
            run.end()
            return
        for _ in range(100_000):
            run.tell(Delta(0, "x" * 20_000))
            time.sleep(0.001)

    with scripted(chatter) as engine, serving(engine, lag_events=50) as port, connection(port, buffer=4096) as sock:
        sock.sendall(request_bytes(CHATS, STREAM))
        assert engine.run().given_up.wait(PATIENCE)
        assert soon(lambda: said(port, "lazyllm_slow_readers_total 1.0"))
        with connection(port) as other:
            other.sendall(request_bytes(CHATS, {**STREAM, "max_tokens": 1}))
            assert b"three" in read_until(other, b"[DONE]")


def test_a_connection_serves_again_after_a_stream():
    with serving(FakeEngine()) as port:
        caller = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        for _ in range(2):
            caller.request("POST", CHATS, json.dumps(STREAM), {"content-type": "application/json"})
            assert events(caller.getresponse().read().decode())[-1] == "[DONE]"
        caller.close()


# -- ports and ends ---------------------------------------------------------------------------------


def test_a_port_has_one_server():
    with serving(FakeEngine()) as port, pytest.raises(InputError, match=f"port {port} of 127.0.0.1"):
        listen("127.0.0.1", port)


def test_a_host_that_is_none_is_named():
    with pytest.raises(InputError, match="not a host"):
        listen("not a host", 0)


def test_what_runs_on_when_the_time_to_drain_is_over_is_told_so():
    def endless(run):
        run.say(["one "])
        run.wait()

    with scripted(endless) as engine:
        with serving(engine, drain_seconds=0.2) as port:
            sock = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
            sock.sendall(request_bytes(CHATS, STREAM))
            read_until(sock, b"one ")
        assert b"shutting_down" in read_until(sock, b"shutting_down")
        sock.close()


def test_a_first_interrupt_drains_and_a_second_one_ends_at_once():
    command = [sys.executable, "-m", "tests.served"]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)
    try:
        port = int(process.stdout.readline())
        with connection(port) as sock:
            sock.sendall(request_bytes(CHATS, STREAM))
            read_until(sock, b"one ")
            process.send_signal(signal.SIGINT)
            assert soon(lambda: is_closed(port)), "nobody comes in any more"
            assert process.poll() is None
            assert b"two " in read_until(sock, b"two "), "the reply goes on"
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE) == 130
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def is_closed(port: int) -> bool:
    try:
        with connection(port):
            return False
    except ConnectionRefusedError:
        return True
