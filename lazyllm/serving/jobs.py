"""What is asked of the engine, and what it says back while it works."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from lazyllm.errors import InputError
from lazyllm.prompts import EncodedPrompt

TOP_LOGPROBS = 20
"""Most alternatives that are told for a token."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a reply are chosen.

    Attributes:
        max_tokens: most tokens of a reply; None = as many as there are positions left.
        temperature: 0 takes the likeliest token.
        top_p: probability mass of the likeliest tokens that may be drawn.
        seed: of the draw; None = another one each time. Reply i of several draws with seed + i.
        stop: strings that end a reply, and are not part of it.
        presence_penalty, frequency_penalty: taken off the logits of tokens that the reply has, once or each time.
        logit_bias: added to the logits of tokens, by vocabulary id.
        top_logprobs: how many alternatives are told with the log-probability of each token; None = nothing is told.

    Raises:
        InputError: for a number out of its range.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None

    def __post_init__(self) -> None:
        """Checks the ranges, which are those of OpenAI's API."""
        ranges = {
            "max_tokens": (self.max_tokens, 1, 2**31),
            "temperature": (self.temperature, 0, 2),
            "top_p": (self.top_p, 0, 1),
            "presence_penalty": (self.presence_penalty, -2, 2),
            "frequency_penalty": (self.frequency_penalty, -2, 2),
            "top_logprobs": (self.top_logprobs, 0, TOP_LOGPROBS),
        }
        for name, (number, least, most) in ranges.items():
            if number is not None and not least <= number <= most:
                raise InputError(f"{name} is a number from {least} to {most}, not {number}")
        for token, bias in self.logit_bias.items():
            if not -100 <= bias <= 100:
                raise InputError(f"logit_bias of token {token} is a number from -100 to 100, not {bias}")
        if "" in self.stop:
            raise InputError("a stop string cannot be empty")


@dataclass(frozen=True)
class Job:
    """A prompt that wants replies.

    Attributes:
        prompt: what the policy's pipeline made of it: `engine.encode(...)`.
        sampling: how tokens are chosen.
        replies: how many.
        policy: name of one of the engine's pipelines; None = its first.
        document: id of a document the engine has loaded, with which the prompt begins; None = none.
        trace: whether `Depths` are told.
    """

    prompt: EncodedPrompt
    sampling: Sampling = field(default_factory=Sampling)
    replies: int = 1
    policy: str | None = None
    document: str | None = None
    trace: bool = False


@dataclass(frozen=True)
class Logprob:
    """A token and how likely it was.

    Attributes:
        token_id: vocabulary id.
        text: what it stands for; half a character is shown as a replacement character.
        logprob: natural logarithm of its probability, before temperature and top_p.
        top: the likeliest tokens, as many as were asked for.
    """

    token_id: int
    text: str
    logprob: float
    top: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class Delta:
    """A reply goes on.

    Attributes:
        reply: which of the job's replies, from 0.
        text: what comes behind the text so far; may be empty while a character or a stop string is incomplete.
        token_ids: tokens that came with it.
        logprobs: one for each token, where they were asked for.
    """

    reply: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class Depths:
    """How many layers have computed tokens of the prompt: all of them after the prefill, then those that were revived.

    Attributes:
        reply: which of the job's replies; 0 while they are one.
        layers: number of layers of the model.
        tokens: indices of the prompt's tokens.
        depths: of each, how many layers have computed it.
    """

    reply: int
    layers: int
    tokens: tuple[int, ...]
    depths: tuple[int, ...]


@dataclass(frozen=True)
class ReplyEnd:
    """A reply is complete.

    Attributes:
        reply: which of the job's replies.
        reason: "stop" at an end token or a stop string, "length" at `max_tokens` or the last position.
    """

    reply: int
    reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Usage:
    """What a job has cost.

    Attributes:
        prompt_tokens: number of tokens of the prompt.
        cached_tokens: how many of them a cache held already.
        reply_tokens: tokens of all replies, end tokens included.
        computed_fraction: layer-tokens of the prompt computed by its prefill, of those a dense prefill of all of the
            prompt computes.
        revived_tokens: how often a step of a reply took up a token of the prompt that an earlier one had left.
        queued_seconds: from `submit` to the first layer.
        ttft_seconds: from `submit` to the first token.
        seconds: from `submit` to the end.
    """

    prompt_tokens: int
    cached_tokens: int
    reply_tokens: int
    computed_fraction: float
    revived_tokens: int
    queued_seconds: float
    ttft_seconds: float
    seconds: float


@dataclass(frozen=True)
class JobEnd:
    """All replies of a job are complete; nothing comes after it."""

    usage: Usage


@dataclass(frozen=True)
class JobFailed:
    """A job cannot go on; nothing comes after it.

    Attributes:
        error: a `LazyLLMError` where the job is at fault or was cancelled, or anything else.
    """

    error: BaseException


@dataclass(frozen=True)
class DocumentLoaded:
    """A document waits for questions; nothing comes after it.

    Attributes:
        document: its id.
        tokens: number of tokens.
        depth, layers: how many layers computed them, of how many.
        seconds: how long that took.
        bytes: of keys, values and waiting states.
    """

    document: str
    tokens: int
    depth: int
    layers: int
    seconds: float
    bytes: int


LAST = (JobEnd, JobFailed, DocumentLoaded)
"""Events that nothing comes after."""
Event: TypeAlias = Delta | Depths | ReplyEnd | JobEnd | JobFailed | DocumentLoaded
