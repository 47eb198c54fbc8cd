"""What clients ask: a plan that has everything in it, and is the same for the same seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from random import Random
from types import MappingProxyType
from typing import Any, TypeAlias

Json: TypeAlias = dict[str, Any]
Message: TypeAlias = dict[str, str]

SYSTEM = "You are a helpful assistant."
"""Said by every request, so that no chat template of an engine says something else."""
QUESTIONS = (
    "What is asked of the Congress?",
    "What is said about taxes?",
    "Which country is named first?",
    "Whom does the speaker thank?",
    "Why does that matter?",
)
STOPS = ("\n", ".", ",", " the ")
REPLY_TOKENS = (8, 48)
TURNS = 3
MAX_BODY_BYTES = 2**20
"""What the server under load is told; every request but the oversized one is far below it."""
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Fault:
    """What is wrong with a malformed request, and how it is to be refused.

    Attributes:
        name: what it is called.
        status, code: of the answer.
        changes: what the body says instead.
        cut_bytes: how many bytes are missing at the end of the body.
        content_type: what the body is called.
    """

    name: str
    status: int
    code: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    cut_bytes: int = 0
    content_type: str = "application/json"


FAULTS = (
    Fault("bad JSON", 400, "invalid_json", cut_bytes=2),
    Fault("wrong type", 400, "invalid_value", {"temperature": "hot"}),
    Fault("unknown model", 404, "model_not_found", {"model": "nobody"}),
    Fault("too long", 400, "context_length_exceeded", {"max_tokens": 10**6}),
    Fault("oversized body", 413, "body_too_large", {"user": "x" * MAX_BODY_BYTES}),
    Fault("unknown parameter", 400, "unknown_parameter", {"temprature": 0}),
    Fault("too many replies", 400, "invalid_value", {"n": 100}),
    Fault("no JSON by its header", 415, "unsupported_media_type", content_type="text/plain"),
)


@dataclass(frozen=True)
class Leave:
    """When a client goes away: at the first of both.

    Attributes:
        seconds: after the request was sent.
        pieces: how many pieces of the streamed reply it reads; 0 = not even the headers; None = any number.
    """

    seconds: float
    pieces: int | None = None


@dataclass(frozen=True)
class Ask:
    """One request for a chat completion.

    Attributes:
        kind: name from `KINDS`.
        question: what the user says.
        options: what the body says beside the messages.
        leave: when the client goes away; None = it stays.
        fault: what is wrong with it.
    """

    kind: str
    question: str
    options: Mapping[str, Any]
    leave: Leave | None = None
    fault: Fault | None = None

    @property
    def greedy(self) -> bool:
        """Whether every token is the likeliest one."""
        return self.options.get("temperature") == 0

    @property
    def replies(self) -> int:
        """How many replies are asked for."""
        return int(self.options.get("n", 1))

    def body(self, earlier: Sequence[Message] = ()) -> bytes:
        """The request as it is sent, behind the earlier turns of its conversation."""
        messages = [said("system", SYSTEM), *earlier, said("user", self.question)]
        changes, cut = (self.fault.changes, self.fault.cut_bytes) if self.fault else (NOTHING, 0)
        whole = json.dumps({"messages": messages, **self.options, **changes}).encode()
        return whole[: len(whole) - cut]


Talk: TypeAlias = tuple[Ask, ...]
"""Requests of one client, each of which has the ones before it and their replies as its history."""


def said(role: str, content: str) -> Message:
    """A message."""
    return {"role": role, "content": content}


class Texts:
    """Pieces of a long text.

    Args:
        tokenizer: counts.
        token_ids: the text.
    """

    def __init__(self, tokenizer: Any, token_ids: Sequence[int]) -> None:
        self._tokenizer, self._ids = tokenizer, list(token_ids)

    def piece(self, tokens: int, random: Random) -> str:
        """About so many tokens from anywhere in the text."""
        start = random.randrange(len(self._ids) - tokens + 1)
        return str(self._tokenizer.decode(self._ids[start : start + tokens]))


class Planner:
    """Makes requests of every kind.

    Args:
        texts: what they are about.
        models: names that they ask for by turns.
        lengths: fewest and most tokens of a prompt's text.
        seed: of all that is drawn.
    """

    def __init__(self, texts: Texts, models: Sequence[str], lengths: tuple[int, int], *, seed: int = 0) -> None:
        self._texts, self._models, self._lengths = texts, list(models), lengths
        self._random = Random(seed)
        self._faults = cycle(FAULTS)

    def mixed(self, requests: int) -> list[Talk]:
        """Talks of so many requests in all, of every kind, in an order drawn anew."""
        talks: list[Talk] = []
        kinds = cycle(PATTERN)
        while (missing := requests - sum(map(len, talks))) > 0:
            talks.append(KINDS[next(kinds)](self)[:missing])
        self._random.shuffle(talks)
        return talks

    def greedy(self, requests: int) -> list[Talk]:
        """So many greedy streams."""
        return [self.stream() for _ in range(requests)]

    def whole(self) -> Talk:
        """A greedy reply as one object."""
        return (self._ask("whole", temperature=0),)

    def stream(self) -> Talk:
        """A greedy reply as a stream."""
        return (self._ask("stream", temperature=0, **streamed(True)),)

    def several(self) -> Talk:
        """Two replies to one prompt, drawn by a seed."""
        return (self._ask("several", n=2, **self._drawn(), **self._any_form()),)

    def stopped(self) -> Talk:
        """A greedy reply that ends at a string."""
        stop = self._random.sample(STOPS, 2)
        return (self._ask("stop", temperature=0, stop=stop, **self._any_form()),)

    def sampled(self) -> Talk:
        """A reply drawn by a seed."""
        return (self._ask("sampled", **self._drawn(), **self._any_form()),)

    def conversation(self) -> Talk:
        """Greedy turns of one conversation: a long text first, then questions about it."""
        first = self._ask("conversation", temperature=0, **self._any_form())
        later = [self._ask("conversation", self._question(), **first.options) for _ in range(TURNS - 1)]
        return (first, *later)

    def left_waiting(self) -> Talk:
        """A stream whose client goes away before the first byte."""
        leave = Leave(self._random.uniform(0, 1), pieces=0)
        return (self._ask("left waiting", leave=leave, temperature=0, **streamed(True)),)

    def left_midway(self) -> Talk:
        """A stream whose client goes away after some pieces of the reply."""
        leave = Leave(float("inf"), pieces=self._random.randint(1, 6))
        return (self._ask("left midway", leave=leave, temperature=0, **streamed(True)),)

    def left_whole(self) -> Talk:
        """A reply as one object whose client goes away after some time."""
        return (self._ask("left whole", leave=Leave(self._random.uniform(0.1, 3)), temperature=0),)

    def malformed(self) -> Talk:
        """A request that cannot be answered."""
        return (self._ask("malformed", fault=next(self._faults), temperature=0),)

    def _ask(
        self, kind: str, question: str = "", *, leave: Leave | None = None, fault: Fault | None = None, **options: Any
    ) -> Ask:
        drawn = {"model": self._random.choice(self._models), "max_tokens": self._random.randint(*REPLY_TOKENS)}
        return Ask(kind, question or self._text(), {**drawn, **options}, leave, fault)

    def _text(self) -> str:
        return f"{self._texts.piece(self._random.randint(*self._lengths), self._random)}\n\n{self._question()}"

    def _question(self) -> str:
        return self._random.choice(QUESTIONS)

    def _drawn(self) -> Json:
        return {"temperature": 0.8, "top_p": 0.95, "seed": self._random.randrange(2**31)}

    def _any_form(self) -> Json:
        return streamed(self._random.random() < 0.5)


def streamed(wanted: bool) -> Json:
    """Options of a stream that ends with its usage; none for a reply as one object."""
    return {"stream": True, "stream_options": {"include_usage": True}} if wanted else {}


KINDS: dict[str, Callable[[Planner], Talk]] = {
    "whole": Planner.whole,
    "stream": Planner.stream,
    "several": Planner.several,
    "stop": Planner.stopped,
    "sampled": Planner.sampled,
    "conversation": Planner.conversation,
    "left waiting": Planner.left_waiting,
    "left midway": Planner.left_midway,
    "left whole": Planner.left_whole,
    "malformed": Planner.malformed,
}
PATTERN = (*KINDS, "whole", "whole", "stream", "stream", "several", "stop", "sampled", "malformed")
"""Kinds of talks by turns: twenty requests, of which each kind has its share."""
