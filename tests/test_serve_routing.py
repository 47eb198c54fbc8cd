"""Jobs that are sent to replicas: who gets them, and what becomes of them when a replica is lost."""

import asyncio
import threading
from concurrent.futures import Future
from functools import partial
from itertools import count
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError, RayTaskError

from lazyllm.errors import Cancelled, Closed, InputError, QueueFull, ReplicaLost
from lazyllm.prompts import EncodedPrompt, PromptMarks
from lazyllm.serving.engine import EngineLimits, EngineStats
from lazyllm.serving.jobs import Delta, Job, JobEnd, Usage
from lazyllm.serving.replicas import remote
from lazyllm.serving.replicas.remote import RemoteEngine, total
from lazyllm.serving.replicas.routing import BLOCK_TOKENS, MOST_ENDED, Memory, PrefixRouter, beginnings
from tests.jobs import PATIENCE, Listener, soon

IDS = st.lists(st.integers(0, 3), max_size=5 * BLOCK_TOKENS)
ASKED = Job(EncodedPrompt([1, 2, 3], PromptMarks()))
NUMBERS = map(str, count())
END = JobEnd(Usage(1, 0, 1, 1.0, 0, 0.0, 0.0, 0.0))


# -- who gets a job ---------------------------------------------------------------------------------


@given(shared=IDS, left=IDS, right=IDS)
def test_prompts_have_as_many_beginnings_in_common_as_whole_blocks(shared, left, right):
    one, other = beginnings(shared + left), beginnings(shared + right)
    common = next((at for at, (a, b) in enumerate(zip(shared + left, shared + right, strict=False)) if a != b), None)
    whole = min(len(shared + left), len(shared + right)) if common is None else common
    same = sum(a == b for a, b in zip(one, other, strict=False))
    assert same == whole // BLOCK_TOKENS
    assert one[:same] == other[:same]


def test_policies_do_not_share_beginnings():
    ids = [1] * BLOCK_TOKENS
    assert beginnings(ids, "one") != beginnings(ids, "other")


@given(st.lists(st.lists(st.integers(0, 9), unique=True, max_size=6), max_size=8), st.integers(1, 9))
def test_a_memory_holds_the_latest_prompts_and_their_starts_for_longest(prompts, most):
    memory, expected = Memory(most), []
    for blocks in prompts:
        memory.note(blocks)
        expected = [*(one for one in expected if one not in blocks), *reversed(blocks)][-most:]
    for blocks in prompts:
        known = 0
        while known < len(blocks) and blocks[known] in expected:
            known += 1
        assert memory.share(blocks) == (known / len(blocks) if blocks else 0)


class Router(PrefixRouter):
    """Knows how many jobs each replica has, without a cluster."""

    def __init__(self, jobs, running=8):
        self.jobs = jobs
        self.initialize_state(running=running)
        for replica, number in jobs.items():
            for _ in range(number):
                self.on_request_routed(asked([]), replica, None)

    def has_seen(self, blocks, replica):
        request = asked(blocks)
        self.on_request_routed(request, replica, None)
        self.on_request_completed(replica, request.metadata.internal_request_id)

    def order(self, blocks=(), request=None):
        request = request or asked(blocks)
        ranks = asyncio.run(self.choose_replicas([SimpleNamespace(replica_id=one) for one in self.jobs], request))
        assert request.routing_context.should_backoff
        return [replica.replica_id for (replica,) in ranks]


def asked(blocks):
    args = [SimpleNamespace(beginnings=tuple(blocks))]
    metadata = SimpleNamespace(internal_request_id=next(NUMBERS))
    context = SimpleNamespace(should_backoff=False)
    return SimpleNamespace(args=args, future=Future(), routing_context=context, metadata=metadata)


def test_the_replica_with_the_fewest_jobs_is_the_first():
    assert Router({"a": 3, "b": 1, "c": 0}).order(range(4)) == ["c", "b", "a"]


@pytest.mark.parametrize(("jobs", "first"), [(7, "a"), (9, "b")])
def test_who_knows_the_whole_prompt_may_have_as_many_more_jobs_as_run_at_once(jobs, first):
    router = Router({"a": jobs, "b": 0}, running=8)
    router.has_seen(range(4), "a")
    assert router.order(range(4))[0] == first


@pytest.mark.parametrize(("jobs", "first"), [(1, "a"), (3, "b")])
def test_who_knows_a_quarter_of_it_may_have_a_quarter_of_that(jobs, first):
    router = Router({"a": jobs, "b": 0}, running=8)
    router.has_seen([0], "a")
    assert router.order(range(4))[0] == first


def test_a_burst_is_spread_though_none_of_it_has_arrived():
    router, burst = Router({"a": 0, "b": 0}), [asked([]) for _ in range(4)]
    firsts = [router.order(request=one)[0] for one in burst]
    assert sorted(firsts) == ["a", "a", "b", "b"]
    assert firsts[0] != firsts[1]


def test_what_was_cancelled_on_its_way_does_not_count():
    router, requests = Router({"a": 0, "b": 1}), [asked([]) for _ in range(2)]
    assert router.order(request=requests[0])[0] == "a"
    requests[0].future.cancel()
    assert router.order(request=requests[1])[0] == "a"


def test_a_job_counts_once_from_its_choice_to_its_end():
    router, request = Router({"a": 0, "b": 2}), asked([])
    assert router.order(request=request)[0] == "a"
    router.on_request_routed(request, "a", None)
    assert router.order(request=asked([]))[0] == "a"
    assert router._jobs() == {"a": 1, "b": 2}  # the other one is gone, and its choice with it
    router.on_request_completed("a", request.metadata.internal_request_id)
    assert router._jobs() == {"b": 2}


def test_a_job_that_ends_before_it_is_said_to_have_arrived_does_not_count():
    router, request = Router({"a": 0, "b": 1}), asked(range(4))
    assert router.order(range(4), request)[0] == "a"
    router.on_request_completed("a", request.metadata.internal_request_id)
    router.on_request_routed(request, "a", None)
    assert router._jobs() == {"b": 1}
    assert router._worth("a", range(4)) == 8  # it has seen the prompt none the less


@pytest.mark.parametrize("late", [True, False])
def test_a_job_that_is_sent_again_counts_where_it_is(late):
    router, request = Router({"a": 0, "b": 0}), asked([])
    lost = partial(router.on_request_completed, "a", request.metadata.internal_request_id)
    if not late:
        lost()
    router.on_request_routed(request, "b", None)
    if late:
        lost()
    assert router._jobs() == {"b": 1}


def test_what_ends_and_never_arrives_is_remembered_in_bounds():
    router = Router({"a": 0, "b": 1})
    for _ in range(2 * MOST_ENDED):  # what was never sent by this way, and ends
        router.on_request_completed("a", next(NUMBERS))
    assert len(router._ended) == MOST_ENDED
    assert router.order(request=asked([]))[0] == "a"


def test_what_asks_for_no_prompt_goes_anywhere():
    router, request = Router({"a": 1, "b": 0}), asked([])
    request.args = []
    ranks = asyncio.run(router.choose_replicas([SimpleNamespace(replica_id=one) for one in "ab"], request))
    assert [replica.replica_id for (replica,) in ranks] == ["b", "a"]
    router.on_request_routed(request, "b", None)


# -- what becomes of it -----------------------------------------------------------------------------


class Stream:
    """What a replica says: events, or an error that is raised."""

    def __init__(self, says):
        self.says, self.cancelled = says, threading.Event()

    async def __aiter__(self):
        for one in self.says:
            if isinstance(one, BaseException):
                raise one
            if one == "wait":
                await asyncio.sleep(PATIENCE)
            yield one

    def cancel(self):
        self.cancelled.set()


class Handle:
    """Replicas that say what a test has them say, one after the other."""

    def __init__(self, *streams, stats=()):
        self.streams, self.taken, self.stats = [Stream(says) for says in streams], 0, list(stats)
        self.heard = []

    def options(self, stream):
        assert stream
        return self

    @property
    def run(self):
        return self

    def remote(self, order):
        self.taken += 1
        return self.streams[self.taken - 1]

    def broadcast(self, method, given_up):
        async def results(**_):
            self.heard.append(given_up)
            return self.stats

        assert method == "hear"
        return SimpleNamespace(results_async=results)


@pytest.fixture
def engine_on(monkeypatch):
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.0)
    made = []

    def make(*streams, room=9, **options):
        made.append(RemoteEngine(Handle(*streams, **options), {}, EngineLimits(), room=room, words=96))
        return made[-1]

    yield make
    for engine in made:
        engine.close(timeout=0)


def heard(engine):
    listener = Listener()
    engine.submit(ASKED, listener)
    return listener


def lost():
    return ActorDiedError()


def test_a_job_goes_to_another_replica_while_nothing_was_said(engine_on):
    engine = engine_on([lost()], [asyncio.CancelledError()], [Delta(0, "yes"), END])
    listener = heard(engine)
    assert isinstance(listener.wait(), JobEnd)
    assert listener.text() == "yes"
    assert engine._handle.taken == 3


def test_a_reply_that_has_begun_is_not_begun_again(engine_on):
    engine = engine_on([Delta(0, "half "), lost()], [Delta(0, "whole"), END])
    listener = heard(engine)
    assert isinstance(listener.wait().error, ReplicaLost)
    assert listener.text() == "half "
    assert engine._handle.taken == 1


def test_a_stream_that_ends_too_early_is_that_of_a_lost_replica(engine_on):
    listener = heard(engine_on([Delta(0, "half ")]))
    assert isinstance(listener.wait().error, ReplicaLost)


def test_a_job_that_costs_one_replica_after_the_other_is_given_up(engine_on):
    engine = engine_on(*[[lost()]] * 9)
    assert isinstance(heard(engine).wait().error, ReplicaLost)
    assert engine._handle.taken == remote.REPLICAS_TRIED


def test_what_a_replica_fails_on_is_not_tried_again(engine_on):
    engine = engine_on([RayTaskError("run", "a traceback", ValueError("no"))], [END])
    assert isinstance(heard(engine).wait().error, RayTaskError)
    assert engine._handle.taken == 1


def test_replicas_that_are_full_refuse(engine_on):
    engine = engine_on(["wait"], [END], room=1)
    listener = Listener()
    ticket = engine.submit(ASKED, listener)
    with pytest.raises(QueueFull, match="have 1 jobs") as refused:
        heard(engine)
    assert refused.value.retry_seconds > 0
    ticket.cancel()
    listener.wait()
    assert isinstance(heard(engine).wait(), JobEnd)


def test_giving_up_reaches_the_replica(engine_on):
    engine = engine_on([Delta(0, "half "), "wait"])
    listener = Listener()
    ticket = engine.submit(ASKED, listener)
    listener.wait(Delta)
    ticket.cancel()
    assert isinstance(listener.wait().error, Cancelled)
    assert engine._handle.streams[0].cancelled.wait(PATIENCE)


def test_replicas_are_told_what_was_given_up_at_once_and_until_all_have_heard(engine_on, monkeypatch):
    monkeypatch.setattr(remote, "WATCH_SECONDS", 10 * PATIENCE)
    engine = engine_on([Delta(0, "half "), "wait"], stats=[total([]), lost()])
    listener = Listener()
    ticket = engine.submit(ASKED, listener)
    listener.wait(Delta)
    ticket.cancel()
    handle = engine._handle
    soon(lambda: any(handle.heard))
    told(engine)
    assert len(handle.heard[-1]) == 1
    handle.stats = [total([]), total([])]
    told(engine)
    assert len(handle.heard[-1]) == 1
    told(engine)
    assert handle.heard[-1] == frozenset()


def test_closing_waits_for_jobs_and_then_ends_them(engine_on):
    engine = engine_on([Delta(0, "half "), "wait"])
    listener = heard(engine)
    listener.wait(Delta)
    engine.close(timeout=0.05)
    assert isinstance(listener.wait().error, Closed)
    assert not engine.is_open
    with pytest.raises(Closed):
        heard(engine)


def test_documents_are_refused_with_the_way_out(engine_on):
    engine = engine_on()
    for refused in (lambda: engine.document("doc"), lambda: engine.load(["text"], print)):
        with pytest.raises(InputError, match="at the start of the prompt"):
            refused()


def test_an_unknown_policy_is_refused(engine_on):
    with pytest.raises(InputError, match="unknown policy 'other'"):
        engine_on().pipeline("other")


def test_counts_are_those_of_all_replicas(engine_on):
    numbers = {name: place for place, name in enumerate(remote.NUMBERS)}
    one, other = (EngineStats(jobs={"done": 2, kind: 1}, **numbers) for kind in ("failed", "cancelled"))
    sums = total([one, other])
    assert sums.jobs == {"done": 4, "failed": 1, "cancelled": 1}
    assert all(getattr(sums, name) == 2 * number for name, number in numbers.items())


def test_it_takes_jobs_only_while_there_is_a_replica(engine_on):
    idle = total([])
    assert told(engine_on(stats=[idle, lost()])) is True
    assert told(engine_on(stats=[lost()])) is False


def told(engine):
    asyncio.run_coroutine_threadsafe(engine._talk(), engine._loop).result(PATIENCE)
    return engine.is_open
