"""What is asked of the libraries below torch: memory that is free, and threads that wait."""

import os
import subprocess
import sys

import pytest

from benchmarks.load.servers import resident_bytes
from lazyllm.runtime import give_back_free_memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only glibc and GNU's OpenMP are asked")

COMPUTING = """
import os
import time
import torch
from lazyllm import LazyPipeline
from lazyllm.runtime import end_helper_threads
from lazyllm.serving.engine import Engine
from tests.jobs import soon
from tests.talks import PRUNING, tokenizer
from tests.tiny import tiny_model

torch.set_num_threads(2)

def threads():
    return len(os.listdir("/proc/self/task"))

def compute():
    torch.ones(300, 300, dtype=torch.float64) @ torch.ones(300, 300, dtype=torch.float64)

def talk():
    return pipe.stream("w1 w2", max_new_tokens=5).result

pipe = LazyPipeline(tiny_model(), tokenizer(), **PRUNING)
talk()
end_helper_threads()
time.sleep(0.5)  # until it has ended
alone = threads()
compute()
assert threads() == alone + 1
"""


def test_memory_between_blocks_that_are_in_use_is_given_back():
    blocks = [bytes(1) * 100_000 for _ in range(2000)]
    del blocks[::2]
    held = resident_bytes(os.getpid())
    give_back_free_memory()
    assert held - resident_bytes(os.getpid()) > 0.5 * 1000 * 100_000


@pytest.mark.parametrize(
    "script",
    [
        "end_helper_threads(); soon(lambda: threads() == alone); compute(); assert threads() == alone + 1",
        "engine = Engine({'only': pipe}); soon(lambda: threads() == alone + 1)",  # which is its own
        "talk(); soon(lambda: threads() == alone)",
    ],
    ids=["it is asked for", "an engine takes over", "a stream takes over"],
)
def test_threads_that_help_one_that_no_longer_computes_end(script):
    subprocess.run([sys.executable, "-c", COMPUTING + script], check=True, timeout=100)
