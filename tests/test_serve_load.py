"""The server's load test: its plans, what it takes for right, and one small run of it against a tiny model's server."""

import asyncio
import json
import os
import re
import sys
from collections import Counter
from dataclasses import replace
from random import Random

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.load import gaps, plan, rivals, servers, stress
from benchmarks.load.client import Outcome, connected, drive
from benchmarks.load.figures import percentiles, shown
from benchmarks.load.plan import FAULTS, KINDS, MAX_BODY_BYTES, PATTERN, Ask, Leave, Planner, Texts, streamed
from benchmarks.load.verdicts import Verdict, compare, difference, judge
from lazyllm.errors import EngineError
from lazyllm.serving.engine import Engine, EngineLimits
from lazyllm.serving.jobs import Delta
from tests.fake_engine import pipelines, scripted
from tests.jobs import soon
from tests.servers import serving
from tests.talks import WORDS, tokenizer

DEADLINE = 20.0
BODY = {"stream": False, "model": "tiny", "max_tokens": 4, "temperature": 0}


def planner(seed: int = 0, models: tuple[str, ...] = ("tiny", "tiny:dense", "tiny:drop")) -> Planner:
    words = tokenizer()
    return Planner(Texts(words, words(" ".join(WORDS * 3))["input_ids"]), models, (4, 24), seed=seed)


# -- plans ------------------------------------------------------------------------------------------


@given(st.integers(1, 90), st.integers(0, 5))
def test_a_plan_has_as_many_requests_as_asked_for_and_is_the_same_for_the_same_seed(requests, seed):
    talks = planner(seed).mixed(requests)
    assert sum(map(len, talks)) == requests
    assert talks == planner(seed).mixed(requests)
    assert requests < 20 or talks != planner(seed + 1).mixed(requests)
    assert all(len({ask.kind for ask in talk}) == 1 for talk in talks)


def test_a_plan_of_one_pattern_has_every_kind_and_more_have_every_fault():
    asks = [ask for talk in planner().mixed(len(PATTERN) + 2) for ask in talk]
    assert {ask.kind for ask in asks} == set(KINDS)
    assert Counter(ask.kind for ask in asks)["conversation"] == 3
    many = [ask for talk in planner().mixed(100) for ask in talk]
    assert {ask.fault.name for ask in many if ask.fault} == {fault.name for fault in FAULTS}
    assert {ask.kind for ask in many if ask.fault} == {"malformed"}
    assert {ask.options["model"] for ask in many} == {"tiny", "tiny:dense", "tiny:drop"}
    assert {bool(ask.options.get("stream")) for ask in many if ask.kind == "stop"} == {True, False}


def test_a_body_says_what_was_asked_unless_that_is_spoiled():
    ask = planner().stopped()[0]
    history = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    body = json.loads(ask.body(history))
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "user"]
    assert body["messages"][-1]["content"] == ask.question
    assert {name: body[name] for name in ask.options} == ask.options
    faults = {fault.name: replace(ask, fault=fault).body() for fault in FAULTS}
    with pytest.raises(json.JSONDecodeError):
        json.loads(faults.pop("bad JSON"))
    assert len(faults["oversized body"]) > MAX_BODY_BYTES
    assert all(len(data) < MAX_BODY_BYTES for name, data in faults.items() if name != "oversized body")
    assert json.loads(faults["unknown model"])["model"] == "nobody"


# -- figures ----------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=50), st.integers(0, 100))
def test_so_many_percent_of_the_values_are_at_most_a_percentile(values, percent):
    (value,) = percentiles(values, [percent])
    below = sum(one <= value * (1 + 1e-12) for one in values)
    assert below - 1 >= int(percent / 100 * (len(values) - 1))
    assert min(values) * (1 - 1e-12) <= value <= max(values) * (1 + 1e-12)


def test_percentiles_as_text():
    assert shown([0.25, 0.25]) == "0.25 / 0.25 / 0.25"
    assert shown([0.001 * value for value in range(101)], 0, factor=1000) == "50 / 90 / 99"
    assert shown([]) == ""


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=20), st.data())
def test_gaps_within_a_time_cover_it_and_nothing_far_from_it(steps, data):
    arrivals = [sum(steps[:count]) for count in range(len(steps) + 1)]
    began, ended = sorted(data.draw(st.lists(st.floats(0.001, arrivals[-1] - 0.001), min_size=2, max_size=2)))
    found = gaps.gaps_within(arrivals, began, ended)
    assert sum(found) >= ended - began - 1e-9
    assert sum(found) <= ended - began + 2 * max(steps) + 1e-9
    assert sum(gaps.gaps_within(arrivals, -1, arrivals[-1] + 1)) == pytest.approx(arrivals[-1])


# -- verdicts ---------------------------------------------------------------------------------------


def answered(**changes) -> Outcome:
    """A stream of two replies, complete."""
    options = {"model": "tiny", "max_tokens": 4, "n": 2, "stop": ["."], **streamed(True)}
    outcome = Outcome(Ask("stop", "w1 ?", options), b"{}", began=1.0)
    outcome.status, outcome.done, outcome.ended = 200, True, 3.0
    outcome.texts, outcome.reasons = {0: "one", 1: "two"}, {0: "stop", 1: "length"}
    outcome.usage = {"prompt_tokens": 7, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 3}}
    return replace(outcome, **changes)


def refused(code: str, status: int, **changes) -> Outcome:
    error = {"message": "no", "type": "invalid_request_error", "param": None, "code": code}
    return Outcome(Ask("malformed", "w1", {}, fault=FAULTS[0]), b"{", status=status, error=error, **changes)


def leaving(**changes) -> Outcome:
    ask = Ask("left midway", "w1", {"model": "tiny", "max_tokens": 4}, leave=Leave(1, 2))
    return Outcome(ask, b"{}", status=200, left=True, **changes)


def test_what_is_right():
    assert judge(answered()) == (Verdict.ANSWERED, "")
    assert judge(refused("invalid_json", 400)) == (Verdict.REFUSED, "")
    assert judge(leaving()) == (Verdict.LEFT, "")
    assert judge(replace(leaving(), status=None)) == (Verdict.LEFT, "")
    full = replace(refused("queue_full", 429), ask=answered().ask, retry_after="2")
    assert judge(full) == (Verdict.REFUSED, "")
    stayed = replace(answered(), ask=replace(answered().ask, leave=Leave(99)))
    assert judge(stayed) == (Verdict.ANSWERED, ""), "the answer came before its client wanted to go"


@pytest.mark.parametrize(
    ("outcome", "why"),
    [
        (answered(status=500), "status 500"),
        (answered(error={"message": "in the stream"}), "in the stream"),
        (answered(done=False), "no end"),
        (answered(reasons={0: "stop"}), r"\[0\] came to their end, of 2"),
        (answered(reasons={0: "stop", 1: "tool_calls"}), "tool_calls"),
        (answered(texts={0: "one.", 1: "two"}), "the stop string"),
        (answered(usage={"completion_tokens": 9}), "9 tokens of 2 replies"),
        (answered(usage={}), "0 tokens"),
        (answered(trouble="no end within 5 s"), "no end within 5 s"),
        (refused("invalid_json", 500), "500"),
        (refused("invalid_value", 400), "invalid_value"),
        (refused("invalid_json", 400, trouble="ReadError: "), "ReadError"),
        (replace(refused("invalid_json", 400), error={"code": "invalid_json"}), "the error has"),
        (replace(answered(), ask=refused("", 0).ask), "answered with"),
        (replace(refused("queue_full", 429), ask=answered().ask), "not when"),
        (replace(leaving(), status=500), "status 500"),
        (replace(leaving(), error={"message": "no"}), "left"),
        (leaving(trouble="RemoteProtocolError: "), "RemoteProtocolError"),
    ],
)
def test_what_is_wrong_is_seen(outcome, why):
    verdict, told = judge(outcome)
    assert verdict is Verdict.WRONG
    assert re.search(why, told), told


def test_replies_are_compared_and_differences_shown():
    one, other = answered(), answered(texts={0: "one", 1: "twelve"})
    assert compare("stop", [one, one], [one, other]).equal == 1
    assert compare("stop", [one, one], [one, other]).total == 2
    assert compare("whole", [one], [other]).total == 0
    assert difference(one, other) == "stop, tiny, 3 of 7 tokens kept: after 2 characters 'o' under load, 'elve' alone"
    assert "'' alone (ReadError)" in difference(one, answered(texts={}, trouble="ReadError"))


# -- clients ----------------------------------------------------------------------------------------


def asked(port: int, *talks, deadline: float = DEADLINE) -> list[Outcome]:
    """What comes of talks, by one client."""

    async def run() -> list[Outcome]:
        async with connected(f"http://127.0.0.1:{port}") as http:
            return await drive(http, talks, 1, deadline_seconds=deadline)

    return asyncio.run(run())


@pytest.mark.parametrize("form", [{}, streamed(True)], ids=["whole", "stream"])
def test_a_request_that_has_no_end_is_wrong_when_its_time_is_over(form):
    pipelines()  # made on first use, which takes a while
    with scripted(lambda run: run.wait()) as engine, serving(engine) as port:
        (outcome,) = asked(port, (Ask("whole", "w1", {**BODY, **form}),), deadline=1.0)
        assert engine.run().given_up.wait(DEADLINE), "the deadline closes the connection"
    assert judge(outcome) == (Verdict.WRONG, "no end within 1 s")


def test_a_client_leaves_after_as_many_pieces_as_planned():
    def endless(run):
        for _ in range(3):
            run.tell(Delta(0, "w1 ", (11,)))
        run.wait()

    with scripted(endless) as engine, serving(engine) as port:
        options = {**BODY, **streamed(True)}
        outcomes = asked(
            port,
            (Ask("left midway", "w1", options, leave=Leave(float("inf"), 2)),),
            (Ask("left waiting", "w1", options, leave=Leave(float("inf"), 0)),),
            (Ask("left whole", "w1", BODY, leave=Leave(0.1)),),
        )
        assert all(engine.run(number).given_up.wait(DEADLINE) for number in range(3))
    assert [judge(outcome)[0] for outcome in outcomes] == [Verdict.LEFT] * 3
    assert [len(outcome.arrivals) for outcome in outcomes] == [2, 0, 0]
    assert [outcome.status for outcome in outcomes] == [200, 200, None]


def test_a_server_that_is_not_there_is_trouble():
    (outcome,) = asked(servers.free_port(), (Ask("whole", "w1", BODY),))
    assert outcome.trouble is not None
    assert "ConnectError" in outcome.trouble


def test_a_turn_has_the_ones_before_it_and_is_not_asked_after_a_failure():
    with scripted(lambda run: (run.say(), run.end())) as engine, serving(engine) as port:
        talk = (Ask("conversation", "w1", BODY), Ask("conversation", "w2", BODY))
        first, second = asked(port, talk)
        said = [message["content"] for message in json.loads(second.body)["messages"]]
        assert said[1:] == ["w1", "one two three", "w2"]
        assert first.texts == {0: "one two three"}
        assert len(asked(port, (replace(talk[0], fault=FAULTS[2]), talk[1]))) == 1


# -- runs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def port():
    engine = Engine(pipelines(), EngineLimits(running=6, piece=8, prefix_bytes=0))
    with serving(engine, max_body_bytes=MAX_BODY_BYTES) as number:
        yield number


def test_everything_at_once_leaves_nothing_behind_and_says_what_is_said_alone(port, monkeypatch):
    monkeypatch.setattr(stress, "SETTLING_SECONDS", 0)
    monkeypatch.setattr(plan, "REPLY_TOKENS", (2, 8))
    url = f"http://127.0.0.1:{port}"
    talks = planner(models=tuple(servers.models_of(url))).mixed(24)
    result = asyncio.run(
        stress.put_under_load(url, os.getpid(), planner(1).greedy(4), talks, 4, deadline_seconds=DEADLINE)
    )
    assert [fault for fault in result.faults() if "memory" not in fault] == []
    assert Counter(verdict for _, verdict, _ in result.judged)[Verdict.REFUSED] == 2
    comparisons = asyncio.run(stress.one_at_a_time(url, result, deadline_seconds=DEADLINE))
    assert [one.differences for one in comparisons] == [()] * len(KINDS)
    assert sum(one.total for one in comparisons) == len(result.comparable) == 19
    by_kind, memory = stress.tables(result, comparisons, "conditions")
    assert [row[0] for row in by_kind.rows] == list(KINDS)
    assert sum(int(row[1]) for row in by_kind.rows) == 24
    assert all(len(row) == len(by_kind.columns) for row in by_kind.rows)
    assert all(len(row) == len(memory.columns) for row in memory.rows)


def test_faults_of_a_load_are_told():
    good = stress.Memory(1000, 100)
    fine = stress.Stress(2, [answered(), answered()], 1.0, good, stress.Memory(1250, 300), 2000, True, 0)
    assert list(fine.faults()) == []
    bad = replace(fine, planned=4, outcomes=[answered(done=False), answered()], idle=False, failed_jobs=2)
    bad = replace(bad, after=stress.Memory(1250, 200))
    assert [fault.partition(" ")[0] for fault in bad.faults()] == ["stop:", "2", "something", "2", "0"]
    text = stress.tables(bad, [compare("stop", [answered()], [answered(texts={0: "", 1: ""})])], "")[0].markdown()
    assert "Wrong: stop: the stream has no end; 2 requests" in text
    assert "Different alone: stop, tiny, 3 of 7 tokens kept: after 0 characters" in text


def test_gaps_beside_a_long_prompt(port, monkeypatch):
    for name, value in {"CALM_TOKENS": 3, "ENDLESS_TOKENS": 200, "SHORT_PROMPT": 4}.items():
        monkeypatch.setattr(gaps, name, value)
    found, words = gaps.Gaps(), tokenizer()
    texts = Texts(words, words(" ".join(WORDS * 3))["input_ids"])
    scene = gaps.Scene(prompt_tokens=150, replies=2, bias={"2": -100}, deadline_seconds=DEADLINE)
    asyncio.run(gaps.measure(f"http://127.0.0.1:{port}", "tiny", texts, scene, Random(0), found))
    assert len(found.prefills) == 1
    assert sum(found.during) >= 2 * found.prefills[0], "all of the time lies in gaps of each reply"
    assert len(found.calm) >= 4
    assert servers.idle(f"http://127.0.0.1:{port}"), "the replies are given up"
    assert len(gaps.table({("tiny", 8): found}, 150, "").rows[0]) == len(gaps.table({}, 150, "").columns)
    with pytest.raises(EngineError, match="a reply of nobody ended too early"):
        asyncio.run(gaps.measure(f"http://127.0.0.1:{port}", "nobody", texts, scene, Random(0), found))


def test_servers_side_by_side(port):
    url, talks = f"http://127.0.0.1:{port}", planner().greedy(6)
    records = {"transformers one": rivals.Record(), "lazyllm dense": rivals.Record()}
    for record, model in zip(records.values(), ("tiny:dense", "tiny:dense"), strict=True):
        asyncio.run(rivals.run_round(url, model, talks, 3, record, deadline_seconds=DEADLINE))
    field = [rivals.Rival(*name.split(" "), server=None, model="") for name in records]
    table = rivals.table(field, records, "transformers one", "conditions")
    assert [row[-2:] for row in table.rows] == [["**0**", "**6 of 6**"], ["0", "6 of 6"]]
    assert table.rows[0][3] == "**1.00x**"
    assert all(len(row) == len(table.columns) for row in table.rows)
    low, high = rivals.prompt_lengths(records)
    assert 4 < low <= high < 60
    for record in records.values():
        assert [outcome.ask.question for outcome in record.outcomes[0]] == [talk[0].question for talk in talks]
    asyncio.run(rivals.run_round(url, "nobody", talks, 3, records["lazyllm dense"], deadline_seconds=DEADLINE))
    assert len(records["lazyllm dense"].failed) == 6


# -- processes --------------------------------------------------------------------------------------

SERVER = """
import sys
from http.server import SimpleHTTPRequestHandler, test
test(SimpleHTTPRequestHandler, port=int(sys.argv[1]), bind="127.0.0.1")
"""


def test_a_server_process_is_paused_and_ends(tmp_path):
    port = servers.free_port()
    command = [sys.executable, "-c", SERVER, str(port)]
    with servers.ServerProcess("files", command, port, log=tmp_path / "log", threads=1, ready="/") as server:
        process = psutil.Process(server.pid)
        other = type("Other", (), {"pause": lambda self: None, "go_on": lambda self: None})()
        with servers.alone(other, [server, other]):
            soon(lambda: process.status() == psutil.STATUS_STOPPED)  # a signal takes its time on a busy machine
        with servers.caller(server.url) as http:
            assert servers.answers(http, "/")
        assert servers.resident_bytes(server.pid) > 2**20
        server.pause()
    assert not process.is_running()


def test_a_server_that_does_not_start_leaves_its_last_words(tmp_path):
    options = {"log": tmp_path / "logs" / "log", "threads": 1}
    command = [sys.executable, "-c", "print('no such model', flush=True); raise SystemExit(3)"]
    with pytest.raises(EngineError, match="nothing ended with exit code 3; it last said: no such model"):
        servers.ServerProcess("nothing", command, servers.free_port(), **options)
    with pytest.raises(EngineError, match="nowhere did not start"):
        servers.ServerProcess("nowhere", [str(tmp_path / "no program")], servers.free_port(), **options)
