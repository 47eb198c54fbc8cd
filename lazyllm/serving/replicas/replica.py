"""An engine in a process of its own, which Ray Serve starts, asks for its health and replaces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from uuid import uuid4

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lazyllm.config import LazyConfig
from lazyllm.errors import Cancelled, LazyLLMError
from lazyllm.models.loading import load_model, load_tokenizer
from lazyllm.pipeline import LazyPipeline
from lazyllm.serving.engine import Engine, EngineLimits, EngineStats, Ticket
from lazyllm.serving.jobs import LAST, Event, Job, JobFailed
from lazyllm.serving.replicas.routing import Latest, beginnings

EARLY = 2**14
"""How many orders are remembered that were given up before they came."""


@dataclass(frozen=True)
class ModelSource:
    """Where every machine finds the model.

    Attributes:
        path: hub id, folder or `.gguf` file.
        device: where it runs: "cpu" or "cuda", of which each replica sees its own.
        gguf_file: name of a GGUF file inside the folder or repository.
        options: anything else `load_model` takes.
    """

    path: str
    device: str = "cpu"
    gguf_file: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model, on its device, and its tokenizer."""
        model, tokenizer = load_model(self.path, gguf_file=self.gguf_file, **self.options)
        return model.to(self.device), tokenizer

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer alone."""
        return load_tokenizer(self.path, gguf_file=self.gguf_file, **self.options)


@dataclass(frozen=True)
class Order:
    """A job on its way to a replica.

    Attributes:
        job: what is to be done.
        id: by which the order can be given up wherever it is.
    """

    job: Job
    id: str = field(default_factory=lambda: uuid4().hex)

    @cached_property
    def beginnings(self) -> tuple[int, ...]:
        """What the router knows its prompt by."""
        return beginnings(self.job.prompt.token_ids, self.job.policy)


class Replica:
    """What Ray Serve deploys.

    Args:
        source: where the model is.
        configs: by name, the policies; the first is the default.
        limits: how much it takes on.
    """

    def __init__(self, source: ModelSource, configs: Mapping[str, LazyConfig], limits: EngineLimits) -> None:
        loaded = source.load()
        self._engine = Engine({name: LazyPipeline.from_config(one, *loaded) for name, one in configs.items()}, limits)
        self._tickets: dict[str, Ticket] = {}
        self._early = Latest(EARLY)

    async def run(self, order: Order) -> AsyncIterator[Event]:
        """What comes of a job; it is given up when nobody asks for more."""
        if order.id in self._early:
            yield JobFailed(Cancelled())
            return
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        try:
            ticket = self._tickets[order.id] = self._engine.submit(order.job, deliver)
        except LazyLLMError as error:
            yield JobFailed(error)
            return
        try:
            while not isinstance(event := await events.get(), LAST):
                yield event
            yield _sendable(event)
        finally:
            ticket.cancel()
            del self._tickets[order.id]

    async def hear(self, given_up: Iterable[str]) -> EngineStats:
        """Gives up orders, here or not yet here, and tells what it is doing and has done so far.

        Ray's own cancelling is lost where it crosses the order's way.
        """
        for order in given_up:
            if order in self._tickets:
                self._tickets[order].cancel()
            else:
                self._early.add(order)
        return self._engine.stats

    def words(self) -> int:
        """How many tokens the model knows."""
        return self._engine.words

    def check_health(self) -> None:
        """Asked by Ray from time to time.

        Raises:
            RuntimeError: when it takes no jobs any more, and has to be replaced.
        """
        if not self._engine.is_open:
            raise RuntimeError("the engine has ended")

    def __del__(self) -> None:
        if hasattr(self, "_engine"):  # the model may not have loaded
            self._engine.close(timeout=0)


def _sendable(event: Event) -> Event:
    """An event that can be read elsewhere: what other libraries raise may not be."""
    if isinstance(event, JobFailed) and not isinstance(event.error, LazyLLMError):
        return JobFailed(RuntimeError(f"{type(event.error).__name__}: {event.error}"))
    return event
