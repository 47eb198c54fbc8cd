"""Other engines as processes of their own, so that each can have its own environment and loads its weights once.

A worker is a program that speaks JSON lines. When it has loaded it says `{"about": {...}}`; then every line it reads,
`{"token_ids": [...], "new_tokens": 8, ...}`, gets one line in return:
`{"ttft_seconds": 0.5, "step_seconds": [0.02, ...], "token_ids": [...], "kept_tokens": 300}` or `{"error": "why not"}`.
It ends when its input does.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lazyllm.errors import EngineError, InputError
from lazyllm.evaluation.bench import TimedRun, Timing, Workload

PATIENCE_SECONDS = 3600.0
LAST_WORDS = 3
"""How many lines of a dead worker's log go into the error."""


class Worker:
    """A running worker.

    Args:
        name: what errors call it.
        command: the program and its arguments.
        log: file that gets what it writes to standard error.
        environment: variables it gets beside those of this process.
        patience_seconds: how long an answer may take.

    Attributes:
        about: what it said about itself when it had loaded, once `start` was called.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        patience_seconds: float = PATIENCE_SECONDS,
    ) -> None:
        self.name = name
        self.about: dict[str, Any] = {}
        self._command = list(command)
        self._log = log
        self._environment = {**os.environ, **(environment or {})}
        self._patience_seconds = patience_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it and waits until it has loaded.

        Raises:
            EngineError: when it cannot.
        """
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            try:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=self._environment,
                    bufsize=0,
                )
            except OSError as error:
                raise EngineError(f"{self.name} did not start: {error}") from None
        self.about = self._answer().get("about", {})

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer to a request.

        Raises:
            EngineError: when it says why not, has died, or takes too long.
        """
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            raise self._died() from None
        return self._answer()

    def close(self) -> None:
        """Ends it."""
        if self._process is None:
            return
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise EngineError(f"{self.name} is not running")
        return self._process

    def _answer(self) -> dict[str, Any]:
        line = self._line()
        if not line:
            raise self._died()
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise EngineError(f"{self.name} answered {line.decode(errors='replace')!r}, which is no JSON object")
        if "error" in answer:
            raise EngineError(f"{self.name}: {answer['error']}")
        return answer

    def _line(self) -> bytes:
        """The next line; empty when the worker has closed its output."""
        stream = self._running().stdout
        assert stream is not None
        line = b""
        while not line.endswith(b"\n"):
            if not select.select([stream], [], [], self._patience_seconds)[0]:
                self.close()
                raise EngineError(f"{self.name} did not answer within {self._patience_seconds:g} seconds")
            piece = os.read(stream.fileno(), 1 << 16)
            if not piece:
                return b""
            line += piece
        return line

    def _died(self) -> EngineError:
        code = self._running().wait()
        words = self._log.read_text(errors="replace").strip().splitlines()[-LAST_WORDS:]
        last = "; it last said: " + " | ".join(words) if words else ""
        return EngineError(f"{self.name} ended with exit code {code}{last}")


class WorkerRun(TimedRun):
    """A worker that replies to one prompt at a time.

    Args:
        name: what the report calls it.
        worker: a worker that was started.
        request: what its requests hold beside the prompt.
    """

    def __init__(self, name: str, worker: Worker, *, request: Mapping[str, Any] | None = None) -> None:
        super().__init__(name, is_stock=False)
        self.worker = worker
        self.request = dict(request or {})

    def run(self, work: Workload) -> Timing:
        """What the worker's own clock says."""
        if len(work.prompts) != 1:
            raise InputError(f"{self.worker.name} replies to one prompt at a time, not to {len(work.prompts)}")
        prompt = list(work.prompts[0])
        answer = self.worker.ask({"token_ids": prompt, "new_tokens": work.new_tokens, **self.request})
        try:
            self.replies = [[int(token) for token in answer["token_ids"]]]
            self.kept_fraction = int(answer["kept_tokens"]) / len(prompt)
            return Timing(float(answer["ttft_seconds"]), tuple(map(float, answer["step_seconds"])))
        except (KeyError, TypeError, ValueError) as error:
            raise EngineError(f"{self.worker.name} gave an answer that is no timing ({error!r}): {answer}") from None


class FailedRun(TimedRun):
    """Stands for an engine that could not be set up, so that the report says so and goes on."""

    def __init__(self, name: str, error: EngineError) -> None:
        super().__init__(name, is_stock=False)
        self.error = error

    def run(self, work: Workload) -> Timing:
        """Raises what went wrong."""
        raise self.error
