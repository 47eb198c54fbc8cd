"""The server in front of the engine itself, and the command that starts both."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lazyllm import LazyPipeline
from lazyllm.cli.main import app
from lazyllm.cli.serve import KEY_VARIABLE, is_loopback, named_configs
from lazyllm.serving.engine import Engine, EngineLimits
from tests.fake_engine import PATIENCE, pipelines
from tests.servers import CHAT, CHATS, DOCUMENTS, TEXT, TEXTS, client_of, events, soon
from tests.talks import DOCUMENT, tokenizer
from tests.tiny import tiny_model

GREEDY = {"temperature": 0, "max_tokens": 5}


@pytest.fixture(scope="module")
def engine():
    engine = Engine(pipelines(), EngineLimits(running=4, piece=8))
    yield engine
    engine.close(timeout=0)


@pytest.fixture
def client(engine):
    return client_of(engine)


def text_of(policy: str, prompt: object) -> str:
    """What a pipeline of its own says."""
    return pipelines()[policy].generate(prompt, max_new_tokens=5, do_sample=False).text


@pytest.mark.parametrize("policy", ["aux", "dense", "drop"])
def test_greedy_replies_are_the_pipelines_own_whole_and_in_a_stream(client, policy):
    messages = [{"role": "user", "content": f"{DOCUMENT} ?"}]
    body = {**CHAT, **GREEDY, "model": f"tiny:{policy}", "messages": messages}
    answer = client.post(CHATS, json=body).json()
    expected = text_of(policy, messages)
    assert answer["choices"][0]["message"]["content"] == expected
    chunks = events(client.post(CHATS, json={**body, "stream": True}).text)[:-1]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected
    text = client.post(TEXTS, json={**TEXT, **GREEDY, "model": f"tiny:{policy}", "prompt": DOCUMENT}).json()
    assert text["choices"][0]["text"] == text_of(policy, DOCUMENT)


def test_a_second_question_finds_the_beginning_in_the_cache(client):
    body = {**TEXT, **GREEDY, "prompt": " ".join(reversed(DOCUMENT.split()))}
    first, second = (client.post(TEXTS, json=body).json()["usage"] for _ in range(2))
    assert first["prompt_tokens_details"]["cached_tokens"] == 0
    assert second["prompt_tokens_details"]["cached_tokens"] > 0
    assert second["lazyllm"]["computed_fraction"] < first["lazyllm"]["computed_fraction"]


def test_a_trace_tells_how_deep_the_prompt_is_and_what_is_revived(client):
    body = {**CHAT, **GREEDY, "messages": [{"role": "user", "content": f"{DOCUMENT} ?"}]}
    body |= {"stream": True, "stream_options": {"include_usage": True}, "lazyllm": {"trace": True}}
    chunks = events(client.post(CHATS, json=body).text)[:-1]
    prompt, first, *later = (chunk["lazyllm"] for chunk in chunks if "lazyllm" in chunk)
    assert "".join(prompt["prompt"]).startswith("user : ")
    assert first["depths"]["tokens"] == list(range(len(prompt["prompt"])))
    assert {*first["depths"]["depths"]} > {4}, "some were left out"
    assert sum(len(one["depths"]["tokens"]) for one in later) == chunks[-1]["usage"]["lazyllm"]["revived_tokens"]


def test_a_document_is_asked_twice(client):
    name = client.post(DOCUMENTS, json={"texts": [DOCUMENT]}).json()["id"]
    body = {**CHAT, **GREEDY, "lazyllm": {"document": name}}
    for _ in range(2):
        answer = client.post(CHATS, json=body).json()
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 40
    against = {**body, "lazyllm": {"document": name, "policy": "dense"}}
    assert client.post(CHATS, json=against).status_code == 400
    assert client.post(DOCUMENTS, json={"texts": [DOCUMENT], "policy": "drop"}).status_code == 400


def test_logprobs_and_seeds(client):
    body = {**TEXT, "max_tokens": 4, "seed": 3, "logprobs": 2, "n": 2}
    first, second = (client.post(TEXTS, json=body).json()["choices"] for _ in range(2))
    assert first == second
    assert first[0]["text"] != first[1]["text"]
    assert len(first[0]["logprobs"]["tokens"]) == 4


def test_what_is_too_long_for_the_engine_is_400_with_the_numbers(client):
    for path, body in (
        (CHATS, {**CHAT, "messages": [{"role": "user", "content": "w1 " * 300}]}),
        (TEXTS, {**TEXT, "max_tokens": 256}),
        (DOCUMENTS, {"texts": ["w1 " * 300]}),
    ):
        error = client.post(path, json=body).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "256" in error["message"]


def test_metrics_are_the_engines(client):
    client.post(TEXTS, json={**TEXT, **GREEDY})
    assert soon(lambda: "lazyllm_jobs_total{" in client.get("/metrics").text)
    assert "lazyllm_running 0.0" in client.get("/metrics").text


# -- the command ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def refused(monkeypatch):
    """Runs `lazyllm serve ...`, which has to refuse, and gives the line it does so with."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, ["serve", *map(str, arguments)])
        assert result.exit_code == 2, result.output
        lines = [line for line in result.stderr.splitlines() if line]
        assert lines[-1].startswith("lazyllm: "), result.output
        assert not any("Traceback" in line for line in lines)
        return lines[-1]

    return run


def test_a_taken_port_is_one_line(refused, folder):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"cannot listen on port {port}" in refused("--model", folder, "--port", port)


def test_a_model_that_is_missing_or_half_there_is_one_line(refused, folder, tmp_path):
    assert "nowhere" in refused("--model", tmp_path / "nowhere", "--port", 0)
    for name, size in (("model.safetensors", 1000), ("tokenizer.json", 40), ("config.json", 40)):
        half = tmp_path / f"half-{name}"
        shutil.copytree(folder, half)
        (half / name).write_bytes((half / name).read_bytes()[:size])
        assert "cannot load the model" in refused("--model", half, "--port", 0)
    (half / "model.safetensors").unlink()
    assert "cannot load the model" in refused("--model", half, "--port", 0)


def test_other_machines_need_a_key(refused, folder):
    for host in ("0.0.0.0", "::", "192.0.2.7", "example.com"):
        line = refused("--model", folder, "--host", host)
        assert host in line
        assert "--api-key" in line


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--preset", "recomended"], "Did you mean 'recommended'?"),
        (["--preset", "paper", "--preset", "paper"], "paper"),
        (["--preset", "nowhere.yaml"], "nowhere.yaml"),
        (["--device", "abacus"], "abacus"),
        (["--dtype", "float17"], "float17"),
        (["--api-key", ""], "empty"),
    ],
)
def test_what_cannot_be_is_one_line(refused, folder, arguments, part):
    assert part in refused("--model", folder, "--port", 0, *arguments)


def test_which_hosts_are_this_machine():
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost", "LOCALHOST")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "localhost.example", "")))


def test_files_are_policies_by_name(tmp_path):
    (tmp_path / "mine.yaml").write_text("schedule: Constant(0.5)\n")
    assert list(named_configs([str(tmp_path / "mine.yaml"), "dense"])) == ["mine", "dense"]


def test_the_command_serves_until_it_is_told_to_end(folder):
    command = [sys.executable, "-m", "lazyllm", "serve", "--model", str(folder), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--preset", "dense", "--preset", "recommended"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, KEY_VARIABLE: "first second", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = process.stdout.readline()
        assert said.startswith("tiny answers at http://127.0.0.1:"), said + process.stderr.read()
        address = said.split()[3]
        asked = urllib.request.Request(
            address + TEXTS,
            json.dumps({**TEXT, "model": "tiny:recommended", "max_tokens": 200, "stream": True}).encode(),
            {"Authorization": "Bearer second", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked, timeout=PATIENCE) as reply:
            first = reply.readline()
            process.send_signal(signal.SIGTERM)
            assert events((first + reply.read()).decode())[-1] == "[DONE]"
        _, log = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0
    lines = [json.loads(line) for line in log.splitlines() if line]
    assert [line["status"] for line in lines if line["message"] == "request"] == [200]


def test_a_pipeline_alone_is_a_server_too():
    """What the guide does: an engine, settings, an app."""
    engine = Engine({"only": LazyPipeline(tiny_model(), tokenizer())})
    try:
        assert client_of(engine).get("/v1/models").json()["data"][0]["lazyllm"] == {"policy": "only"}
    finally:
        engine.close(timeout=0)
