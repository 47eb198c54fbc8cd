"""Two questions, one after the other, over many retrieved passages: dense, pruned for good, and pruned for now.

    python examples/rag_passages.py
    python examples/rag_passages.py --passages 40 --first "..." --second "..."

BM25 finds passages for both questions in the packaged presidential addresses, and a conversation opens with all of
them. Static pruning leaves out for good what the first question does not need, so the second one may find its passage
gone. Dynamic pruning leaves it where it stopped, and the second question takes it up again. Bars show how deep passages
were computed after the first question, and after the second. Needs no network.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from math import log
from typing import Annotated

import typer

from lazyllm import Conversation, DropCache, LazyPipeline
from lazyllm.evaluation.data import packaged_model, packaged_speech, packaged_speech_names, quiet_loading

FIRST = "What is the name of the young woman who will graduate from West Point?"
SECOND = "How much do taxpayers pay per passenger when an Amtrak train leaves the station?"
BAR = 20
"""Characters of a passage that all layers have computed."""
SHOWN = 8
"""How many passages get bars."""


def main(
    first: Annotated[str, typer.Option(help="The first question.")] = FIRST,
    second: Annotated[str, typer.Option(help="The second one.")] = SECOND,
    passages: Annotated[int, typer.Option(min=2, help="How many passages to retrieve, half for each question.")] = 24,
    model: Annotated[str, typer.Option(help="Hub id, folder or .gguf file; the packaged SmolLM2 without it.")] = "",
    preset: Annotated[str, typer.Option(help="A preset, or a configuration file.")] = "recommended",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 24,
) -> None:
    corpus = all_passages()
    bags = [Counter(words(passage)) for passage in corpus]
    found = [corpus[index] for asked in (first, second) for index in bm25(asked, bags)[: passages // 2]]
    found = list(dict.fromkeys(found))
    print(f"{len(found)} of {len(corpus):,} passages retrieved")
    with quiet_loading():
        dynamic = LazyPipeline.from_pretrained(model or packaged_model(), dtype="float32", preset=preset)
    static = {**dict(dynamic.config), "cache": DropCache()}
    ways = {
        "dense": LazyPipeline.from_preset("dense", dynamic.model, dynamic.tokenizer),
        "static": LazyPipeline.from_config(static, dynamic.model, dynamic.tokenizer),
        "dynamic": dynamic,
    }
    ways["dense"].generate("The first run pays for things that no later one does.", max_new_tokens=1)
    for name, pipe in ways.items():
        print(f"\n{name}, {pipe.config.cache}\n")
        chat = pipe.conversation(documents=found)
        depths = [ask(pipe, chat, asked, found, max_new_tokens) for asked in (first, second)]
        if pipe.config.cache.prunes:
            show_depths(found, *depths)


def all_passages() -> list[str]:
    """Paragraphs of all addresses, but for very short and very long ones."""
    parts = (part.strip() for name in packaged_speech_names() for part in packaged_speech(name).split("\n\n"))
    return list(dict.fromkeys(part for part in parts if 40 <= len(part.split()) <= 200))


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def bm25(question: str, bags: Sequence[Counter[str]], *, k: float = 1.5, b: float = 0.75) -> list[int]:
    """Indices of bags of words, the best first (Robertson and Zaragoza 2009)."""
    sizes = [bag.total() for bag in bags]
    mean, scores = sum(sizes) / len(sizes), [0.0] * len(bags)
    for word in set(words(question)):
        holders = [index for index, bag in enumerate(bags) if word in bag]
        rarity = log(1 + (len(bags) - len(holders) + 0.5) / (len(holders) + 0.5))
        for index in holders:
            count = bags[index][word]
            scores[index] += rarity * count * (k + 1) / (count + k * (1 - b + b * sizes[index] / mean))
    return sorted(range(len(bags)), key=lambda index: -scores[index])


def ask(
    pipe: LazyPipeline, chat: Conversation, question: str, passages: Sequence[str], max_new_tokens: int
) -> list[float]:
    """Takes a turn, and gives the share of all layers that have computed each passage by then."""
    stats = (reply := chat.ask(question, max_new_tokens=max_new_tokens, do_sample=False)).stats
    print(f"> {question}\n{reply.text.strip()}")
    print(f"  first token after {stats.ttft_seconds:.2f} s, {stats.revived_tokens:,} layer-tokens revived")
    depth = chat.cache.rows[0].ledger.depth.double() / stats.layers
    return [float(depth[start:stop].mean()) for start, stop in pipe.find(chat.messages[:1], passages)]


def show_depths(passages: Sequence[str], first: Sequence[float], second: Sequence[float]) -> None:
    """Bars for the passages that one of the questions took deepest."""
    deepest = sorted(range(len(passages)), key=lambda index: -max(first[index], second[index]))[:SHOWN]
    print(f"\n  {'first question':{BAR}}  {'second':{BAR}}  passage")
    for index in deepest:
        bars = [f"{'#' * round(BAR * share):.<{BAR}}" for share in (first[index], second[index])]
        print(f"  {bars[0]}  {bars[1]}  {' '.join(passages[index].split())[:56]} ...")


if __name__ == "__main__":
    typer.run(main)
