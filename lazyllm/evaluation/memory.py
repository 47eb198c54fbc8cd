"""Bytes a cache holds: counted, and beside what the process holds."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from lazyllm.callbacks import Callback, LayerEnd, StepEnd
from lazyllm.config import LazyConfig
from lazyllm.errors import LazyLLMError
from lazyllm.evaluation.bench import reply_options
from lazyllm.evaluation.data import quiet_loading
from lazyllm.generation.result import GenerationResult
from lazyllm.models.loading import dtype_named, load_model
from lazyllm.pipeline import LazyPipeline
from lazyllm.policies.query import TokenRange
from lazyllm.runtime import give_back_free_memory, map_large_blocks

STATM = Path("/proc/self/statm")


@dataclass(frozen=True)
class Footprint:
    """What one prompt and its reply take.

    Attributes:
        prompt_tokens, reply_tokens: tokens the cache has seen of each at the end.
        kv_bytes, aux_bytes: of the cache after the prefill.
        reply_kv_bytes, reply_aux_bytes: after the reply.
        held_bytes: growth of the process's resident memory, on CUDA of its allocated memory, from before the prefill
            to after it; None where the system does not tell.
        peak_bytes: on CUDA, what was allocated at most during the prefill, beyond what was before; else None.
    """

    prompt_tokens: int
    reply_tokens: int
    kv_bytes: int
    aux_bytes: int
    reply_kv_bytes: int
    reply_aux_bytes: int
    held_bytes: int | None
    peak_bytes: int | None

    @property
    def total_bytes(self) -> int:
        """K/V and Aux after the prefill."""
        return self.kv_bytes + self.aux_bytes


@dataclass(frozen=True)
class StepSize:
    """What a cache holds after a step, and what the step added.

    Attributes:
        kv_bytes, aux_bytes: held.
        new, revived: layer-tokens the step computed, for its own tokens and for older ones.
    """

    kv_bytes: int
    aux_bytes: int
    new: int
    revived: int


class SizeTrace(Callback):
    """Notes the size of the cache after every step.

    Attributes:
        steps: one entry per step.
    """

    def __init__(self) -> None:
        self.steps: list[StepSize] = []
        self._computed = self._revived = 0

    def on_layer_end(self, event: LayerEnd) -> None:
        """Counts what a layer computed."""
        if event.layer == 0:
            self._computed = self._revived = 0
        self._computed += sum(row.work for row in event.rows)
        self._revived += sum(row.revived.numel() for row in event.rows if not row.shared)

    def on_step_end(self, event: StepEnd) -> None:
        """Notes the step."""
        new = self._computed - self._revived
        self.steps.append(StepSize(event.kv_bytes, event.aux_bytes, new, self._revived))


@dataclass(frozen=True)
class ReplySize:
    """A cache after some tokens of a reply.

    Attributes:
        reply_tokens: how many it has seen.
        kv_bytes, aux_bytes: held.
        grown_bytes: K/V more than after the prefill.
        new_bytes, revived_bytes: K/V of the layer-tokens computed since, of the reply and of the prompt.
    """

    reply_tokens: int
    kv_bytes: int
    aux_bytes: int
    grown_bytes: int
    new_bytes: int
    revived_bytes: int

    @property
    def adds_up(self) -> bool:
        """Whether the cache grew by what was computed, and by nothing else."""
        return self.grown_bytes == self.new_bytes + self.revived_bytes


def reply_sizes(steps: Sequence[StepSize], *, every: int) -> list[ReplySize]:
    """The cache after every so many tokens of a reply, and after the last; `steps` begins with the prefill."""
    prefill, *decode = steps
    unit = prefill.kv_bytes // (prefill.new + prefill.revived)
    marks = sorted({*range(every, len(decode) + 1, every), len(decode)})
    return [
        ReplySize(
            reply_tokens=mark,
            kv_bytes=steps[mark].kv_bytes,
            aux_bytes=steps[mark].aux_bytes,
            grown_bytes=steps[mark].kv_bytes - prefill.kv_bytes,
            new_bytes=unit * sum(step.new for step in decode[:mark]),
            revived_bytes=unit * sum(step.revived for step in decode[:mark]),
        )
        for mark in marks
    ]


def trace_reply(
    model: PreTrainedModel, config: LazyConfig, prompt: Sequence[int], question: TokenRange | None, reply_tokens: int
) -> list[StepSize]:
    """Sizes of the cache after the prefill, and after each of `reply_tokens` tokens of the reply."""
    trace = SizeTrace()
    pipe = LazyPipeline.from_config(config, model, callbacks=[trace])
    pipe.generate(list(prompt), query=question, **reply_options(reply_tokens + 1))
    return trace.steps


def measure_footprint(
    model: PreTrainedModel, config: LazyConfig, prompt: Sequence[int], question: TokenRange | None, reply_tokens: int
) -> Footprint:
    """What a prompt and its reply take, after a prefill to warm up; meant for a process of its own."""
    pipe, device = LazyPipeline.from_config(config, model), model.device
    pipe.generate(list(prompt), query=question, **reply_options(1))
    before = held_bytes(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    cache = pipe.new_cache()
    options: dict[str, Any] = {"query": question, "past_key_values": cache}
    first = cast(GenerationResult, pipe.generate(list(prompt), **options, **reply_options(1)))
    kv_bytes, aux_bytes = cache.kv_bytes, cache.aux_bytes
    peak = torch.cuda.max_memory_allocated(device) - (before or 0) if device.type == "cuda" else None
    after = held_bytes(device)
    pipe.generate([*prompt, *first.token_ids], **options, **reply_options(reply_tokens))
    return Footprint(
        prompt_tokens=len(prompt),
        reply_tokens=cache.columns - len(prompt),
        kv_bytes=kv_bytes,
        aux_bytes=aux_bytes,
        reply_kv_bytes=cache.kv_bytes,
        reply_aux_bytes=cache.aux_bytes,
        held_bytes=None if before is None or after is None else after - before,
        peak_bytes=peak,
    )


def measure_in_fresh_process(
    source: str,
    dtype: str,
    device: str,
    config: LazyConfig,
    prompt: Sequence[int],
    question: TokenRange | None,
    reply_tokens: int,
) -> Footprint:
    """`measure_footprint` in a process that loads the model and does nothing else.

    Raises:
        LazyLLMError: when that process dies.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        job = pool.submit(_load_and_measure, source, dtype, device, config.to_dict(), prompt, question, reply_tokens)
        try:
            return job.result()
        except BrokenProcessPool:
            raise LazyLLMError(
                f"the process that measured {len(prompt):,} tokens died, most likely for want of memory; "
                "give a shorter prompt"
            ) from None


def _load_and_measure(
    source: str,
    dtype: str,
    device: str,
    config: Mapping[str, Any],
    prompt: Sequence[int],
    question: TokenRange | None,
    reply_tokens: int,
) -> Footprint:
    map_large_blocks()
    with quiet_loading():
        model, _ = load_model(source, dtype=dtype_named(dtype))
    return measure_footprint(model.to(device), LazyConfig(**config), prompt, question, reply_tokens)


def held_bytes(device: torch.device) -> int | None:
    """Memory the process holds now, on CUDA that of its tensors; None where the system does not tell."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    if not STATM.exists():
        return None
    give_back_free_memory()
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
