"""The server, asked by OpenAI's own client."""

import asyncio

import openai
import pytest

from tests.fake_engine import FakeEngine
from tests.servers import serving

MESSAGES = [{"role": "user", "content": "w1 w2 ?"}]


@pytest.fixture(scope="module")
def engine():
    return FakeEngine()


@pytest.fixture(scope="module")
def port(engine):
    with serving(engine, keys=("key",)) as port:
        yield port


@pytest.fixture
def client(port):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="key", max_retries=0) as client:
        yield client


def test_a_chat(client):
    reply = client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2, n=2)
    assert [choice.message.content for choice in reply.choices] == ["one two three"] * 2
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].logprobs.content[0].top_logprobs[1].token == "other1"
    assert reply.usage.prompt_tokens_details.cached_tokens == reply.usage.prompt_tokens // 2
    assert reply.usage.lazyllm["computed_fraction"] == 0.25


def test_a_reply_goes_on_as_a_message(client):
    message = client.chat.completions.create(model="tiny", messages=MESSAGES).choices[0].message
    again = client.chat.completions.create(model="tiny", messages=[*MESSAGES, message, *MESSAGES])
    assert again.choices[0].message.content == "one two three"


def test_a_chat_as_a_stream(client):
    stream = client.chat.completions.create(
        model="tiny:dense", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "one two three"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == 3
    assert chunks[-1].usage.lazyllm["revived_tokens"] == 7


def test_a_stream_with_a_trace(client):
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, stream=True, extra_body={"lazyllm": {"trace": True}}
    )
    told = [chunk.lazyllm for chunk in stream if not chunk.choices]
    assert "w1" in "".join(told[0]["prompt"])
    assert told[1]["depths"]["layers"] == 4


def test_the_streaming_helper_of_the_client_understands_the_stream(client):
    with client.chat.completions.stream(model="tiny", messages=MESSAGES, logprobs=True) as stream:
        for _ in stream:
            pass
        assert stream.get_final_completion().choices[0].message.content == "one two three"


def test_texts(client):
    reply = client.completions.create(model="tiny", prompt=["w1", "w2"], logprobs=1, echo=False)
    assert [choice.text for choice in reply.choices] == ["one two three"] * 2
    assert reply.choices[0].logprobs.text_offset == [0, 4, 8]
    chunks = client.completions.create(model="tiny", prompt=[12, 13], stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "one two three"


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny", "tiny:dense", "tiny:drop"]
    assert client.models.retrieve("tiny:dense").owned_by == "lazyllm"


def test_the_asynchronous_client(port):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="key") as client:
            reply, stream = await asyncio.gather(
                client.chat.completions.create(model="tiny", messages=MESSAGES),
                client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True),
            )
            return reply.choices[0].message.content, [chunk async for chunk in stream]

    text, chunks = asyncio.run(ask())
    assert text == "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one two three"


def test_leaving_a_stream_of_the_client_gives_its_job_up(engine, client):
    def endless(run):
        run.say(["one "])
        run.wait()

    before, engine.script = engine.script, endless
    try:
        stream = client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True)
        next(iter(stream))
        stream.close()
        assert engine.runs[-1].given_up.wait(20)
    finally:
        engine.script = before


def test_errors_are_those_of_the_client(engine, client, port):
    ask = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as caught:
        ask(model="tiny", messages=[{"role": "user", "content": "w1 " * 300}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        ask(model="tiny", messages=MESSAGES, tools=[{"type": "function", "function": {"name": "f"}}])
    assert caught.value.param == "tools"
    with pytest.raises(openai.NotFoundError):
        ask(model="huge", messages=MESSAGES)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other").models.list()
    engine.full = True
    with pytest.raises(openai.RateLimitError) as limited:
        ask(model="tiny", messages=MESSAGES)
    engine.full = False
    assert limited.value.response.headers["retry-after"] == "3"
    assert limited.value.request_id
