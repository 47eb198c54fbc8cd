"""What requests may say: OpenAI's parameters as far as they mean something here, and `lazyllm`.

What would change a reply and is not done here is refused; what changes nothing is ignored; null is as good as nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from lazyllm.serving.jobs import TOP_LOGPROBS, Sampling

LEGACY_TOKENS = 16
"""Longest reply of a completion where nothing is said."""
PARTS = "\n\n"
"""What stands between the parts of a message."""


def _only(*allowed: Any) -> AfterValidator:
    """Refuses what would ask for something that is not done here."""

    def check(value: Any) -> Any:
        if value is not None and value not in allowed:
            raise PydanticCustomError("unsupported_parameter", "is not supported by this server")
        return value

    return AfterValidator(check)


def _fault(param: str, message: str) -> PydanticCustomError:
    """A fault of several parameters, told of one."""
    return PydanticCustomError("unsupported_value", "{message}", {"param": param, "message": message})


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is kind for one in value)


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _joined(content: Any) -> Any:
    """The text of a message that comes in parts."""
    if not isinstance(content, list):
        return content
    for number, part in enumerate(content):
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise PydanticCustomError(
                "unsupported_value",
                "has a part {number} that is no text; this server reads text alone",
                {"number": number},
            )
    return PARTS.join(part["text"] for part in content)


def _prompts(value: Any) -> Any:
    """One prompt as a list of one."""
    if isinstance(value, str) or _is_list_of(int, value):
        return [value]
    if _is_list_of(str, value) or (_is_list_of(list, value) and all(_is_list_of(int, one) for one in value)):
        return value
    raise PydanticCustomError("invalid_value", "should be a text, the ids of its tokens, or a list of either")


Ignored = Any
Text = Annotated[str, BeforeValidator(_joined), WithJsonSchema({"type": ["string", "array"]})]
Stop = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(_listed),
    Field(max_length=4),
    WithJsonSchema({"type": ["string", "array"]}),
]
Prompts = Annotated[
    list[str] | list[list[int]], BeforeValidator(_prompts), WithJsonSchema({"type": ["string", "array"]})
]
TokenId = Annotated[str, Field(pattern=r"^\d{1,9}$")]
Name = Annotated[str, Field(min_length=1)]


class Body(BaseModel):
    """JSON of which every field is known, and is what it says."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class LazyOptions(Body):
    """What only this server knows.

    Attributes:
        policy: the policy to answer with, instead of the model's.
        document: id of a loaded document that the only message asks about.
        query: the part of the prompt that asks, for scorers.
        trace: whether a stream tells how deep the prompt's tokens are computed.
    """

    policy: Name | None = None
    document: Name | None = None
    query: Name | None = None
    trace: bool | None = None


class StreamOptions(Body):
    """How a stream ends."""

    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class Message(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text
    name: str | None = None
    refusal: Annotated[Any, _only()] = None
    annotations: Annotated[Any, _only([])] = None
    audio: Annotated[Any, _only()] = None
    tool_calls: Annotated[Any, _only([])] = None
    function_call: Annotated[Any, _only()] = None

    @property
    def for_template(self) -> dict[str, str]:
        """The message as chat templates know it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class ReplyRequest(Body):
    """What both kinds of completions are asked with."""

    model: str
    lazyllm: LazyOptions | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stop: Stop | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise _fault("stream_options", "is for streams alone; say stream: true")
        if self.options.trace and not self.stream:
            raise _fault("lazyllm.trace", "is for streams alone; say stream: true")
        return self

    @property
    def options(self) -> LazyOptions:
        """What was said under `lazyllm`."""
        return self.lazyllm or LazyOptions()

    @property
    def replies(self) -> int:
        """How many replies to each prompt."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with what it has cost."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def _sampling(self, max_tokens: int | None, top_logprobs: int | None) -> Sampling:
        asked = {
            name: getattr(self, name)
            for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty", "seed")
            if getattr(self, name) is not None
        }
        bias = {int(token): bias for token, bias in (self.logit_bias or {}).items()}
        stop = tuple(self.stop or ())
        return Sampling(max_tokens, stop=stop, logit_bias=bias, top_logprobs=top_logprobs, **asked)


class ChatRequest(ReplyRequest):
    """A conversation that wants replies."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    tools: Annotated[Any, _only([])] = None
    tool_choice: Annotated[Any, _only("none")] = None
    parallel_tool_calls: Ignored = None
    functions: Annotated[Any, _only([])] = None
    function_call: Annotated[Any, _only("none")] = None
    response_format: Annotated[Any, _only({"type": "text"})] = None
    modalities: Annotated[Any, _only(["text"])] = None
    audio: Annotated[Any, _only()] = None

    @model_validator(mode="after")
    def _parameters_fit_each_other(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise _fault("top_logprobs", "needs logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise _fault("max_tokens", "is the old name of max_completion_tokens; say one of them")
        if self.options.document is not None and [message.role for message in self.messages] != ["user"]:
            raise _fault("messages", "has the question alone, as one user message, where a document is named")
        return self

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return self._sampling(self.max_completion_tokens or self.max_tokens, self._top)

    @property
    def _top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(ReplyRequest):
    """Texts that want to go on."""

    prompt: Prompts
    logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    suffix: Annotated[Any, _only("")] = None

    @model_validator(mode="after")
    def _parameters_fit_each_other(self) -> Self:
        if self.best_of not in (None, self.replies):
            raise _fault("best_of", f"can only be n, which is {self.replies}: every reply is returned")
        if self.echo and self.logprobs is not None:
            raise _fault("echo", "cannot be had with logprobs: tokens of a prompt that are left out have none")
        if self.options.document is not None:
            raise _fault("lazyllm.document", "is for chat completions")
        if self.options.trace and len(self.prompt) > 1:
            raise _fault("lazyllm.trace", f"is for one prompt, not {len(self.prompt)}")
        return self

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return self._sampling(self.max_tokens or LEGACY_TOKENS, self.logprobs)


class DocumentRequest(Body):
    """Texts to be loaded as one document.

    Attributes:
        texts: in this order.
        system: the system message before them.
        policy: the policy that questions about it will have.
    """

    texts: Annotated[list[str], Field(min_length=1)]
    system: str | None = None
    policy: Name | None = None
