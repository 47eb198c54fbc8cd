"""Chains of variables and words that are frequent: tasks like those of RULER (Hsieh et al. 2024, arXiv 2404.06654).

They follow the descriptions there, in words and code of their own. All are graded by the share of answers found.
"""

from __future__ import annotations

import random
from string import ascii_lowercase, ascii_uppercase

from lazyllm.errors import InputError
from lazyllm.evaluation.tasks.item import Item
from lazyllm.evaluation.tasks.maker import Maker
from lazyllm.evaluation.tasks.material import passages, vocabulary
from lazyllm.prompts import Prompt

COMMON = 10
RARE_TIMES = 3
FREQUENT = 3


def variables(maker: Maker, rng: random.Random, *, hops: int = 4, chains: int = 1) -> Item:
    """All variables that got one value, by assignments spread over presidential addresses (variable tracking).

    Args:
        maker, rng: as for every task.
        hops: assignments from one variable to the next.
        chains: how many values are handed on; one is asked for.
    """
    _check_count("vt", "hops", hops)
    _check_count("vt", "chains", chains)
    names = _coded(rng, ascii_uppercase, 5, chains * (hops + 1))
    values = rng.sample(range(10_000, 100_000), chains)
    groups = [names[start : start + hops + 1] for start in range(0, len(names), hops + 1)]
    lines = [_chain(group, value) for group, value in zip(groups, values, strict=True)]
    room = maker.tokens - 110 - sum(maker.count(line) + 2 for chain in lines for line in chain)
    document = maker.fill(passages(rng), room)
    for chain in lines:
        places = sorted(rng.choices(range(len(document) + 1), k=len(chain)))
        for shift, (place, line) in enumerate(zip(places, chain, strict=True)):
            document.insert(place + shift, line)
    question = f"Which variables have the value {values[0]}, given to them directly or through other variables?"
    prompt = maker.ask(document, question, instruction="Name all of them.")
    reply = f"The variables with the value {values[0]} are {', '.join(groups[0])}."
    return _listing("vt", maker, prompt, reply, groups[0], lines[0])


def _chain(names: list[str], value: int) -> list[str]:
    """The assignments that hand a value on."""
    return [f"VAR {name} = {of}." for name, of in zip(names, [value, *(f"VAR {one}" for one in names)], strict=False)]


def common_words(maker: Maker, rng: random.Random) -> Item:
    """The ten words that a long list of words repeats most (common words extraction)."""
    words = rng.sample(vocabulary(), 3000)
    sample = _numbered(words[:100])
    entries = 100 * (maker.tokens - 90) // maker.count(sample)
    often = max(RARE_TIMES + 1, min(30, entries // 25))
    common, rest = words[:COMMON], words[COMMON:]
    rare = rest[: max(1, (entries - COMMON * often) // RARE_TIMES)]
    listed = [*common * often, *rare * RARE_TIMES]
    rng.shuffle(listed)
    question = f"Which {COMMON} words stand in the list most often?"
    prompt = maker.ask([_numbered(listed)], question, instruction="Name them.")
    return _listing("cwe", maker, prompt, f"The words are {', '.join(common)}.", common)


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def frequent_words(maker: Maker, rng: random.Random, *, alpha: float = 2.0) -> Item:
    """The three most frequent of coded words (frequent words extraction); they fall off as `rank ** -alpha`."""
    if not isinstance(alpha, (int, float)) or not alpha > 1:
        raise InputError(f"fwe: alpha is a number above 1, not {alpha!r}")
    words = _coded(rng, ascii_lowercase, 6, 60)
    entries = 60 * (maker.tokens - 90) // maker.count(" ".join(words))
    weights = [rank**-alpha for rank in range(1, len(words) + 1)]
    times = [int(entries * weight / sum(weights)) for weight in weights]
    text = [word for word, often in zip(words, times, strict=True) for _ in range(often)]
    rng.shuffle(text)
    question = f"Which {FREQUENT} words appear most often in the coded text?"
    prompt = maker.ask([" ".join(text)], question, instruction="Name them.")
    return _listing("fwe", maker, prompt, f"The words are {', '.join(words[:FREQUENT])}.", words[:FREQUENT])


def _listing(
    task: str, maker: Maker, prompt: Prompt, reply: str, answers: list[str], evidence: list[str] | None = None
) -> Item:
    """An item whose answer names several things."""
    bare = ", ".join(answers)
    return Item(
        task,
        prompt,
        maker.reply(reply, bare),
        tuple(answers),
        tuple(evidence or ()),
        new_tokens=maker.count(reply) + 16,
        metric="contains-all",
    )


def _coded(rng: random.Random, letters: str, length: int, count: int) -> list[str]:
    """Words that mean nothing, all different."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(letters, k=length))] = None
    return list(found)


def _check_count(task: str, name: str, value: object) -> None:
    if not isinstance(value, int) or value < 1:
        raise InputError(f"{task}: {name} is a whole number from 1 on, not {value!r}")
