"""Fact sheets of made-up countries, one document each."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

from lazyllm.errors import InputError
from lazyllm.evaluation.tasks.item import Item
from lazyllm.evaluation.tasks.maker import Maker
from lazyllm.evaluation.tasks.material import KEYS

ASKED = ("capital", "population", "highest mountain", "currency")


@dataclass(frozen=True)
class _Sheet:
    """What is known about a country: its text, and the values by field."""

    name: str
    fields: dict[str, str]

    @property
    def text(self) -> str:
        return "\n".join([self.name, *(f"{field}: {value}" for field, value in self.fields.items())])


def facts(maker: Maker, rng: random.Random, *, hops: int = 1) -> Item:
    """One field of one of many fact sheets, each a document of its own.

    Args:
        maker, rng: as for every task.
        hops: 1 asks about a country, 2 about the neighbour that its sheet names: two documents are needed.
    """
    if hops not in (1, 2):
        raise InputError(f"facts: hops is 1 or 2, not {hops!r}")
    sheets = _filled(maker, rng)
    first = rng.choice(sheets)
    needed = [first] if hops == 1 else [first, next(one for one in sheets if one.name == first.fields["neighbour"])]
    field = rng.choice(ASKED)
    of = first.name if hops == 1 else f"the neighbour of {first.name}"
    value = needed[-1].fields[field]
    return Item(
        "facts",
        maker.ask([sheet.text for sheet in sheets], f"What is the {field} of {of}?"),
        maker.reply(f"The {field} of {of} is {value}.", value),
        (value,),
        tuple(sheet.text for sheet in needed),
        new_tokens=24,
    )


def _filled(maker: Maker, rng: random.Random) -> list[_Sheet]:
    """As many sheets as fit, in any order; the neighbour of each is among them."""
    names = [f"{first.title()}{last}" for first in KEYS for last in KEYS if first != last]
    rng.shuffle(names)
    sheets = [_sheet(name, neighbour, rng) for name, neighbour in pairwise(names)]
    sheets = sheets[: len(maker.fill((sheet.text for sheet in sheets), maker.tokens - 60))]
    if len(sheets) < 2:
        raise InputError(f"facts needs prompts that hold two documents; {maker.tokens} tokens hold {len(sheets)}")
    sheets[-1].fields["neighbour"] = sheets[0].name
    rng.shuffle(sheets)
    return sheets


def _sheet(name: str, neighbour: str, rng: random.Random) -> _Sheet:
    one, two, three, four = (word.title() for word in rng.sample(KEYS, 4))
    return _Sheet(
        name,
        {
            "capital": f"Port {one}{two.lower()}",
            "population": f"{rng.randint(100, 99_999) * 1000 + rng.randint(0, 999):,}",
            "neighbour": neighbour,
            "main river": f"{three} River",
            "highest mountain": f"Mount {four}{one.lower()}",
            "currency": f"{two} {rng.choice(('crown', 'dollar', 'mark', 'pound'))}",
            "founded": str(rng.randint(1100, 1990)),
        },
    )
