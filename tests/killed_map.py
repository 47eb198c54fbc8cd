"""Runs a map twice, and kills it each time in the middle of writing a line.

Children are forked from this process, which has imported everything and started no thread.
"""

import os
import signal
import sys
import warnings
from pathlib import Path

import torch

from lazyllm import LazyPipeline
from tests.test_map import GREEDY, PROMPTS, PRUNING
from tests.tiny import tiny_model


def killed(pipe: LazyPipeline, out: Path, lines: int, share: float) -> None:
    """A run that dies when it has written a share of its line number `lines`."""
    write = os.pwrite

    def cut_off(file, content, at):
        nonlocal lines
        lines -= 1
        if lines:
            return write(file, content, at)
        write(file, content[: int(share * len(content))], at)
        os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        os.pwrite = cut_off
        list(pipe.map(PROMPTS, out=out, batch_tokens=1, **GREEDY))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lazy = LazyPipeline(tiny_model(), **PRUNING)
    for lines, share in ((3, 0.6), (3, 0.0)):
        killed(lazy, Path(sys.argv[1]), lines, share)
