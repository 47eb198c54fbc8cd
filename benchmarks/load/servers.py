"""Servers as processes of their own, which listen to this machine alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx2
import psutil
from prometheus_client.parser import text_string_to_metric_families

from lazyllm.errors import EngineError
from lazyllm.evaluation.workers import LAST_WORDS

HOST = "127.0.0.1"
LOADING_SECONDS = 900.0
ENDING_SECONDS = 15.0
IDLE_SECONDS = 30.0
POLLING_SECONDS = 0.1
QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
"""Variables that keep an engine from asking anybody else."""


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        return int(taken.getsockname()[1])


class ServerProcess:
    """A server that was started; a context that ends it.

    Args:
        name: what errors call it.
        command: the program and its arguments.
        port: where it is to listen.
        log: file that gets what it writes.
        threads: of its computations.
        ready: path that answers with 200 once it takes requests.
        environment: variables it gets beside those of this process.

    Raises:
        EngineError: when it ends, or is not ready in time.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        port: int,
        *,
        log: Path,
        threads: int,
        ready: str = "/health",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.url, self._log = name, f"http://{HOST}:{port}", log
        log.parent.mkdir(parents=True, exist_ok=True)
        variables = {**os.environ, **QUIET, "OMP_NUM_THREADS": str(threads), **(environment or {})}
        with log.open("wb") as words:
            try:
                self._process = subprocess.Popen(command, stdout=words, stderr=subprocess.STDOUT, env=variables)
            except OSError as error:
                raise EngineError(f"{name} did not start: {error}") from None
        self._paused = False
        try:
            self._wait(ready)
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def pause(self) -> None:
        """Takes the processor from it."""
        self._process.send_signal(signal.SIGSTOP)
        self._paused = True

    def go_on(self) -> None:
        """Gives it the processor again."""
        self._process.send_signal(signal.SIGCONT)
        self._paused = False

    def stop(self) -> None:
        """Ends it."""
        if self._paused:
            self.go_on()
        self._process.terminate()
        try:
            self._process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        """The server, until the context is left."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends it."""
        self.stop()

    def _wait(self, path: str) -> None:
        deadline = time.monotonic() + LOADING_SECONDS
        with caller(self.url) as http:
            while not answers(http, path):
                if self._process.poll() is not None:
                    code = self._process.returncode
                    raise EngineError(f"{self.name} ended with exit code {code}{self._last_words()}")
                if time.monotonic() > deadline:
                    raise EngineError(f"{self.name} was not ready within {LOADING_SECONDS:g} s{self._last_words()}")
                time.sleep(POLLING_SECONDS)

    def _last_words(self) -> str:
        words = self._log.read_text(errors="replace").strip().splitlines()[-LAST_WORDS:]
        return "; it last said: " + " | ".join(words) if words else ""


@contextmanager
def alone(server: ServerProcess, others: Sequence[ServerProcess]) -> Iterator[None]:
    """Has one server compute while the others stand still."""
    for other in others:
        if other is not server:
            other.pause()
    try:
        yield
    finally:
        for other in others:
            if other is not server:
                other.go_on()


def caller(url: str) -> httpx2.Client:
    """A connection to a server, for questions beside those that are measured."""
    return httpx2.Client(base_url=url, timeout=60, trust_env=False)


def answers(http: httpx2.Client, path: str) -> bool:
    """Whether a server answers with status 200."""
    try:
        return http.get(path).status_code == 200
    except httpx2.HTTPError:
        return False


def models_of(url: str) -> list[str]:
    """What a server's models are called."""
    with caller(url) as http:
        return [str(model["id"]) for model in http.get("/v1/models").json()["data"]]


def metrics_of(url: str) -> dict[str, float]:
    """What a lazyllm server counts, by name; of what has labels, `name{value,...}`.

    Raises:
        EngineError: when it is gone.
    """
    with caller(url) as http:
        return _counts(http)


def idle(url: str, *, seconds: float = IDLE_SECONDS) -> bool:
    """Whether nothing runs or waits on a lazyllm server, within so many seconds.

    Raises:
        EngineError: when it is gone.
    """
    deadline = time.monotonic() + seconds
    with caller(url) as http:
        while time.monotonic() < deadline:
            told = _counts(http)
            if told["lazyllm_running"] == told["lazyllm_waiting"] == 0:
                return True
            time.sleep(POLLING_SECONDS)
    return False


def _counts(http: httpx2.Client) -> dict[str, float]:
    try:
        text = http.get("/metrics").text
    except httpx2.HTTPError as error:
        raise EngineError(f"the server at {http.base_url} says nothing any more: {error!r}") from None
    return {
        sample.name + (f"{{{','.join(sample.labels.values())}}}" if sample.labels else ""): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in RAM."""
    return int(psutil.Process(pid).memory_info().rss)
