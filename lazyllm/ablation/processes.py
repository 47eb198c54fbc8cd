"""Workers as processes of this machine, each with the model and its share of the threads."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait

import torch

from lazyllm.ablation.dispatch import Died, Finished, Hand, Message, messages
from lazyllm.ablation.models import Load
from lazyllm.ablation.units import Group
from lazyllm.ablation.worker import Job, Worker


class ProcessHand:
    """A spawned process behind a pipe."""

    def __init__(self, job: Job) -> None:
        self.name = job.name
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, job), name=f"lazyllm-{job.name}", daemon=True)
        self.process.start()
        theirs.close()

    def give(self, group: Group) -> None:
        """Hands over a group."""
        with suppress(BrokenPipeError, ConnectionResetError):  # a dead one is noticed when it is heard
            self.pipe.send(group)

    def hear(self) -> Message:
        """What it says next."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            return Died(f"the worker died ({_ending(self.process.exitcode)})")

    def dismiss(self) -> None:
        """Ends the process, in the middle of a unit too."""
        self.pipe.close()
        self.process.kill()
        self.process.join()


class Processes:
    """A crew of processes on this machine."""

    def __init__(self, run: str, workers: int, load: Load | None = None) -> None:
        self.run, self._load = run, load
        self._threads = max(1, torch.get_num_threads() // workers)

    def hire(self, name: str) -> ProcessHand:
        """A new process."""
        return ProcessHand(Job(self.run, name, self._load, self._threads))

    def hear(self, hands: Sequence[Hand]) -> Iterator[tuple[Hand, Message]]:
        """Waits for a message of each that has one."""
        by_pipe = {hand.pipe: hand for hand in hands if isinstance(hand, ProcessHand)}
        for pipe in wait(list(by_pipe)):
            hand = by_pipe[pipe]  # type: ignore[index]
            yield hand, hand.hear()


def _serve(pipe: Connection, job: Job) -> None:
    """Does what comes through the pipe until it is closed; ends with the process that hired it."""
    threading.Thread(target=_follow_parent, daemon=True).start()
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    worker = Worker(job)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        while True:
            group = pipe.recv()
            for message in messages(worker, group):
                pipe.send(message)
                if isinstance(message, Finished):
                    break


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _ending(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
