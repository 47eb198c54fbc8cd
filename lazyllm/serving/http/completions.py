"""POST /v1/completions."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from uuid import uuid4

from fastapi import Request, Response

from lazyllm.pages.pieces import prompt_pieces
from lazyllm.serving.http.answers import Asked, Prepared, answer
from lazyllm.serving.http.checks import check_sampling, check_tokens
from lazyllm.serving.http.errors import Json
from lazyllm.serving.http.replies import Reply, clipped
from lazyllm.serving.http.schema import CompletionRequest
from lazyllm.serving.http.service import Service, service_of
from lazyllm.serving.jobs import Delta, Job, Logprob


async def complete(request: Request, body: CompletionRequest) -> Response:
    """Texts that go on."""
    service = service_of(request)
    policy = service.names.policy(body.model, body.options.policy)
    check_sampling(service, body.sampling, body.replies)
    for prompt in body.prompt:
        if not isinstance(prompt, str):
            check_tokens(service, prompt, param="prompt")
    shape = CompletionShape(service.names.name(policy))
    return answer(service, Asked(body, shape, lambda: _prepared(service, body, policy)))


def _prepared(service: Service, body: CompletionRequest, policy: str) -> Prepared:
    pipeline, sampling, options = service.engine.pipeline(policy), body.sampling, body.options
    prompts = [service.engine.encode(prompt, policy=policy, query=options.query) for prompt in body.prompt]
    trace = bool(options.trace)
    jobs = [Job(prompt, sampling, body.replies, policy, trace=trace) for prompt in prompts]
    echoes = [_echo(service, prompt, policy) if body.echo else "" for prompt in body.prompt]
    return Prepared(jobs, echoes, prompt_pieces(prompts[0], pipeline.tokenizer) if trace else None)


def _echo(service: Service, prompt: str | list[int], policy: str) -> str:
    """The text of a prompt."""
    if isinstance(prompt, str):
        return prompt
    tokenizer = service.engine.pipeline(policy).tokenizer
    return "" if tokenizer is None else str(tokenizer.decode(prompt))


class CompletionShape:
    """Text completions, whole and in a stream.

    Args:
        model: what the model is called.
    """

    def __init__(self, model: str) -> None:
        self._model, self._id, self._created = model, f"cmpl-{uuid4().hex}", int(time.time())
        self._read: Counter[int] = Counter()

    def _object(self, choices: Sequence[Json], **fields: object) -> Json:
        head = {"id": self._id, "object": "text_completion", "created": self._created, "model": self._model}
        return {**head, "choices": list(choices), **fields}

    def _chunk(self, choice: int, text: str, logprobs: Json | None = None, reason: str | None = None) -> Json:
        return self._object([{"index": choice, "text": text, "logprobs": logprobs, "finish_reason": reason}])

    def whole(self, replies: Sequence[Reply], usage: Json) -> Json:
        """All replies in one object."""
        choices = [
            {
                "index": choice,
                "text": reply.text,
                "logprobs": _logprobs(reply.logprobs, 0),
                "finish_reason": reply.reason,
            }
            for choice, reply in enumerate(replies)
        ]
        return self._object(choices, usage=usage)

    def opening(self, choice: int, echo: str) -> Json | None:
        """The prompt, where it is asked for."""
        return self._chunk(choice, echo) if echo else None

    def delta(self, choice: int, delta: Delta) -> Json:
        """A reply goes on."""
        logprobs = _logprobs(delta.logprobs, self._read[choice])
        self._read[choice] += sum(len(one.text) for one in delta.logprobs)
        return self._chunk(choice, delta.text, logprobs)

    def end(self, choice: int, reason: str) -> Json:
        """A reply is complete."""
        return self._chunk(choice, "", reason=reason)

    def beside(self, **fields: object) -> Json:
        """Something that is no reply."""
        return self._object([], **fields)


def _logprobs(logprobs: Sequence[Logprob], offset: int) -> Json | None:
    """Tokens of a reply from the character `offset` on; None where they were not asked for."""
    if not logprobs:
        return None
    starts = accumulate((len(one.text) for one in logprobs), initial=offset)
    return {
        "tokens": [one.text for one in logprobs],
        "token_logprobs": [clipped(one.logprob) for one in logprobs],
        "top_logprobs": [{other.text: clipped(other.logprob) for other in (*one.top, one)} for one in logprobs],
        "text_offset": [start for start, _ in zip(starts, logprobs, strict=False)],
    }
