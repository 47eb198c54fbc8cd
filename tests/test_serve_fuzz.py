"""Whatever a client sends, the server answers, in the shape its API has, and never with a fault of its own."""

import json
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fake_engine import FakeEngine
from tests.servers import CHAT, CHATS, DOCUMENTS, TEXT, TEXTS, client_of, events

BASES = {CHATS: CHAT, TEXTS: TEXT, DOCUMENTS: {"texts": ["w1 w2"]}}
FIELDS = (
    "model", "messages", "prompt", "texts", "system", "policy", "lazyllm", "stream", "stream_options", "n", "stop",
    "seed", "max_tokens", "max_completion_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty",
    "logit_bias", "logprobs", "top_logprobs", "echo", "best_of", "suffix", "tools", "response_format", "user",
    "role", "content", "type", "text", "name", "document", "query", "trace", "include_usage",
)  # fmt: skip
LIKELY = st.sampled_from(
    [
        True, False, 0, 1, 2, 16, -1, 0.5, 1e308, 2**31, 2**63, 10**400, "", "tiny", "tiny:dense", "dense", "drop",
        "w1", "w1 w2 ?", "user", "system", "text", "auto", "doc-0", "\0", "\ue000", "é" * 50, "{{ 1 }}", [], {},
        [12, 13], ["w1", "w2"], {"trace": True}, {"include_usage": True}, {"7": 1},
    ]
)  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | LIKELY
KEYS = st.sampled_from(FIELDS) | st.text(max_size=5)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
CONTENTS = st.text(max_size=30) | st.sampled_from(["w1 w2 ?", "w1\n\nw2 ?"]) | st.none() | VALUES
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant", "tool"]), "content": CONTENTS}),
    max_size=3,
)
CHANGES = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4) | st.fixed_dictionaries({"messages": MESSAGES})
PATHS = st.sampled_from(list(BASES))


@pytest.fixture(scope="module")
def client():
    with client_of(FakeEngine()) as client:
        yield client


def check(response) -> None:
    """An answer, or a refusal that is the client's own fault, in OpenAI's shape."""
    assert response.status_code in (200, 400, 404, 405, 413, 415), response.text
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    elif response.headers["content-type"].startswith("text/event-stream"):
        assert events(response.text)[-1] == "[DONE]"
    else:
        assert response.json()["object"] in ("chat.completion", "text_completion", "document", "list")


def post(client, path: str, body: bytes):
    return client.post(path, content=body, headers={"content-type": "application/json"})


@settings(max_examples=700)
@given(path=PATHS, changes=CHANGES)
def test_a_request_with_anything_in_some_of_its_fields(client, path, changes):
    check(post(client, path, json.dumps({**BASES[path], **changes}).encode()))


@settings(max_examples=200)
@given(path=PATHS, value=VALUES)
def test_any_json_at_all(client, path, value):
    check(post(client, path, json.dumps(value).encode()))


@settings(max_examples=300)
@given(path=PATHS, place=st.floats(0, 1), bytes_=st.binary(max_size=6), cut=st.integers(0, 6))
def test_a_request_with_some_of_its_bytes_changed(client, path, place, bytes_, cut):
    data = json.dumps(BASES[path]).encode()
    at = int(place * len(data))
    check(post(client, path, data[:at] + bytes_ + data[at + cut :]))


@settings(max_examples=100)
@given(
    path=st.sampled_from([*BASES, "/v1/models", "/v1/models/", "/page/", "/"]),
    more=st.text(max_size=10),
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "PATCH"]),
    key=st.text(max_size=10),
)
def test_any_path_and_header(client, path, more, method, key):
    response = client.request(method, path + quote(more, safe=""), headers={"x-request-id": key.encode()})
    if response.headers.get("content-type") == "application/json":
        check(response)
    assert response.status_code < 500
