"""Replicas on a real Ray cluster of two nodes, behind one server."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from urllib.request import Request, urlopen

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster as RayCluster

from lazyllm.errors import Cancelled, InputError, QueueFull, ReplicaLost, TooLong
from lazyllm.serving.engine import EngineStats
from lazyllm.serving.jobs import Delta, JobEnd, JobFailed
from lazyllm.serving.replicas import Cluster, ModelSource, replicated
from lazyllm.serving.replicas.remote import total
from lazyllm.serving.replicas.replica import Order, Replica
from tests.jobs import PATIENCE, Listener, job, run, soon
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
from tests.servers import CHATS, DOCUMENTS, client_of

RECOVERY = 240
"""Seconds that Ray may take to see a loss and start a replica anew."""
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
    idle = [(0, 0)] * 2
    soon(lambda: not engine._open and [(one.running, one.waiting) for one in counts(engine)] == idle, seconds=RECOVERY)
    yield engine
    for following in set(engine._open):
        following.cancel()


def counts(engine):
    """What each replica says of itself."""
    try:
        told = engine._handle.broadcast("hear", ()).results(timeout_s=10, return_exceptions=True)
    except Exception:  # one of them is just being lost
        return []
    return [one for one in told if isinstance(one, EngineStats)]


def doing(engine):
    """How many replies they make all together, and how many jobs wait."""
    now = total(counts(engine))
    return now.running, now.waiting


def started(engine, count, most=LONG, first=0):
    """Jobs that say something already."""
    listeners = [Listener() for _ in range(count)]
    tickets = [
        engine.submit(job(engine.encode(ids(40, seed)), most), listener)
        for seed, listener in enumerate(listeners, first)
    ]
    for listener in listeners:
        listener.wait((Delta, JobFailed))
    return listeners, tickets


@pytest.mark.parametrize("early", [True, False])
def test_a_replica_gives_up_what_it_hears_of_before_and_after_it_came(folder, early):
    async def told():
        replica = Replica(ModelSource(str(folder)), CONFIGS, LIMITS)
        order = Order(job(replica._engine.encode(ids(40)), LONG))
        events = []
        if early:
            await replica.hear([order.id])
        async for event in replica.run(order):
            events.append(event)
            await replica.hear([order.id])
        return events, await replica.hear([])

    events, stats = asyncio.run(told())
    assert isinstance(events[-1].error, Cancelled)
    assert bool(events[:-1]) != early
    assert (stats.running, stats.waiting) == (0, 0)


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


def test_a_beginning_that_all_share_does_not_bring_all_to_one_replica(settled):
    shared = ids(64, 200)
    run(settled, job(settled.encode([*shared, *ids(64, 201)]), 1))
    for seed in range(202, 207):
        settled.submit(job(settled.encode([*shared, *ids(64, seed)]), LONG), Listener())
    soon(lambda: sum(doing(settled)) == 5 and all(one.running for one in counts(settled)))


def test_a_job_that_is_given_up_leaves_its_replica(settled):
    gone = settled.stats.jobs.get("cancelled", 0)
    (listener,), (ticket,) = started(settled, 1)
    soon(lambda: settled.stats.running == 1)
    ticket.cancel()
    assert isinstance(listener.wait().error, Cancelled)
    soon(lambda: settled.stats.running == 0)
    soon(lambda: settled.stats.jobs["cancelled"] > gone)


def test_what_a_replica_refuses_is_told_as_it_is(settled):
    encoded = settled.encode(ids(10))
    assert isinstance(run(settled, job(encoded, POSITIONS)).wait().error, TooLong)
    refused = run(settled, job(encoded, replies=LIMITS.running + 1)).wait().error
    assert isinstance(refused, InputError)
    assert "a job has 1 to 4 replies here, not 5" in str(refused)


def test_replicas_that_have_as_many_jobs_as_they_may_refuse_more(settled):
    encoded, room = settled.encode(ids(20, 1)), 2 * (LIMITS.running + LIMITS.waiting)
    for _ in range(room):
        settled.submit(job(encoded, LONG, replies=4), Listener())
    with pytest.raises(QueueFull, match=f"the replicas have {room} jobs"):
        settled.submit(job(encoded), Listener())
    soon(lambda: doing(settled) == (2 * LIMITS.running, room - 2))  # how many wait at each is the router's matter
    refused = client_of(settled).post(CHATS, json=CHAT)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")


def test_the_server_answers_as_with_one_engine(settled, folder):
    one = engine_here(folder)
    try:
        expected = client_of(one).post(CHATS, json=CHAT).json()
        client = client_of(settled)
        told = client.post(CHATS, json=CHAT).json()
        assert told["choices"] == expected["choices"]
        assert told["usage"]["total_tokens"] == expected["usage"]["total_tokens"]
        assert client.get("/ready").status_code == 200
        too_long = client.post(CHATS, json=CHAT | {"max_tokens": POSITIONS})
        assert (too_long.status_code, too_long.json()["error"]["code"]) == (400, "context_length_exceeded")
        document = client.post(DOCUMENTS, json={"texts": ["w1 w2"]})
        assert document.status_code == 400
        assert "replicas keep no documents" in document.json()["error"]["message"]
    finally:
        one.close(timeout=0)


def test_a_replica_may_be_killed_under_load(settled):
    before = replica_pids()
    assert len(before) == 2
    prompts = [settled.encode(ids(40, seed), policy="dense") for seed in range(300, 306)]
    asked = [job(prompt, 6, policy="dense") for prompt in prompts]
    expected = [run(settled, one).tokens() for one in asked]
    running = []
    while sum(one.running > 0 for one in counts(settled)) < 2:  # the router may hear late of what has ended
        assert len(running) < LIMITS.running
        running += started(settled, 1, first=400 + len(running))[0]  # which no replica has seen
    waiting = [Listener() for _ in asked]
    for one, listener in zip(asked, waiting, strict=True):
        settled.submit(one, listener)
    os.kill(min(before), signal.SIGKILL)
    soon(lambda: any(listener.done for listener in running))
    for listener, tokens in zip(waiting, expected, strict=True):
        end = listener.wait()
        if isinstance(end, JobEnd):
            assert listener.tokens() == tokens
        else:
            assert isinstance(end.error, ReplicaLost), repr(end.error)
    assert {type(failed.error) for one in running for failed in one.of(JobFailed)} == {ReplicaLost}
    assert run(settled, asked[0]).tokens() == expected[0]
    soon(lambda: len(replica_pids() - {min(before)}) == 2, seconds=RECOVERY)


def test_more_replicas_than_the_cluster_has_room_for_are_refused(folder, nodes):
    with (
        pytest.raises(InputError, match="3 replicas need 6 CPUs, the cluster has 2"),
        replicated(ModelSource(str(folder)), CONFIGS, LIMITS, Cluster(3, nodes.address, cpus=2)),
    ):
        pass


def test_a_node_may_be_lost(settled, nodes):
    running, _ = started(settled, 3, most=400)
    nodes.remove_node(nodes.worker_nodes.copy().pop(), allow_graceful=False)
    for listener in running:
        end = listener.wait()
        assert isinstance(end, JobEnd) or isinstance(end.error, ReplicaLost)
    for seed in range(4):
        assert isinstance(run(settled, job(settled.encode(ids(30, seed)), 3)).wait(), JobEnd)


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
