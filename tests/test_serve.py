"""The server, called in this process: what it answers, refuses and counts."""

import json
import logging

import pytest

from lazyllm.errors import Closed, DocumentGone
from lazyllm.serving.http.log import JsonLines
from lazyllm.serving.jobs import Delta, JobFailed
from tests.fake_engine import FakeEngine, scripted
from tests.servers import CHAT, CHATS, DOCUMENTS, TEXT, TEXTS, client_of, events


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def client(engine):
    return client_of(engine)


def refused(response, status: int, *parts: str, code: str | None = None, param: str | None = None) -> dict:
    """An error in OpenAI's shape, whose message holds `parts`."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for part in parts:
        assert part in error["message"], error
    assert code is None or error["code"] == code, error
    assert param is None or error["param"] == param, error
    return error


def prompt_text(engine: FakeEngine, number: int = 0) -> str:
    return engine.runs[number].job.prompt.text


# -- chat -------------------------------------------------------------------------------------------


def test_a_chat_is_answered_in_openais_shape(client):
    answer = client.post(CHATS, json=CHAT).json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "one two three", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    tokens = answer["usage"]["prompt_tokens"]
    assert answer["usage"] == {
        "prompt_tokens": tokens,
        "completion_tokens": 3,
        "total_tokens": tokens + 3,
        "prompt_tokens_details": {"cached_tokens": tokens // 2},
        "lazyllm": {
            "computed_fraction": 0.25,
            "revived_tokens": 7,
            "queued_seconds": 0.01,
            "ttft_seconds": 0.1,
            "seconds": 0.3,
        },
    }


def test_messages_go_through_the_chat_template(client, engine):
    messages = [
        {"role": "developer", "content": "w1"},
        {"role": "user", "content": [{"type": "text", "text": "w2"}, {"type": "text", "text": "w3"}]},
        {"role": "assistant", "content": "w4", "refusal": None, "tool_calls": []},
        {"role": "user", "content": "w5 ?", "name": "ada"},
    ]
    assert client.post(CHATS, json={**CHAT, "messages": messages}).status_code == 200
    said = "system : w1 end user : w2\n\nw3 end assistant : w4 end user : w5 ? end assistant :"
    assert prompt_text(engine) == said


def test_what_is_asked_reaches_the_engine(client, engine):
    asked = {
        "n": 2, "stop": ["end", "."], "seed": 5, "max_completion_tokens": 9, "temperature": 0, "top_p": 0.5,
        "presence_penalty": 1, "frequency_penalty": -1.5, "logit_bias": {"7": -100}, "logprobs": True,
        "top_logprobs": 2, "lazyllm": {"policy": "dense", "query": "w2"}, "user": "ada", "metadata": {"a": "b"},
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "stream": False, "store": True,
    }  # fmt: skip
    assert client.post(CHATS, json={**CHAT, **asked}).status_code == 200
    job = engine.runs[0].job
    sampling = job.sampling
    assert (job.replies, job.policy, job.document, job.trace) == (2, "dense", None, False)
    assert (sampling.stop, sampling.seed, sampling.max_tokens) == (("end", "."), 5, 9)
    assert (sampling.temperature, sampling.top_p) == (0, 0.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -1.5)
    assert (sampling.logit_bias, sampling.top_logprobs) == ({7: -100}, 2)
    start, stop = job.prompt.marks.query[0]
    assert prompt_text(engine).split()[start:stop] == ["w2"]


def test_nothing_said_is_openais_default(client, engine):
    for path, body in ((CHATS, CHAT), (TEXTS, TEXT)):
        assert client.post(path, json={**body, "n": None, "stop": None, "temperature": None}).status_code == 200
    chat, text = (run.job.sampling for run in engine.runs)
    assert (chat.temperature, chat.top_p, chat.max_tokens, chat.stop) == (1, 1, None, ())
    assert text.max_tokens == 16


def test_several_replies_are_several_choices(client):
    choices = client.post(CHATS, json={**CHAT, "n": 3}).json()["choices"]
    assert [(choice["index"], choice["message"]["content"]) for choice in choices] == [
        (index, "one two three") for index in range(3)
    ]


def test_logprobs_of_a_chat(client):
    choice = client.post(CHATS, json={**CHAT, "logprobs": True, "top_logprobs": 1}).json()["choices"][0]
    first, second, _ = choice["logprobs"]["content"]
    other = {"token": "other0", "logprob": -1.0, "bytes": list(b"other0")}
    assert first == {"token": "one ", "logprob": -0.5, "bytes": list(b"one "), "top_logprobs": [other]}
    assert second["logprob"] == -9999.0, "JSON has no infinity"


def test_half_a_character_has_no_bytes():
    def half(run):
        run.say(["\ufffd"])
        run.end()

    with scripted(half) as engine:
        choice = client_of(engine).post(CHATS, json={**CHAT, "logprobs": True}).json()["choices"][0]
    assert choice["logprobs"]["content"][0]["bytes"] is None


def test_a_stream_of_a_chat(client):
    body = {**CHAT, "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    response = client.post(CHATS, json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, done = events(response.text)
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:2]] == [{"role": "assistant", "content": ""}] * 2
    for index in range(2):
        own = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in own) == "one two three"
        assert [choice["finish_reason"] for choice in own] == [None] * 4 + ["stop"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == client.post(CHATS, json={**CHAT, "n": 2}).json()["usage"]


def test_usage_in_a_stream_is_asked_for(client):
    chunks = events(client.post(CHATS, json={**CHAT, "stream": True}).text)
    assert not any("usage" in chunk for chunk in chunks[:-1])


def test_a_delta_without_text_is_not_told_but_its_logprobs_are():
    def quiet(run):
        run.tell(Delta(0, "", (1,)))
        run.say(["", "word"])
        run.end()

    with scripted(quiet) as engine:
        client = client_of(engine)
        silent = events(client.post(CHATS, json={**CHAT, "stream": True}).text)
        told = events(client.post(CHATS, json={**CHAT, "stream": True, "logprobs": True}).text)
    assert len(silent) == 4
    assert len(told) == 5
    assert told[1]["choices"][0]["logprobs"]["content"][0]["token"] == ""


def test_a_trace_tells_the_prompt_and_its_depths(client, engine):
    body = {**CHAT, "stream": True, "lazyllm": {"trace": True}}
    first, second, *_ = events(client.post(CHATS, json=body).text)
    assert first["choices"] == []
    assert "".join(first["lazyllm"]["prompt"]) == prompt_text(engine)
    depths = [
        chunk["lazyllm"]["depths"]
        for chunk in events(client.post(CHATS, json=body).text)[:-1]
        if "depths" in chunk.get("lazyllm", {})
    ]
    tokens = len(engine.runs[0].job.prompt.token_ids)
    assert depths == [
        {"reply": 0, "layers": 4, "tokens": list(range(tokens)), "depths": [1 + at % 4 for at in range(tokens)]}
    ]
    assert second["choices"][0]["delta"]["role"] == "assistant"


# -- texts that go on -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "token_ids"),
    [
        ("w1 w2", [[12, 13]]),
        (["w1", "w2 w3"], [[12], [13, 14]]),
        ([12, 13], [[12, 13]]),
        ([[12], [13, 14]], [[12], [13, 14]]),
    ],
)
def test_prompts_are_texts_or_tokens_one_or_many(client, engine, prompt, token_ids):
    choices = client.post(TEXTS, json={**TEXT, "prompt": prompt, "n": 2}).json()["choices"]
    assert [run.job.prompt.token_ids for run in engine.runs] == token_ids
    assert [choice["index"] for choice in choices] == list(range(2 * len(token_ids)))
    assert {choice["text"] for choice in choices} == {"one two three"}


def test_usage_of_several_prompts_is_their_sum(client):
    usage = client.post(TEXTS, json={**TEXT, "prompt": ["w1 w2", "w3 w4 w5 w6"]}).json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["lazyllm"]["revived_tokens"]) == (6, 6, 14)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 3
    assert usage["lazyllm"]["computed_fraction"] == 0.25
    assert usage["lazyllm"]["ttft_seconds"] == 0.1


def test_logprobs_of_a_text_are_the_same_whole_and_in_a_stream(client):
    whole = client.post(TEXTS, json={**TEXT, "logprobs": 1}).json()["choices"][0]["logprobs"]
    assert whole == {
        "tokens": ["one ", "two ", "three"],
        "token_logprobs": [-0.5, -9999.0, -0.5],
        "top_logprobs": [
            {"other0": -1.0, "one ": -0.5},
            {"other0": -1.0, "two ": -9999.0},
            {"other0": -1.0, "three": -0.5},
        ],
        "text_offset": [0, 4, 8],
    }
    streamed = events(client.post(TEXTS, json={**TEXT, "logprobs": 1, "stream": True}).text)[:-1]
    parts = [chunk["choices"][0]["logprobs"] for chunk in streamed if chunk["choices"][0]["logprobs"]]
    assert {name: [value for part in parts for value in part[name]] for name in whole} == whole


@pytest.mark.parametrize("prompt", ["w1 w2", [12, 13]])
def test_echo_gives_the_prompt_first(client, prompt):
    body = {**TEXT, "prompt": prompt, "echo": True}
    assert client.post(TEXTS, json=body).json()["choices"][0]["text"] == "w1 w2one two three"
    chunks = events(client.post(TEXTS, json={**body, "stream": True}).text)[:-1]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "w1 w2one two three"


# -- models and documents ---------------------------------------------------------------------------


def test_there_is_a_model_for_each_policy(client, engine):
    listed = client.get("/v1/models").json()["data"]
    assert [entry["id"] for entry in listed] == ["tiny", "tiny:dense", "tiny:drop"]
    assert client.get("/v1/models/tiny:dense").json() == listed[1]
    for model, policy in (("tiny", "aux"), ("tiny:dense", "dense"), ("tiny:aux", "aux")):
        answer = client.post(CHATS, json={**CHAT, "model": model}).json()
        assert engine.runs[-1].job.policy == policy
        assert answer["model"] == ("tiny" if policy == "aux" else model)


def test_what_no_model_is_called_is_404(client):
    for response in (
        client.post(CHATS, json={**CHAT, "model": "tiny:danse"}),
        client.post(TEXTS, json={**TEXT, "model": "tiny:danse"}),
        client.get("/v1/models/tiny:danse"),
    ):
        refused(response, 404, "tiny:danse", "Did you mean 'tiny:dense'?", code="model_not_found")


def test_a_policy_may_be_named_beside_the_model_but_not_against_it(client, engine):
    assert client.post(CHATS, json={**CHAT, "lazyllm": {"policy": "drop"}}).json()["model"] == "tiny:drop"
    assert engine.runs[-1].job.policy == "drop"
    against = {**CHAT, "model": "tiny:dense", "lazyllm": {"policy": "drop"}}
    refused(client.post(CHATS, json=against), 400, "tiny:dense", "drop", param="lazyllm.policy")
    nobody = {**CHAT, "lazyllm": {"policy": "dorp"}}
    refused(client.post(CHATS, json=nobody), 400, "dorp", "aux, dense, drop", code="policy_not_found")


def test_a_document_is_loaded_once_and_asked(client, engine):
    loaded = client.post(DOCUMENTS, json={"texts": ["w1 w2 w3", "w4"], "policy": "aux"}).json()
    assert set(loaded) == {"id", "object", "tokens", "depth", "layers", "seconds", "bytes"}
    assert (loaded["object"], loaded["layers"]) == ("document", 4)
    body = {**CHAT, "lazyllm": {"document": loaded["id"]}}
    assert client.post(CHATS, json=body).status_code == 200
    job = engine.runs[-1].job
    assert job.document == loaded["id"]
    assert prompt_text(engine, -1).startswith("user : w1 w2 w3\n\nw4")
    assert prompt_text(engine, -1).endswith("w1 w2 ? end assistant :")


def test_a_question_has_the_policy_of_its_document(client, engine):
    name = client.post(DOCUMENTS, json={"texts": ["w1 w2"], "policy": "dense"}).json()["id"]
    assert client.post(CHATS, json={**CHAT, "lazyllm": {"document": name}}).json()["model"] == "tiny:dense"
    assert engine.runs[-1].job.policy == "dense"


def test_a_document_may_leave_before_its_question_is_done(client, engine):
    name = client.post(DOCUMENTS, json={"texts": ["w1 w2"]}).json()["id"]
    engine.script = lambda run: run.tell(JobFailed(DocumentGone(f"there is no document {name!r}")))
    asked = client.post(CHATS, json={**CHAT, "lazyllm": {"document": name}})
    refused(asked, 404, name, code="document_not_found", param="lazyllm.document")


def test_documents_are_refused_clearly(client):
    gone = {**CHAT, "lazyllm": {"document": "doc-9"}}
    refused(client.post(CHATS, json=gone), 404, "doc-9", code="document_not_found", param="lazyllm.document")
    talk = {**gone, "messages": [{"role": "system", "content": "w1"}, *CHAT["messages"]]}
    refused(client.post(CHATS, json=talk), 400, "one user message", param="messages")
    refused(client.post(TEXTS, json={**TEXT, "lazyllm": {"document": "doc-9"}}), 400, param="lazyllm.document")
    refused(client.post(DOCUMENTS, json={"texts": []}), 400, param="texts")
    refused(client.post(DOCUMENTS, json={"texts": [" "]}), 400, "document 0")
    refused(client.post(DOCUMENTS, json={"texts": ["w1"], "policy": "dorp"}), 400, "dorp", param="policy")
    refused(client.post(DOCUMENTS, json={"texts": ["w1 " * 300]}), 400, "256", code="context_length_exceeded")


# -- what is refused --------------------------------------------------------------------------------

BAD_CHATS = [
    ({"colour": "red"}, "colour", "unknown parameter 'colour'"),
    ({"messages": None}, "messages", "messages"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": [{"role": "tool", "content": "w1"}]}, "messages.0.role", "'tool'"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "None"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "text alone"),
    ({"messages": [{"role": "user", "content": "w1", "tool_calls": [{}]}]}, "messages.0.tool_calls", "not supported"),
    ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"functions": [{}]}, "functions", "not supported"),
    ({"tool_choice": "auto"}, "tool_choice", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"n": 0}, "n", "0"),
    ({"n": 17}, "n", "1 to 16"),
    ({"n": 1.5}, "n", "1.5"),
    ({"n": True}, "n", "True"),
    ({"temperature": "hot"}, "temperature", "'hot'"),
    ({"temperature": 2.1}, "temperature", "2.1"),
    ({"top_p": -0.1}, "top_p", "-0.1"),
    ({"presence_penalty": 3}, "presence_penalty", "3"),
    ({"frequency_penalty": -3}, "frequency_penalty", "-3"),
    ({"max_tokens": 0}, "max_tokens", "0"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "old name"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "4"),
    ({"stop": ""}, "stop.0", ""),
    ({"seed": 2**63}, "seed", ""),
    ({"logit_bias": {"w1": 1}}, "logit_bias.w1.[key]", "w1"),
    ({"logit_bias": {"7": 101}}, "logit_bias.7", "101"),
    ({"logit_bias": {"96": 1}}, "logit_bias", "0 to 95"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "21"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"lazyllm": {"trace": True}}, "lazyllm.trace", "stream"),
    ({"lazyllm": {"colour": "red"}}, "lazyllm.colour", "unknown"),
]
BAD_TEXTS = [
    ({"prompt": None}, "prompt", "None"),
    ({"prompt": []}, "prompt", "[]"),
    ({"prompt": [1, "w1"]}, "prompt", "list of either"),
    ({"prompt": [96]}, "prompt", "0 to 95"),
    ({"prompt": [-1]}, "prompt", "-1"),
    ({"prompt": [[2**70]]}, "prompt", str(2**70)),
    ({"suffix": "w1"}, "suffix", "not supported"),
    ({"best_of": 2}, "best_of", "n"),
    ({"echo": True, "logprobs": 1}, "echo", "logprobs"),
    ({"stream": True, "prompt": ["w1", "w2"], "lazyllm": {"trace": True}}, "lazyllm.trace", "one prompt"),
]


@pytest.mark.parametrize(("wrong", "param", "part"), BAD_CHATS)
def test_a_chat_that_cannot_be_is_refused_by_name(client, engine, wrong, param, part):
    refused(client.post(CHATS, json={**CHAT, **wrong}), 400, part, param=param)
    assert not engine.runs


@pytest.mark.parametrize(("wrong", "param", "part"), BAD_TEXTS)
def test_a_text_that_cannot_be_is_refused_by_name(client, engine, wrong, param, part):
    refused(client.post(TEXTS, json={**TEXT, **wrong}), 400, part, param=param)
    assert not engine.runs


def test_a_missing_parameter_is_named(client):
    refused(client.post(CHATS, json={"model": "tiny"}), 400, "messages", code="missing_required_parameter")
    refused(client.post(TEXTS, json={"prompt": "w1"}), 400, "model", param="model")


def test_a_prompt_that_is_too_long_is_400_with_the_numbers(client):
    body = {**CHAT, "messages": [{"role": "user", "content": "w1 " * 300}]}
    refused(client.post(CHATS, json=body), 400, "256", code="context_length_exceeded")
    refused(client.post(TEXTS, json={**TEXT, "max_tokens": 254}), 400, "256", code="context_length_exceeded")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"model": "tiny", "prompt": "\xc3"}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "w1", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "w1", "user": Infinity}',
        b'{"model": "tiny", "prompt": "w1", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "w1", "user": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "tiny", "prompt": "w1", "n": ' + b"9" * 6_000 + b"}",
        b"[]",
        b'"tiny"',
    ],
)
def test_what_is_no_proper_json_is_400(client, engine, body):
    refused(client.post(TEXTS, content=body, headers={"content-type": "application/json"}), 400)
    assert not engine.runs


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_a_body_that_another_origin_could_send_unasked_is_415(client, kind):
    response = client.post(TEXTS, content=json.dumps(TEXT), headers={"content-type": kind})
    refused(response, 415, "application/json", repr(kind))


def test_a_large_body_is_413_whether_it_says_so_or_not(engine):
    client = client_of(engine, max_body_bytes=1000)
    large = json.dumps({**TEXT, "user": "x" * 1000}).encode()
    headers = {"content-type": "application/json"}
    refused(client.post(TEXTS, content=large, headers=headers), 413, "1,000 bytes", code="body_too_large")
    refused(client.post(TEXTS, content=iter([large]), headers=headers), 413, "1,000 bytes")
    assert client.post(TEXTS, json=TEXT).status_code == 200


def test_a_full_queue_is_429_and_says_when_to_come_again(client, engine):
    engine.full = True
    response = client.post(CHATS, json={**CHAT, "stream": True})
    refused(response, 429, "64", code="queue_full")
    assert response.headers["retry-after"] == "3"


def test_a_closed_engine_is_503(client, engine):
    engine.close()
    refused(client.post(CHATS, json=CHAT), 503, code="shutting_down")
    refused(client.post(DOCUMENTS, json={"texts": ["w1"]}), 503)
    assert client.get("/ready").status_code == 503
    assert client.get("/health").status_code == 200


def test_an_engine_that_is_closed_in_a_stream_says_so_there():
    def closing(run):
        run.say(["one"])
        raise Closed("the engine was closed before the job was done")

    with scripted(closing) as engine:
        *_, last = events(client_of(engine).post(CHATS, json={**CHAT, "stream": True}).text)
    assert last["error"]["code"] == "shutting_down"


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_is_504_and_its_job_is_given_up(stream):
    with scripted(lambda run: run.wait()) as engine:
        client = client_of(engine, request_seconds=0.7)
        refused(client.post(CHATS, json={**CHAT, "stream": stream}), 504, "0.7 s", code="timeout")
        assert engine.runs[0].given_up.is_set()


def test_a_stream_that_takes_too_long_ends_with_the_error():
    def endless(run):
        run.say(["one"])
        run.wait()

    with scripted(endless) as engine:
        response = client_of(engine, request_seconds=0.7).post(CHATS, json={**CHAT, "stream": True})
        assert response.status_code == 200
        assert events(response.text)[-1]["error"]["code"] == "timeout"
        assert engine.runs[0].given_up.is_set()


def test_several_prompts_are_all_or_none():
    with scripted(lambda run: run.wait()) as engine:
        submit = engine.submit

        def at_most_two(job, deliver):
            engine.full = len(engine.runs) == 2
            return submit(job, deliver)

        engine.submit = at_most_two
        refused(client_of(engine).post(TEXTS, json={**TEXT, "prompt": ["w1", "w2", "w3"]}), 429)
        assert [run.given_up.is_set() for run in engine.runs] == [True, True]


def test_an_unknown_path_or_method_has_openais_shape_too(client):
    refused(client.get("/v1/nothing"), 404)
    response = client.get(CHATS)
    refused(response, 405)
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_of_the_engine_is_500_without_a_word_of_it(stream, caplog):
    def broken(run):
        raise RuntimeError("secret w1 w2")

    with scripted(broken) as engine:
        response = client_of(engine).post(CHATS, json={**CHAT, "stream": stream})
        refused(response, 500, "its log", code="internal_error")
        assert "secret" not in response.text
        assert "secret" not in "\n".join(map(JsonLines().format, caplog.records))
    assert any(record.levelno == logging.ERROR for record in caplog.records)


# -- who may come in --------------------------------------------------------------------------------


def test_without_the_key_nothing_but_the_page_and_the_health_is_there(engine):
    client = client_of(engine, keys=("first", "sécond"))
    for header in (None, "first", "Bearer", "Bearer ", "Bearer firs", "Bearer firstt", "Basic first", "Bearer é"):
        headers = {} if header is None else {"authorization": header.encode()}
        for response in (
            client.post(CHATS, json=CHAT, headers=headers),
            client.get("/v1/models", headers=headers),
            client.get("/metrics", headers=headers),
            client.get("/openapi.json", headers=headers),
        ):
            fault = "a key is needed" if header is None else "the key is none of this server's"
            refused(response, 401, f"{fault}: send the header Authorization: Bearer KEY", code="invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
    assert client.get("/health").status_code == client.get("/ready").status_code == 200
    assert not engine.runs


@pytest.mark.parametrize("key", ["first", "sécond"])
def test_any_of_the_keys_lets_in(engine, key):
    client = client_of(engine, keys=("first", "sécond"))
    headers = {"authorization": f"Bearer {key}".encode()}
    assert client.post(CHATS, json=CHAT, headers=headers).status_code == 200


def test_a_server_of_this_machine_alone_is_not_reached_by_another_name(engine):
    client = client_of(engine, hosts=("localhost", "127.0.0.1", "::1"))
    for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST"):
        assert client.get("/v1/models", headers={"host": host}).status_code == 200
    refused(client.get("/v1/models", headers={"host": "evil.example"}), 403, "evil.example")


def test_pages_of_other_origins_may_ask_only_where_that_is_said(engine):
    asking = {
        "origin": "https://page.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    }
    closed, open_to = client_of(engine), client_of(engine, cors_origins=("https://page.example",), keys=("key",))
    assert "access-control-allow-origin" not in closed.options(CHATS, headers=asking).headers
    allowed = open_to.options(CHATS, headers=asking)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    assert "access-control-allow-origin" not in open_to.options(CHATS, headers={**asking, "origin": "x"}).headers
    refusal = open_to.post(CHATS, json=CHAT, headers={"origin": "https://page.example"})
    assert refusal.status_code == 401
    assert refusal.headers["access-control-allow-origin"] == "https://page.example"


# -- what is told about it --------------------------------------------------------------------------


def test_metrics_count_requests_jobs_and_tokens(client, engine):
    for _ in range(2):
        client.post(CHATS, json=CHAT)
    client.post(CHATS, json={**CHAT, "n": 0})
    client.get("/nowhere/else")
    told = client.get("/metrics")
    assert told.headers["content-type"].startswith("text/plain")
    lines = told.text.splitlines()
    for line in (
        'lazyllm_requests_total{route="/v1/chat/completions",status="200"} 2.0',
        'lazyllm_requests_total{route="/v1/chat/completions",status="400"} 1.0',
        'lazyllm_requests_total{route="none",status="404"} 1.0',
        'lazyllm_jobs_total{outcome="done"} 2.0',
        "lazyllm_waiting 2.0",
        "lazyllm_running 0.0",
        "lazyllm_prompt_tokens_total 11.0",
        "lazyllm_cached_tokens_total 5.0",
        "lazyllm_reply_tokens_total 9.0",
        "lazyllm_revived_tokens_total 7.0",
        "lazyllm_kv_bytes 300.0",
        "lazyllm_ttft_seconds_count 2.0",
        "lazyllm_token_seconds_count 2.0",
        f"lazyllm_computed_tokens_total {2 * 0.25 * len(engine.runs[0].job.prompt.token_ids)}",
        "lazyllm_slow_readers_total 0.0",
    ):
        assert line in lines, told.text
    (per_token,) = (line.split()[1] for line in lines if line.startswith("lazyllm_token_seconds_sum"))
    assert float(per_token) == pytest.approx(2 * (0.3 - 0.1) / 2)


def test_two_apps_count_apart(engine):
    one, other = client_of(engine), client_of(engine)
    one.post(CHATS, json=CHAT)
    assert 'lazyllm_requests_total{route="/v1/chat/completions"' in one.get("/metrics").text
    assert 'lazyllm_requests_total{route="/v1/chat/completions"' not in other.get("/metrics").text


def test_a_request_has_an_id_in_its_answer_and_in_the_log(engine, caplog):
    client = client_of(engine, keys=("secret-key",))
    secret = {"role": "user", "content": "w7 w8 w9"}
    with caplog.at_level(logging.INFO, "lazyllm.serving"):
        response = client.post(
            CHATS,
            json={**CHAT, "messages": [secret]},
            headers={"authorization": "Bearer secret-key", "x-request-id": "mine-1"},
        )
        client.get("/health", headers={"x-request-id": 'forged", "status": 200'})
    assert response.headers["x-request-id"] == "mine-1"
    lines = [JsonLines().format(record) for record in caplog.records if record.name == "lazyllm.serving"]
    chat, health = map(json.loads, lines)
    assert (chat["request_id"], chat["route"], chat["status"]) == ("mine-1", CHATS, 200)
    assert chat["usage"]["completion_tokens"] == 3
    assert chat["seconds"] >= 0
    assert len(health["request_id"]) == 32
    for word in ("w7", "one", "secret-key", "forged"):
        assert word not in "".join(lines)


def test_the_api_describes_itself(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert {CHATS, TEXTS, DOCUMENTS, "/v1/models", "/health", "/ready", "/metrics"} <= set(paths)
    assert "requestBody" in paths[CHATS]["post"]


def test_the_page_may_ask_nobody_else(monkeypatch, engine, tmp_path):
    (tmp_path / "index.html").write_text("<p>page</p>")
    (tmp_path / "page.js").write_text("1")
    monkeypatch.setattr("lazyllm.serving.http.page.FOLDER", tmp_path)
    client = client_of(engine, keys=("key",))
    for path, text, kind in (("/", "<p>page</p>", "text/html"), ("/page/page.js", "1", "text/javascript")):
        response = client.get(path)
        assert response.text == text
        assert response.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"
    for path in ("/page/nothing.js", "/page/..%2f__init__.py", "/page/../settings.py"):
        assert client.get(path).status_code in (401, 404)
