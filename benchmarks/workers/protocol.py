"""The worker's side of lazyllm/evaluation/workers.py; only the standard library, since it runs in every environment."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

Reply = Callable[[dict[str, Any]], dict[str, Any]]


def serve(load: Callable[[], tuple[Reply, dict[str, Any]]]) -> None:
    """Loads, tells about itself, and answers requests until its input ends.

    Whatever a library prints goes to standard error, so that the channel holds answers alone.
    """
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(line: dict[str, Any]) -> None:
        channel.write(json.dumps(line) + "\n")

    try:
        reply, about = load()
    except Exception as error:
        say({"error": f"did not load: {type(error).__name__}: {error}"})
        raise
    say({"about": about})
    for line in sys.stdin:
        try:
            say(reply(json.loads(line)))
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})
