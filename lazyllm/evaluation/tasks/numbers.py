"""Secret numbers hidden in presidential addresses: one, several, or a second one in a later turn."""

from __future__ import annotations

import random
import re
from bisect import bisect
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

from lazyllm.errors import InputError
from lazyllm.evaluation.tasks.item import Item
from lazyllm.evaluation.tasks.maker import Maker
from lazyllm.evaluation.tasks.material import KEYS, passages


def needle(maker: Maker, rng: random.Random, *, depth: float | None = None) -> Item:
    """One of four numbers hidden at any depth of presidential addresses.

    Args:
        maker, rng: as for every task.
        depth: where the number that is asked for stands, from 0 for the start to 1 for the end; anywhere without it.
    """
    keys, facts, document = _hidden_numbers(maker, rng)
    if depth is not None:
        document = _moved(document, facts[0], depth)
    return _number_item("needle", maker, document, keys[0], keys[0], facts[0])


def needles(maker: Maker, rng: random.Random, *, count: int = 4) -> Item:
    """Two to four of four hidden numbers, asked for at once; the score is the share that the reply gives."""
    if not isinstance(count, int) or not 2 <= count <= 4:
        raise InputError(f"needles asks for 2, 3 or 4 numbers, not {count!r}")
    keys, facts, document = _hidden_numbers(maker, rng)
    numbers = tuple(map(_number_of, facts[:count]))
    asked = f"{', '.join(keys[: count - 1])} and {keys[count - 1]}"
    return Item(
        "needles",
        maker.ask(document, f"What are the secret numbers of {asked}?", instruction="Give all of them."),
        maker.reply(" ".join(facts[:count]), ", ".join(numbers)),
        numbers,
        tuple(facts[:count]),
        new_tokens=24 * count,
        metric="contains-all",
    )


def follow_up(maker: Maker, rng: random.Random) -> Item:
    """Two of the four numbers, the second asked for in a second turn."""
    keys, facts, document = _hidden_numbers(maker, rng)
    asked = f"What is the secret number of {keys[1]}? Answer briefly."
    return replace(_number_item("follow-up", maker, document, keys[0], keys[1], facts[1]), follow_up=asked)


def later(maker: Maker, rng: random.Random) -> Item:
    """Two of the four numbers; only the first is asked for, and the reply goes on to the second one."""
    keys, facts, document = _hidden_numbers(maker, rng)
    item = _number_item("later", maker, document, keys[0], keys[1], facts[1])
    said = f"{facts[0]} The secret number of {keys[1]} is"
    return replace(item, reference=f" {item.answers[0]}.", said=said if maker.chats else f" {said}")


def _number_item(task: str, maker: Maker, document: list[str], asked: str, wanted: str, fact: str) -> Item:
    """A question for the number of one key; `fact` gives that of the key the answer is about."""
    number = _number_of(fact)
    return Item(
        task,
        maker.ask(document, f"What is the secret number of {asked}?"),
        maker.reply(f"The secret number of {wanted} is {number}.", number),
        (number,),
        (fact,),
    )


def rules(maker: Maker, rng: random.Random) -> Item:
    """A needle, and a system prompt whose rule the reply must follow."""
    word = rng.choice(KEYS).upper()
    rule = f"You answer questions. You begin every answer with the word {word}."
    ruled = Maker(maker.tokenizer, maker.tokens, maker.layout, rule)
    item = needle(ruled, rng)
    return Item("rules", item.prompt, f"{word}: {item.reference.strip()}", (word,), (rule,))


def _hidden_numbers(maker: Maker, rng: random.Random) -> tuple[list[str], list[str], list[str]]:
    """Four keys, a sentence that gives each a number, and prose that holds these sentences at any depth."""
    keys = rng.sample(KEYS, 4)
    facts = [f"The secret number of {key} is {rng.randint(100_000, 999_999)}." for key in keys]
    document = maker.fill(passages(rng), maker.tokens - 180)
    for fact in facts:
        document.insert(rng.randint(0, len(document)), fact)
    return keys, facts, document


def _number_of(fact: str) -> str:
    return fact.split()[-1].rstrip(".")


def _moved(document: Sequence[str], fact: str, depth: float) -> list[str]:
    """The document with a fact at a depth, between two sentences."""
    if not isinstance(depth, (int, float)) or not 0 <= depth <= 1:
        raise InputError(f"a depth is a number from 0 to 1, not {depth!r}")
    rest = [part for part in document if part != fact]
    ends = list(accumulate(map(len, rest)))
    place = depth * ends[-1]
    at = min(bisect(ends, place), len(rest) - 1)
    inside = place - (ends[at] - len(rest[at]))
    stops = [0, *(match.end() for match in re.finditer(r"[.!?]\s+", rest[at])), len(rest[at])]
    stop = min(stops, key=lambda stop: abs(stop - inside))
    parts = [rest[at][:stop].strip(), fact, rest[at][stop:].strip()]
    return [*rest[:at], *filter(None, parts), *rest[at + 1 :]]
