"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from uuid import uuid4

from fastapi import Request, Response

from lazyllm.pages.pieces import prompt_pieces
from lazyllm.prompts import EncodedPrompt
from lazyllm.serving.http.answers import Asked, Prepared, answer
from lazyllm.serving.http.checks import check_sampling, policy_of_document
from lazyllm.serving.http.errors import Json
from lazyllm.serving.http.replies import Reply, bytes_of, clipped
from lazyllm.serving.http.schema import ChatRequest
from lazyllm.serving.http.service import Service, service_of
from lazyllm.serving.jobs import Delta, Job, Logprob


async def chat(request: Request, body: ChatRequest) -> Response:
    """Replies to a conversation."""
    service = service_of(request)
    policy = _policy(service, body)
    check_sampling(service, body.sampling, body.replies)
    shape = ChatShape(service.names.name(policy))
    return answer(service, Asked(body, shape, lambda: _prepared(service, body, policy)))


def _policy(service: Service, body: ChatRequest) -> str:
    """The policy a request names, or that of its document."""
    options = body.options
    policy = service.names.policy(body.model, options.policy)
    if options.document is None or options.policy is not None or policy != service.names.default:
        return policy
    return policy_of_document(service, options.document)


def _prepared(service: Service, body: ChatRequest, policy: str) -> Prepared:
    prompt = _encoded(service, body, policy)
    pipeline, options = service.engine.pipeline(policy), body.options
    trace = bool(options.trace)
    job = Job(prompt, body.sampling, body.replies, policy, options.document, trace)
    return Prepared([job], [""], prompt_pieces(prompt, pipeline.tokenizer) if trace else None)


def _encoded(service: Service, body: ChatRequest, policy: str) -> EncodedPrompt:
    query, document = body.options.query, body.options.document
    if document is None:
        messages = [message.for_template for message in body.messages]
        return service.engine.encode(messages, policy=policy, query=query)
    return service.engine.document(document).prompt(body.messages[0].content, query=query)


class ChatShape:
    """Chat completions, and the chunks of a stream of them.

    Args:
        model: what the model is called.
    """

    def __init__(self, model: str) -> None:
        self._model, self._id, self._created = model, f"chatcmpl-{uuid4().hex}", int(time.time())

    def _object(self, kind: str, choices: Sequence[Json], **fields: object) -> Json:
        head = {"id": self._id, "object": kind, "created": self._created, "model": self._model}
        return {**head, "choices": list(choices), **fields}

    def _chunk(self, choice: int, delta: Json, logprobs: Json | None = None, reason: str | None = None) -> Json:
        told = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._object("chat.completion.chunk", [told])

    def whole(self, replies: Sequence[Reply], usage: Json) -> Json:
        """All replies in one object."""
        choices = [
            {
                "index": choice,
                "message": {"role": "assistant", "content": reply.text, "refusal": None},
                "logprobs": _logprobs(reply.logprobs),
                "finish_reason": reply.reason,
            }
            for choice, reply in enumerate(replies)
        ]
        return self._object("chat.completion", choices, usage=usage)

    def opening(self, choice: int, echo: str) -> Json:
        """Who speaks."""
        return self._chunk(choice, {"role": "assistant", "content": echo})

    def delta(self, choice: int, delta: Delta) -> Json:
        """A reply goes on."""
        return self._chunk(choice, {"content": delta.text}, _logprobs(delta.logprobs))

    def end(self, choice: int, reason: str) -> Json:
        """A reply is complete."""
        return self._chunk(choice, {}, reason=reason)

    def beside(self, **fields: object) -> Json:
        """Something that is no reply."""
        return self._object("chat.completion.chunk", [], **fields)


def _logprobs(logprobs: Sequence[Logprob]) -> Json | None:
    """The tokens of a reply, or of a part of it; None where they were not asked for."""
    if not logprobs:
        return None
    content = [{**_token(one), "top_logprobs": [_token(other) for other in one.top]} for one in logprobs]
    return {"content": content, "refusal": None}


def _token(one: Logprob) -> Json:
    return {"token": one.text, "logprob": clipped(one.logprob), "bytes": bytes_of(one.text)}
