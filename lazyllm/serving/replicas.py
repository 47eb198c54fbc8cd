"""A server on many machines: Ray Serve holds a door, which speaks HTTP, and replicas of the engine behind it.

Ray's own prefix-aware router sends a prompt to the replica that has seen its beginning, so that turns of one
conversation find what the turns before have computed.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from transformers import AutoTokenizer

from lazyllm.config import LazyConfig
from lazyllm.contexts.documents import Document
from lazyllm.errors import Cancelled, InputError, LazyLLMError, QueueFull, ReplicaLost, unknown
from lazyllm.models.loading import load_model
from lazyllm.pipeline import LazyPipeline
from lazyllm.policies.query import Query
from lazyllm.prompts import EncodedPrompt, Prompt
from lazyllm.serving.engine import Engine, EngineLimits, EngineStats
from lazyllm.serving.http.app import create_app
from lazyllm.serving.http.settings import ServerSettings
from lazyllm.serving.jobs import Event, Job, JobEnd, JobFailed

PREFIX_ROUTER = "ray.serve.llm.request_router.PrefixCacheAffinityRouter"
LAST = (JobEnd, JobFailed)
RETRY_SECONDS = 0.2
"""How long a job waits before it is sent to another replica."""
NO_STATS = EngineStats(**dict.fromkeys((one.name for one in fields(EngineStats)), 0) | {"jobs": {}})  # type: ignore[arg-type]
DOOR_REQUESTS = 1000
"""Most requests that the door holds at once; what the engines refuse, it refuses."""


@dataclass(frozen=True)
class ModelSource:
    """Where a replica finds its model.

    Attributes:
        path: hub id or folder.
        options: of `load_model`.
    """

    path: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Order:
    """A job on its way to a replica.

    Attributes:
        job: what is asked.
        prompt: its text, by which Ray's router knows who has seen its beginning.
    """

    job: Job
    prompt: str


class Replica:
    """An engine in a process of its own.

    Args:
        source: where the model is.
        configs: by name, the policies.
        limits: how much it takes on.
    """

    def __init__(self, source: ModelSource, configs: Mapping[str, LazyConfig], limits: EngineLimits) -> None:
        model, tokenizer = load_model(source.path, **source.options)
        pipelines = {name: LazyPipeline.from_config(config, model, tokenizer) for name, config in configs.items()}
        self.engine = Engine(pipelines, limits)

    async def run(self, order: Order) -> AsyncIterator[Event]:
        """What comes of a job; the job is given up when nobody asks any more."""
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        try:
            ticket = self.engine.submit(order.job, partial(_hand_over, loop, events))
        except LazyLLMError as error:
            yield JobFailed(error)
            return
        try:
            while True:
                event = await events.get()
                yield event
                if isinstance(event, LAST):
                    return
        finally:
            ticket.cancel()

    def facts(self) -> tuple[int, int | None]:
        """How many tokens the model knows, and how many positions it has."""
        return self.engine.words, self.engine.pipeline().max_positions

    def stats(self) -> EngineStats:
        """What it is doing."""
        return self.engine.stats

    def check_health(self) -> None:
        """Asked by Ray from time to time."""
        if not self.engine.is_open:
            raise RuntimeError("the engine has ended")

    def __del__(self) -> None:
        self.engine.close(timeout=0)


def _hand_over(loop: asyncio.AbstractEventLoop, events: asyncio.Queue[Event], event: Event) -> None:
    loop.call_soon_threadsafe(events.put_nowait, event)


class RemoteTicket:
    """A job that runs somewhere else."""

    def __init__(self, following: asyncio.Task[None]) -> None:
        self._following, self._loop = following, following.get_loop()

    def cancel(self) -> None:
        """Gives the job up."""
        self._loop.call_soon_threadsafe(self._following.cancel)


class RemoteEngine:
    """Stands for the engines of all replicas, with the face of one; lives in the door's event loop.

    A job whose replica is lost before it said anything is run by another one. Later it ends with `ReplicaLost`: another
    replica might not go on with the same words.

    Args:
        handle: of the replicas.
        recipes: by name, pipelines without a model.
        limits: of each replica.
        words, positions: how many tokens and positions the model has.
    """

    def __init__(
        self,
        handle: DeploymentHandle[Any],
        recipes: Mapping[str, LazyPipeline],
        limits: EngineLimits,
        words: int,
        positions: int | None,
    ) -> None:
        self.limits, self.words, self.positions = limits, words, positions
        self._handle, self._recipes = handle, dict(recipes)
        self._encoding = threading.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of the pipelines, the default first."""
        return tuple(self._recipes)

    @property
    def is_open(self) -> bool:
        """Whether jobs are taken; Ray says so of its replicas itself."""
        return True

    def pipeline(self, policy: str | None = None) -> LazyPipeline:
        """The recipe of a name.

        Raises:
            InputError: when there is none of that name.
        """
        name = self.policies[0] if policy is None else policy
        if name not in self._recipes:
            raise InputError(unknown("policy", name, self._recipes))
        return self._recipes[name]

    def encode(self, prompt: Prompt, *, policy: str | None = None, query: Query | None = None) -> EncodedPrompt:
        """A prompt as a job needs it; may be called by any thread."""
        with self._encoding:
            return self.pipeline(policy).encode(prompt, query=query)

    def document(self, name: str) -> Document:
        """Refused.

        Raises:
            InputError: always.
        """
        raise InputError("replicas keep no documents; put the text at the start of the prompt, which is found again")

    def load(self, texts: Sequence[str], deliver: Callable[[Event], None], **_: Any) -> RemoteTicket:
        """Refused.

        Raises:
            InputError: always.
        """
        raise InputError("replicas keep no documents; put the text at the start of the prompt, which is found again")

    def submit(self, job: Job, deliver: Callable[[Event], None]) -> RemoteTicket:
        """Sends a job to a replica; what it refuses comes as `JobFailed`."""
        following = asyncio.get_running_loop().create_task(self._follow(job, deliver))
        self._tasks.add(following)
        following.add_done_callback(self._tasks.discard)
        return RemoteTicket(following)

    async def _follow(self, job: Job, deliver: Callable[[Event], None]) -> None:
        order = Order(job, job.prompt.text or " ".join(map(str, job.prompt.token_ids)))
        try:
            while not await self._told(order, deliver):
                pass
        except asyncio.CancelledError:
            deliver(JobFailed(Cancelled("the job was given up")))
            raise
        except Exception as error:
            deliver(JobFailed(error))

    async def _told(self, order: Order, deliver: Callable[[Event], None]) -> bool:
        """Whether a job came to its end, and need not be sent to another replica."""
        said = False
        try:
            async for event in self._handle.options(stream=True).run.remote(order):
                said = True
                deliver(event)
        except BackPressureError as error:
            raise QueueFull("all replicas have as many jobs waiting as may; try again later", 1.0) from error
        except (RayError, RayServeException) as error:
            if said:
                raise ReplicaLost("the replica that made the reply is gone; try again") from error
            await asyncio.sleep(RETRY_SECONDS)
            return False
        return True

    @property
    def stats(self) -> EngineStats:
        """Nothing: replicas tell Ray."""
        return NO_STATS

    def close(self, *, timeout: float | None = None) -> None:
        """Ray ends the replicas."""


@serve.ingress()
class Door:
    """Speaks HTTP, and sends jobs to the replicas.

    Args:
        handle: of the replicas.
        source: where the tokenizer is.
        configs: by name, the policies.
        limits: of each replica.
        settings: of the app.
    """

    async def __init__(
        self,
        handle: DeploymentHandle[Any],
        source: ModelSource,
        configs: Mapping[str, LazyConfig],
        limits: EngineLimits,
        settings: ServerSettings,
    ) -> None:
        tokenizer = AutoTokenizer.from_pretrained(source.path)
        recipes = {name: LazyPipeline.from_config(config, None, tokenizer) for name, config in configs.items()}
        words, positions = await handle.facts.remote()
        self._engine, self._settings = RemoteEngine(handle, recipes, limits, words, positions), settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._engine, self._settings)


def application(
    source: ModelSource,
    configs: Mapping[str, LazyConfig],
    limits: EngineLimits,
    settings: ServerSettings,
    *,
    replicas: int,
    cpus: float = 1,
    gpus: float = 0,
) -> Any:
    """The door and its replicas, for `ray.serve.run`.

    Args:
        source: where every machine finds the model.
        configs: by name, the policies; the first is the default.
        limits: of each replica.
        settings: of the app.
        replicas: how many engines.
        cpus, gpus: what each of them takes.
    """
    engines = serve.deployment(
        Replica,
        name="engine",
        num_replicas=replicas,
        max_ongoing_requests=limits.running + limits.waiting,
        max_queued_requests=limits.waiting,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        request_router_config=RequestRouterConfig(
            request_router_class=PREFIX_ROUTER, request_router_kwargs={"imbalanced_threshold": limits.running}
        ),
        health_check_period_s=5,
    )
    door = serve.deployment(Door, name="door", max_ongoing_requests=DOOR_REQUESTS, ray_actor_options={"num_cpus": 0})
    handle = engines.bind(source, dict(configs), limits)  # type: ignore[attr-defined]
    return door.bind(handle, source, dict(configs), limits, settings)  # type: ignore[attr-defined]


def serve_replicas(app: Any, *, address: str | None, host: str, port: int) -> None:
    """Serves an application on a Ray cluster, until a signal says to end.

    Args:
        app: what `application` gave.
        address: of the cluster; None = one on this machine, which ends with it.
        host, port: where HTTP is spoken.

    Raises:
        InputError: when there is no such cluster.
    """
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=False)
    except ConnectionError as error:
        raise InputError(f"there is no Ray cluster at {address!r}: {error}") from None
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(app, route_prefix="/", blocking=True)
    finally:
        serve.shutdown()
        ray.shutdown()
