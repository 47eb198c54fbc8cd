"""A tiny model in a folder, as replicas load it, and the processes they run in."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from lazyllm import DenseCache, LazyConfig, LazyPipeline, Stages, Uniform
from lazyllm.models.loading import load_model
from lazyllm.serving.engine import Engine, EngineLimits
from tests.talks import PRUNING, tokenizer
from tests.tiny import random_ids, tiny_model

POSITIONS = 2**16
CONFIGS = {"aux": LazyConfig(**PRUNING), "dense": LazyConfig(scorer=Uniform(), schedule=Stages({}), cache=DenseCache())}
LIMITS = EngineLimits(running=4, waiting=2)
TITLE = "ray::ServeReplica"


def save_tiny_model(folder: Path) -> Path:
    """A tiny float64 model that never says its end token and has many positions, with its tokenizer."""
    tiny_model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    _change(folder / "config.json", max_position_embeddings=POSITIONS, eos_token_id=None)
    _change(folder / "generation_config.json", eos_token_id=None)
    return folder


def _change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def engine_here(folder: Path) -> Engine:
    """One engine in this process, as each replica has it."""
    loaded = load_model(folder)
    return Engine({name: LazyPipeline.from_config(config, *loaded) for name, config in CONFIGS.items()}, LIMITS)


def ids(length: int, seed: int = 0) -> list[int]:
    """Token ids of a prompt."""
    return random_ids(1, length, seed)[0].tolist()


def replica_pids(parent: int | None = None) -> set[int]:
    """Processes of replicas below a process, or this one."""
    return {process.pid for process in descendants(parent) if title(process).startswith(TITLE)}


def descendants(parent: int | None = None) -> Sequence[psutil.Process]:
    """All processes below a process, or this one."""
    return psutil.Process(parent).children(recursive=True)


def title(process: psutil.Process) -> str:
    """What a process is called; "" when it is gone."""
    try:
        return next(iter(process.cmdline()), "")
    except psutil.Error:
        return ""


def alive(processes: Sequence[psutil.Process]) -> Iterator[psutil.Process]:
    """Those that still run; one whose parent has not asked how it ended does not."""
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except psutil.Error:
            continue
