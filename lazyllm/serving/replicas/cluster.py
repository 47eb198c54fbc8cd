"""Replicas on a Ray cluster, for as long as a server needs them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import ceil
from typing import Any
from uuid import uuid4

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from transformers import PreTrainedTokenizerBase

from lazyllm.clusters import connected, first_line, last_line
from lazyllm.config import LazyConfig
from lazyllm.errors import InputError
from lazyllm.pipeline import LazyPipeline
from lazyllm.serving.engine import EngineLimits
from lazyllm.serving.replicas.remote import RemoteEngine
from lazyllm.serving.replicas.replica import ModelSource, Replica
from lazyllm.serving.replicas.routing import PrefixRouter

HERE = "local"
"""Address of a cluster that is started on this machine, and ends with the server."""
HEALTH_SECONDS = 5.0
START_TRIES = 3
"""How often replicas that fail while they start are tried again."""


@dataclass(frozen=True)
class Cluster:
    """Where replicas run.

    Attributes:
        replicas: how many.
        address: of a Ray cluster; `HERE` starts one.
        cpus, gpus: how many of a machine's each replica takes.

    Raises:
        InputError: for a number that cannot be.
    """

    replicas: int
    address: str = HERE
    cpus: float = 1.0
    gpus: float = 0.0

    def __post_init__(self) -> None:
        """Checks what cannot be."""
        if self.replicas < 1:
            raise InputError(f"replicas is a number from 1 on, not {self.replicas}")
        for name in ("cpus", "gpus"):
            if (number := getattr(self, name)) < 0:
                raise InputError(f"{name} is a number from 0 on, not {number}")

    @property
    def needs(self) -> dict[str, float]:
        """What all replicas take together, by Ray's name of it."""
        return {"CPU": self.replicas * self.cpus, "GPU": self.replicas * self.gpus}


@contextmanager
def replicated(
    source: ModelSource, configs: Mapping[str, LazyConfig], limits: EngineLimits, cluster: Cluster
) -> Iterator[RemoteEngine]:
    """An engine whose jobs are done by replicas, which end with the context.

    Args:
        source: where every machine finds the model.
        configs: by name, the policies; the first is the default.
        limits: of each replica.
        cluster: where they run.

    Raises:
        InputError: when there is no such cluster, it has not what they need, or they do not start.
    """
    tokenizer = _tokenizer(source)
    recipes = {name: LazyPipeline.from_config(config, None, tokenizer) for name, config in configs.items()}
    application = _application(source, configs, limits, cluster)
    with _joined(cluster), _deployed(application, cluster.address) as handle:
        room = cluster.replicas * _most_jobs(limits)
        engine = RemoteEngine(handle, recipes, limits, room=room, words=handle.words.remote().result())
        try:
            yield engine
        finally:
            engine.close(timeout=0)


def _tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer, for this process.

    Raises:
        InputError: whatever keeps it from loading.
    """
    try:
        return source.tokenizer()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"cannot load the tokenizer of {source.path!r}: {first_line(error)}") from None


@contextmanager
def _joined(cluster: Cluster) -> Iterator[None]:
    """Connected to a cluster; one that was started for this ends with the context."""
    own = {"num_cpus": ceil(cluster.needs["CPU"]), "include_dashboard": False} if cluster.address == HERE else {}
    joined = not ray.is_initialized()
    connected(cluster.address, what="--replicas", **own)
    try:
        _check_room(cluster)
        yield
    finally:
        if joined:
            ray.shutdown()


def _check_room(cluster: Cluster) -> None:
    """Refuses replicas that would wait for ever.

    Raises:
        InputError: with what there is, and what is needed.
    """
    there = ray.cluster_resources()
    for kind, needed in cluster.needs.items():
        if needed > there.get(kind, 0):
            raise InputError(
                f"{cluster.replicas} replicas need {needed:g} {kind}s, the cluster has {there.get(kind, 0):g}"
            )


def _application(source: ModelSource, configs: Mapping[str, LazyConfig], limits: EngineLimits, cluster: Cluster) -> Any:
    """The replicas, as Ray Serve deploys them."""
    deployment = serve.deployment(
        Replica,
        name="replica",
        num_replicas=cluster.replicas,
        max_ongoing_requests=2 * _most_jobs(limits),  # room for jobs of a lost one, and to be asked what it does
        ray_actor_options={"num_cpus": cluster.cpus, "num_gpus": cluster.gpus},
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter, request_router_kwargs={"running": limits.running}
        ),
        health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=1.0,  # the server has let jobs come to their end before
        max_constructor_retry_count=START_TRIES,
    )
    # the server refuses what there is no room for; a replica takes what it is sent
    return deployment.bind(source, dict(configs), replace(limits, waiting=2 * _most_jobs(limits)))


def _most_jobs(limits: EngineLimits) -> int:
    """How many jobs a replica has at most: those that run, of one reply each, and those that wait."""
    return limits.running + limits.waiting


@contextmanager
def _deployed(application: Any, address: str) -> Iterator[DeploymentHandle[Any]]:
    """A running application, which ends with the context, or with the cluster where that does."""
    name = f"lazyllm-{uuid4().hex[:8]}"
    serve.start(proxy_location="Disabled")
    try:
        yield _started(application, name)
    finally:
        if address != HERE:
            _end(name)


def _end(name: str) -> None:
    """Ends an application, and Ray Serve itself where it has no other."""
    with suppress(RayError, RayServeException):  # the cluster may be gone
        serve.delete(name)
        if not serve.status().applications:
            serve.shutdown()


def _started(application: Any, name: str) -> DeploymentHandle[Any]:
    """Deploys an application, and waits until it runs.

    Raises:
        InputError: when it does not come to run.
    """
    try:
        return serve.run(application, name=name, route_prefix=None)
    except (RuntimeError, RayError, RayServeException) as error:
        raise InputError(f"the replicas do not start: {last_line(error)}") from None
