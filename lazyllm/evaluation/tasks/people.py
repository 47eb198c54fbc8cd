"""Names, cities and telephone numbers: as records, as a table, as German sentences."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lazyllm.evaluation.tasks.item import Item
from lazyllm.evaluation.tasks.maker import Maker
from lazyllm.evaluation.tasks.material import KEYS


def records(maker: Maker, rng: random.Random) -> Item:
    """One field of one record in a long JSON list."""
    lines = maker.fill(
        (
            f'{{"name": "{one.name}", "city": "{one.city}", "age": {one.age}, "phone": "{one.phone}"}},'
            for one in _people(rng)
        ),
        maker.tokens - 60,
    )
    document = "[\n" + "\n".join(lines).rstrip(",") + "\n]"
    return _phone_item("records", maker, rng, [line.rstrip(",") for line in lines], document)


def table(maker: Maker, rng: random.Random) -> Item:
    """One cell of a long Markdown table."""
    lines = maker.fill(
        (f"| {one.name} | {one.city} | {one.age} | {one.phone} |" for one in _people(rng)), maker.tokens - 80
    )
    head = "| name | city | age | phone |\n|---|---|---|---|\n"
    return _phone_item("table", maker, rng, lines, head + "\n".join(lines))


def german(maker: Maker, rng: random.Random) -> Item:
    """A fact and a question about it in German."""
    lines = maker.fill(
        (
            f"{one.name} ist {one.age} Jahre alt, wohnt in {one.city} und hat die Telefonnummer {one.phone}."
            for one in _people(rng)
        ),
        maker.tokens - 60,
    )
    question, instruction = "Welche Telefonnummer hat {}?", "Antworte kurz."
    reply = "Die Telefonnummer von {} ist {}."
    return _phone_item("german", maker, rng, lines, "\n".join(lines), question, instruction, reply)


@dataclass(frozen=True)
class _Person:
    name: str
    city: str
    age: int
    phone: str


def _people(rng: random.Random) -> Iterator[_Person]:
    names = [f"{first.title()} {last.title()}" for first in KEYS for last in KEYS]
    rng.shuffle(names)
    for name in names:
        phone = f"{rng.randint(200, 999)}-{rng.randint(1000, 9999)}"
        yield _Person(name, f"{rng.choice(KEYS).title()}ville", rng.randint(18, 90), phone)


def _phone_item(
    task: str,
    maker: Maker,
    rng: random.Random,
    lines: Sequence[str],
    document: str,
    question: str = "What is the phone number of {}?",
    instruction: str = "Answer briefly.",
    reply: str = "The phone number of {} is {}.",
) -> Item:
    """A question for the number that one of the lines, one person each, gives."""
    chosen = rng.choice(lines)
    name, phone = re.findall(r"[A-Z][a-z]+ [A-Z][a-z]+", chosen)[0], re.findall(r"\d{3}-\d{4}", chosen)[0]
    prompt = maker.ask([document], question.format(name), instruction=instruction)
    return Item(task, prompt, maker.reply(reply.format(name, phone), phone), (phone,), (chosen,))
