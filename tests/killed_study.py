"""Kills a study again and again, at random points and in the middle of a line, and compares what comes of it.

Run as a program: it prints, as JSON, how often the study was killed and whether tables and units are as they should be.
Children are forked from this process, which has imported everything and started no thread.
"""

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NoReturn

import torch

from lazyllm.ablation import plan
from lazyllm.ablation.processes import ProcessHand
from lazyllm.ablation.results import Results
from lazyllm.ablation.worker import Job
from tests.studies import figures, load, short_items, small

LEAST_KILLS = 50


def study():
    return small(axes=[{"field": "protect.recent", "values": [4, 16, 32]}], tasks={"records": 3, "summary": 2})


def child(out: Path, rng: random.Random, loaded) -> NoReturn:
    """Runs the study; every second time it dies by itself, with part of a line written."""
    if rng.random() < 0.5:
        lines, share, write = rng.randrange(1, 5), rng.random(), os.pwrite

        def cut_off(file, content, at):
            nonlocal lines
            lines -= 1
            if lines:
                return write(file, content, at)
            write(file, content[: int(share * len(content))], at)
            os.kill(os.getpid(), signal.SIGKILL)

        os.pwrite = cut_off
    study().run(out, load=lambda ref: loaded)
    os._exit(0)


def run_once(out: Path, rng: random.Random, loaded) -> bool:
    """Whether the study came to its end before it was killed."""
    seed, delay = rng.random(), rng.uniform(0.0, 0.25)
    pid = os.fork()
    if pid == 0:
        try:
            child(out, random.Random(seed), loaded)
        finally:
            os._exit(1)
    until = time.monotonic() + delay
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return _ended(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    return _ended(os.waitpid(pid, 0)[1])


def _ended(status: int) -> bool:
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL), f"the study failed with exit code {code}"
    return code == 0


def orphan_ends() -> bool:
    """Whether a worker process ends when the process that hired it is killed."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        hand = ProcessHand(Job("run", "orphan"))
        os.write(writer, str(hand.process.pid).encode())
        signal.pause()
    worker = int(os.read(reader, 20))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    for _ in range(6000):
        if _state(worker) == "Z":
            return True
        time.sleep(0.01)
    return False


def _state(pid: int) -> str:
    """One letter; Z, that of a process which is no more, for one that is gone too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    plan.make_items = short_items
    loaded = load(study().setting.ref)
    expected = figures(study().run(folder / "whole", load=lambda ref: loaded))
    rng, kills, same, once = random.Random(0), 0, [], []
    while kills < LEAST_KILLS:
        out = folder / f"killed-{len(same)}"
        while not run_once(out, rng, loaded):
            kills += 1
        results = Results.load(out)
        same.append(figures(results) == expected)
        once.append(max(Counter(record.address for record in results.records).values()) == 1)
    print(
        json.dumps(
            {"kills": kills, "studies": len(same), "same": all(same), "once": all(once), "orphan": orphan_ends()}
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
