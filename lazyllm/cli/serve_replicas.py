"""What the command serve does with --replicas or --ray: its engine stands for several, on Ray."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from lazyllm.config import LazyConfig
from lazyllm.errors import InputError, unknown
from lazyllm.extras import needed
from lazyllm.models.loading import dtype_named

if TYPE_CHECKING:
    from lazyllm.serving.engine import EngineLimits
    from lazyllm.serving.replicas import RemoteEngine

DEVICES = ("cpu", "cuda")
"""Where a replica's model may run; of GPUs it sees its own alone."""


def engine_on_ray(
    model: str,
    configs: Mapping[str, LazyConfig],
    limits: EngineLimits,
    *,
    replicas: int,
    address: str | None,
    cpus: float,
    device: str,
    gguf_file: str | None,
    dtype: str,
    weights: str | None,
    trust_remote_code: bool,
) -> AbstractContextManager[RemoteEngine]:
    """The engine of replicas, which end with the context.

    Args:
        model, gguf_file, dtype, weights, trust_remote_code: as the command has them.
        configs: by name, the policies; the first is the default.
        limits: of each replica.
        replicas: how many.
        address: of a Ray cluster; None starts one on this machine.
        cpus: how many CPUs each replica takes.
        device: "cpu", or "cuda" for one GPU each.

    Raises:
        InputError: when Ray is not installed, or for another device.
    """
    needed("ray.serve", what="--replicas", extra="ray")
    from lazyllm.serving.replicas import HERE, Cluster, ModelSource, replicated

    if device not in DEVICES:
        raise InputError(unknown("device of replicas", device, DEVICES))
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # until the server logs for it
    kind = dtype if dtype == "auto" else dtype_named(dtype)
    options = {"dtype": kind, "weights": weights, "trust_remote_code": trust_remote_code}
    place = str(Path(model).resolve()) if Path(model).exists() else model  # replicas run elsewhere
    source = ModelSource(place, device, gguf_file, options)
    cluster = Cluster(replicas, address or HERE, cpus, gpus=float(device == "cuda"))
    return replicated(source, configs, limits, cluster)
