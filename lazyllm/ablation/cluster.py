"""Workers as actors of a Ray cluster; the driver alone writes results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lazyllm.ablation.dispatch import Died, Finished, Hand, Message, messages
from lazyllm.ablation.models import Load
from lazyllm.ablation.units import Group
from lazyllm.ablation.worker import Job, Worker
from lazyllm.clusters import connected, first_line


class _Actor:
    """A worker in a process of Ray's."""

    def __init__(self, job: Job) -> None:
        self._worker = Worker(job)

    def work(self, group: Group) -> Iterator[Message]:
        """What it says of a group, one message at a time."""
        yield from messages(self._worker, group)


class ActorHand:
    """An actor, and the stream of what it says about its group."""

    def __init__(self, ray: Any, job: Job, *, gpus: int) -> None:
        self.name, self._ray = job.name, ray
        self._actor = ray.remote(_Actor).options(max_restarts=0, num_cpus=1, num_gpus=gpus).remote(job)
        self.stream: Any = None

    def give(self, group: Group) -> None:
        """Hands over a group."""
        self.stream = self._actor.work.options(num_returns="streaming").remote(group)

    def hear(self) -> Message:
        """What it says next."""
        try:
            message: Message = self._ray.get(next(self.stream))
        except StopIteration:
            return Finished()
        except self._ray.exceptions.RayActorError as error:
            return Died(f"the worker died ({first_line(error)})")
        except self._ray.exceptions.RayError as error:
            self.dismiss()
            return Died(f"the worker failed ({first_line(error)})")
        return message

    def dismiss(self) -> None:
        """Ends the actor."""
        self._ray.kill(self._actor)


class RayCrew:
    """A crew of actors; `address` is a cluster's, or "local".

    Raises:
        InputError: when Ray is not installed, or there is no such cluster.
    """

    def __init__(self, run: str, address: str, load: Load | None = None) -> None:
        self.run, self._load = run, load
        self._ray = connected(address, what="--ray")
        self._resources = self._ray.cluster_resources()

    @property
    def room(self) -> int:
        """How many workers the cluster has GPUs for, or CPUs where it has no GPU."""
        return max(1, int(self._resources.get("GPU") or self._resources.get("CPU", 1)))

    def hire(self, name: str) -> ActorHand:
        """A new actor, wherever there is room."""
        return ActorHand(self._ray, Job(self.run, name, self._load), gpus=int("GPU" in self._resources))

    def hear(self, hands: Sequence[Hand]) -> Iterator[tuple[Hand, Message]]:
        """Waits for a message of each that has one."""
        by_stream = {hand.stream: hand for hand in hands if isinstance(hand, ActorHand)}
        ready, _ = self._ray.wait(list(by_stream), num_returns=1)
        for stream in ready:
            yield by_stream[stream], by_stream[stream].hear()
