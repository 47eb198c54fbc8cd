"""Replicas on a real Ray cluster of two nodes, behind one server."""

import json
import signal
import subprocess
import sys
from urllib.request import Request, urlopen

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster as RayCluster

from lazyllm.errors import InputError, TooLong
from lazyllm.serving.jobs import Delta, JobEnd, JobFailed
from lazyllm.serving.replicas import Cluster, ModelSource, replicated
from tests.jobs import Listener, job, run, soon
from tests.replicas import (
    CONFIGS,
    LIMITS,
    POSITIONS,
    alive,
    descendants,
    engine_here,
    ids,
    replica_pids,
    save_tiny_model,
)
from tests.servers import CHATS

PATIENCE = 60
LONG = 20_000
"""Tokens of a reply that would take minutes."""
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "w1 w2 ?"}], "temperature": 0, "max_tokens": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def nodes():
    made = RayCluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
def engine(folder, nodes):
    with replicated(ModelSource(str(folder)), CONFIGS, LIMITS, Cluster(2, nodes.address)) as made:
        yield made


@pytest.fixture
def settled(engine):
    """The engine, with two replicas that have nothing to do; what a test leaves is given up."""
    soon(lambda: len(counts(engine)) == 2 and not any(one.running or one.waiting for one in counts(engine)))
    return engine


def counts(engine):
    """What each replica says of itself."""
    try:
        return [
            one for one in engine._handle.broadcast("stats").results(timeout_s=10) if not isinstance(one, Exception)
        ]
    except Exception:  # one of them is just being lost
        return []


def started(engine, count, most=LONG):
    """Jobs that say something already."""
    listeners = [Listener() for _ in range(count)]
    tickets = [
        engine.submit(job(engine.encode(ids(40, seed)), most), listener) for seed, listener in enumerate(listeners)
    ]
    for listener in listeners:
        listener.wait((Delta, JobFailed))
    return listeners, tickets


def test_greedy_replies_are_those_of_one_engine(settled, folder):
    asked = [(policy, ids(length, length)) for policy in CONFIGS for length in (3, 40, 75)]
    one = engine_here(folder)
    try:
        assert one.words == settled.words
        for policy, prompt in asked:
            here, there = (
                run(engine, job(engine.encode(prompt, policy=policy), 8, policy=policy)) for engine in (one, settled)
            )
            assert isinstance(there.wait(), JobEnd)
            assert there.tokens() == here.tokens()
            assert there.text() == here.text()
    finally:
        one.close(timeout=0)


def test_the_next_turn_goes_where_the_first_was(settled):
    for seed in range(100, 106):
        prompt = ids(64, seed)
        first = run(settled, job(settled.encode(prompt), 8))
        second = run(settled, job(settled.encode([*prompt, *first.tokens(), *ids(16, seed + 50)]), 2))
        assert first.wait().usage.cached_tokens == 0
        assert second.wait().usage.cached_tokens >= 64


def test_what_a_replica_refuses_is_told_as_it_is(settled):
    encoded = settled.encode(ids(10))
    assert isinstance(run(settled, job(encoded, POSITIONS)).wait().error, TooLong)
    refused = run(settled, job(encoded, replies=LIMITS.running + 1)).wait().error
    assert isinstance(refused, InputError)
    assert "a job has 1 to 4 replies here, not 5" in str(refused)


def test_more_replicas_than_the_cluster_has_room_for_are_refused(folder, nodes):
    with (
        pytest.raises(InputError, match="3 replicas need 6 CPUs, the cluster has 2"),
        replicated(ModelSource(str(folder)), CONFIGS, LIMITS, Cluster(3, nodes.address, cpus=2)),
    ):
        pass


@pytest.fixture
def server(folder):
    """The command, from its first line on."""
    command = [sys.executable, "-m", "lazyllm", "serve", "--model", str(folder), "--port", "0", "--preset", "dense"]
    with subprocess.Popen(
        [*command, "--replicas", "2", "--replica-cpus", "0.5"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.kill()


def test_the_command_ends_all_it_began(server):
    line = server.stdout.readline()
    began = descendants(server.pid)
    assert len(replica_pids(server.pid)) == 2
    name, address = line.split()[0], line.split(" at ")[1].split()[0]
    asked = Request(f"{address}{CHATS}", json.dumps(CHAT | {"model": name}).encode())
    asked.add_header("Content-Type", "application/json")
    with urlopen(asked, timeout=PATIENCE) as told:
        assert json.load(told)["usage"]["completion_tokens"] == 5
    server.send_signal(signal.SIGTERM)
    assert server.wait(PATIENCE) == 0
    psutil.wait_procs(began, timeout=PATIENCE)
    assert list(alive(began)) == []
    assert all(line.startswith("{") for line in server.stderr.read().splitlines())
