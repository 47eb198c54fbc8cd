"""A study that is killed again and again ends as one that is left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_a_study_that_is_killed_fifty_times_ends_with_the_same_table_and_leaves_nobody_behind(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed_study", str(tmp_path)],
        cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["kills"] >= 50
    assert told["same"]
    assert told["once"]
    assert told["orphan"]
