"""The prompts that a schedule is tuned on."""

from __future__ import annotations

import json
import random
from pathlib import Path

from lazyllm.errors import InputError
from lazyllm.files.prompts import NamedPrompt, prompts_in

VALIDATION_SHARE = 1 / 3
"""Of the prompts, those that choose nothing."""


def read_prompts(path: str | Path, *, chat: bool = False) -> list[NamedPrompt]:
    """The prompts of a folder, one in each `.txt` file, or of a `.jsonl` file, the field "prompt" of each line.

    A prompt that stands there twice counts once, so that none can both choose and validate.

    Args:
        path: of the folder or file.
        chat: wrap each text as one user message.

    Raises:
        InputError: when there is no prompt, or one that cannot be read.
    """
    unique: dict[str, NamedPrompt] = {}
    for named in prompts_in(path, chat=chat):
        unique.setdefault(json.dumps(named.prompt), named)
    return list(unique.values())


def split(prompts: list[NamedPrompt], seed: int) -> tuple[list[NamedPrompt], list[NamedPrompt]]:
    """Those that choose, and a third, drawn by the seed, that validates; at least one each.

    Raises:
        InputError: when there are fewer than two.
    """
    if len(prompts) < 2:
        raise InputError(
            f"{len(prompts)} prompt is too few to tune on: one is needed to choose a schedule and another to validate "
            "it, and more make both mean more"
        )
    order = random.Random(seed).sample(range(len(prompts)), len(prompts))
    drawn = set(order[: max(1, round(VALIDATION_SHARE * len(prompts)))])
    training = [prompt for index, prompt in enumerate(prompts) if index not in drawn]
    return training, [prompt for index, prompt in enumerate(prompts) if index in drawn]
