"""Which replica gets a job: one that has seen the beginning of its prompt, unless others have much less to do.

Ray pickles a router by value, all of this module with it; so nothing else of lazyllm is used here.
"""

from __future__ import annotations

import random
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

BLOCK_TOKENS = 16
MOST_BLOCKS = 2**16
"""How many blocks of tokens are remembered of a replica."""
MOST_ENDED = 2**10
"""How many requests are remembered that had ended before they were said to have arrived."""


def beginnings(token_ids: Sequence[int], policy: str | None = None) -> tuple[int, ...]:
    """A number for each whole block of a prompt's tokens, which stands for all of the prompt up to its end."""
    known, found = hash(policy), []
    for stop in range(BLOCK_TOKENS, len(token_ids) + 1, BLOCK_TOKENS):
        known = hash((known, *token_ids[stop - BLOCK_TOKENS : stop]))
        found.append(known)
    return tuple(found)


class Latest:
    """The latest of what was added; those of longest ago are forgotten.

    Args:
        most: how many are remembered.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._added: OrderedDict[Hashable, None] = OrderedDict()

    def add(self, one: Hashable) -> None:
        """Remembers one as the latest."""
        self._added[one] = None
        self._added.move_to_end(one)
        if len(self._added) > self._most:
            self._added.popitem(last=False)

    def __contains__(self, one: object) -> bool:
        return one in self._added

    def __len__(self) -> int:
        return len(self._added)


class Memory:
    """Beginnings that a replica has seen; those of longest ago are forgotten.

    Args:
        most: how many are remembered.
    """

    def __init__(self, most: int = MOST_BLOCKS) -> None:
        self._seen = Latest(most)

    def note(self, blocks: Iterable[int]) -> None:
        """Remembers the blocks of a prompt, its first ones for longest."""
        for block in reversed(tuple(blocks)):
            self._seen.add(block)

    def share(self, blocks: Sequence[int]) -> float:
        """How much of a prompt it has seen, from the start on."""
        known = next((index for index, block in enumerate(blocks) if block not in self._seen), len(blocks))
        return known / len(blocks) if blocks else 0.0


class PrefixRouter(RequestRouter):
    """Sends a job to the replica with the fewest jobs, where one that knows its prompt counts as having fewer.

    As many fewer as a replica runs at once, times the share of the prompt that it has seen. So a conversation stays
    where it began, and a beginning that all prompts share does not bring them all to one place.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Takes what the deployment was configured with: `running`, how many replies a replica makes at once."""
        self._running: int = kwargs["running"]
        self._memories: dict[ReplicaID, Memory] = {}
        self._chosen: WeakKeyDictionary[Any, ReplicaID] = WeakKeyDictionary()  # by future, of requests on their way
        # a request that loses its replica is sent again by the same id
        self._there: set[tuple[str, ReplicaID]] = set()  # requests that have arrived and not ended
        self._ended = Latest(MOST_ENDED)  # those that had ended before they arrived, or never arrive

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All replicas, the best first; the next one is asked when one has no room."""
        blocks, jobs = _blocks(pending_request), self._jobs()
        shuffled = random.sample(candidate_replicas, len(candidate_replicas))
        ranked = sorted(shuffled, key=lambda one: jobs[one.replica_id] - self._worth(one.replica_id, blocks))
        if pending_request is not None and ranked:
            pending_request.routing_context.should_backoff = True  # when all of them are full, wait
            self._chosen[pending_request.future] = ranked[0].replica_id
        return [[one] for one in ranked]

    def _jobs(self) -> Counter[ReplicaID]:
        """Of each replica, those on their way to it and those that it has; what it says itself is late in a burst."""
        coming = (replica for future, replica in self._chosen.items() if not future.cancelled())
        return Counter((*coming, *(replica for _, replica in self._there)))

    def _worth(self, replica: ReplicaID, blocks: Sequence[int]) -> float:
        """How many jobs a replica's knowledge of a prompt stands for."""
        memory = self._memories.get(replica)
        return self._running * memory.share(blocks) if memory else 0.0

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Remembers who has a request, and has seen its prompt; a short one may have ended by now."""
        self._chosen.pop(pending_request.future, None)
        if (place := (pending_request.metadata.internal_request_id, replica_id)) not in self._ended:
            self._there.add(place)
        if blocks := _blocks(pending_request):
            self._memories.setdefault(replica_id, Memory()).note(blocks)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Forgets a request that has ended."""
        if (place := (internal_request_id, replica_id)) in self._there:
            self._there.remove(place)
        else:
            self._ended.add(place)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Takes the replicas that there are now, and forgets those that are gone."""
        super().update_replicas(replicas)
        self._memories = {one: memory for one, memory in self._memories.items() if one in self.curr_replicas}
        self._there = {place for place in self._there if place[1] in self.curr_replicas}


def _blocks(request: PendingRequest | None) -> Sequence[int]:
    """The beginnings of a request's prompt; none for what asks for something else."""
    order = request.args[0] if request is not None and request.args else None
    blocks: Sequence[int] = getattr(order, "beginnings", ())
    return blocks
