"""The numbers of the machine this runs on, from synthetic work: products, attention, additions, tiny layers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lazyllm.caches import AuxCache, CachePolicy, DenseCache
from lazyllm.caches.frontier import FrontierStore
from lazyllm.costs.device import HERE, Device, Rate
from lazyllm.costs.shape import ModelShape
from lazyllm.generation.result import GenerationResult
from lazyllm.pipeline import LazyPipeline
from lazyllm.policies.base import stable_top
from lazyllm.policies.schedules import Stages
from lazyllm.policies.scorers import LastTokenAttention

LINEAR_TOKENS, LINEAR_WIDTHS = (16, 64, 256, 1024, 4096), (128, 256, 512, 1024, 2048)
ATTENTION_TOKENS, ATTENTION_WIDTHS = (64, 256, 1024, 4096), (32, 64, 128)
MOVING_TOKENS, MOVING_HIDDEN = (16, 128, 1024, 4096), (128, 512, 1024)
READ_WIDTH = 8192
STATES = (4096, 512)
RANKED_TOKENS = 1 << 15
LEAST_SECONDS = 0.1
TINY_LAYERS = (2, 10)
TINY_TOKENS = 32
TINY_CUTS = Stages(stages={2: 0.8, 4: 0.6, 6: 0.4, 8: 0.2})


def calibrate(
    device: str = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    repeats: int = 5,
    on_part: Callable[[str], None] | None = None,
) -> Device:
    """Measures a device; about half a minute on two processor cores.

    Args:
        device: of torch, `"cpu"` or `"cuda"`.
        dtype: of the numbers to work on.
        repeats: how often each size is timed at least, after once to warm up; the median counts.
        on_part: told what is measured next.
    """
    tell = on_part or (lambda part: None)
    bench = _Bench(torch.device(device), dtype, repeats)
    with torch.no_grad():
        tell("matrix products")
        linear = _grid(LINEAR_TOKENS, LINEAR_WIDTHS, bench.linear)
        tell("attention")
        attention = _grid(ATTENTION_TOKENS, ATTENTION_WIDTHS, bench.attention)
        tell("norms and activations")
        shapes = [_shape(hidden) for hidden in MOVING_HIDDEN]
        moving = Rate(
            tokens=MOVING_TOKENS,
            widths=tuple(_moved(shape) for shape in shapes),
            per_second=tuple(tuple(bench.moving(tokens, shape) for shape in shapes) for tokens in MOVING_TOKENS),
        )
        tell("memory")
        bytes_per_second, standardising = bench.reading(), bench.standardising()
        tell("layers, cuts and tokens")
        shallow, deep = (bench.tiny(layers, DenseCache()) for layers in TINY_LAYERS)
        layer_seconds = max(0.0, (deep - shallow) / (TINY_LAYERS[1] - TINY_LAYERS[0]))
        cut_seconds = max(0.0, bench.tiny(TINY_LAYERS[1], AuxCache()) - deep) / len(TINY_CUTS.stages)
        ranked, parked = bench.ranking(), bench.parking()
    return Device(
        name=HERE,
        dtype=str(dtype).removeprefix("torch."),
        linear=linear,
        attention=attention,
        moving=moving,
        standardising=standardising,
        bytes_per_second=bytes_per_second,
        memory_bytes=_memory_bytes(bench.device),
        layer_seconds=layer_seconds,
        step_seconds=max(0.0, shallow - TINY_LAYERS[0] * layer_seconds),
        cut_seconds=cut_seconds,
        ranked_token_seconds=ranked,
        parked_token_seconds=parked,
        overlaps=bench.device.type == "cuda",
    )


def _grid(tokens: tuple[int, ...], widths: tuple[int, ...], measure: Callable[[int, int], float]) -> Rate:
    return Rate(
        tokens=tokens,
        widths=widths,
        per_second=tuple(tuple(measure(count, width) for width in widths) for count in tokens),
    )


def _shape(hidden: int) -> ModelShape:
    """A layer of common proportions."""
    return ModelShape(
        layers=1, hidden=hidden, intermediate=3 * hidden, heads=hidden // 64, kv_heads=hidden // 128, head_dim=64,
        vocabulary=1,
    )  # fmt: skip


def _moved(shape: ModelShape) -> int:
    return shape.moved_whole + shape.moved_split


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class _Bench:
    """Work per second of single operations."""

    def __init__(self, device: torch.device, dtype: torch.dtype, repeats: int) -> None:
        self.device, self.dtype, self.repeats = device, dtype, repeats

    def seconds(self, work: Callable[[], object]) -> float:
        """Median time of one run, after one to warm up; short ones run more often, past a slow moment."""
        times: list[float] = []
        while len(times) <= self.repeats or sum(times) < LEAST_SECONDS:
            self._wait()
            started = time.perf_counter()
            work()
            self._wait()
            times.append(time.perf_counter() - started)
        return median(times[1:])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _random(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, device=self.device, dtype=self.dtype)

    def linear(self, tokens: int, width: int) -> float:
        """Operations per second of `[tokens, width] x [width, width]`."""
        states, weight = self._random(tokens, width), self._random(width, width)
        return 2 * tokens * width * width / self.seconds(lambda: F.linear(states, weight))

    def attention(self, tokens: int, head_dim: int) -> float:
        """Operations per second of causal attention with four query heads on two key heads."""
        queries, keys = self._random(1, 4, tokens, head_dim), self._random(1, 2, tokens, head_dim)
        work = 4 * 4 * head_dim * tokens * (tokens + 1) / 2
        return work / self.seconds(
            lambda: F.scaled_dot_product_attention(queries, keys, keys, is_causal=True, enable_gqa=True)
        )

    def moving(self, tokens: int, shape: ModelShape) -> float:
        """Bytes per second of what a layer does beside products and attention."""
        hidden = self._random(1, tokens, shape.hidden)
        heads = [self._random(1, count, tokens, shape.head_dim) for count in (shape.heads, shape.kv_heads)]
        gate = self._random(1, tokens, shape.intermediate)
        angles = self._random(1, 1, tokens, shape.head_dim)
        store = torch.empty(2, shape.kv_heads, tokens, shape.head_dim, device=self.device, dtype=self.dtype)

        def layer() -> None:
            for _ in range(2):
                _norm(hidden, hidden[0, 0])
                torch.add(hidden, hidden)
            queries, keys = (_rotate(states, angles) for states in heads)
            store[0] = keys[0]
            store[1] = keys[0]
            queries.transpose(1, 2).contiguous()
            torch.mul(F.silu(gate), gate)

        return tokens * _moved(shape) * self.dtype.itemsize / self.seconds(layer)

    def reading(self) -> float:
        """Bytes per second at which one token reads a weight that no cache holds."""
        state, weight = self._random(1, READ_WIDTH), self._random(READ_WIDTH, READ_WIDTH)
        return weight.numel() * self.dtype.itemsize / self.seconds(lambda: F.linear(state, weight))

    def standardising(self) -> float:
        """Bytes per second of states that are standardised over the context and normalised."""
        states = torch.randn(*STATES, device=self.device)

        def standardise() -> None:
            F.normalize((states - states.mean(0)) / states.std(0, correction=0), dim=-1)

        return states.nbytes / self.seconds(standardise)

    def tiny(self, layers: int, cache: CachePolicy) -> float:
        """Seconds to the first token of a model too small to compute anything worth timing."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
            num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model = LlamaForCausalLM(config).to(device=self.device, dtype=self.dtype).eval()
        schedule = TINY_CUTS if cache.prunes else "Constant(1.0)"
        pipe = LazyPipeline(model, scorer=LastTokenAttention(), schedule=schedule, cache=cache)
        prompt = [1] * TINY_TOKENS
        options: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False}
        runs = [cast(GenerationResult, pipe.generate(prompt, **options)).stats for _ in range(4 * self.repeats + 1)]
        return median(stats.ttft_seconds for stats in runs[1:])

    def ranking(self) -> float:
        """Seconds per token of ordering scores and telling who goes on."""
        scores, tokens = torch.rand(RANKED_TOKENS), torch.arange(RANKED_TOKENS)

        def rank() -> None:
            best = stable_top(scores, RANKED_TOKENS // 2).sort().values
            torch.isin(tokens, best, assume_unique=True)
            scores.double().sort(descending=True)

        return self.seconds(rank) / RANKED_TOKENS

    def parking(self) -> float:
        """Seconds per token of putting a frontier state away."""
        tokens, states = torch.arange(RANKED_TOKENS), self._random(RANKED_TOKENS, 1)
        return self.seconds(lambda: FrontierStore().put(tokens, states)) / RANKED_TOKENS


def _norm(hidden: Tensor, weight: Tensor) -> Tensor:
    """Root mean square norm, step by step as transformers takes it."""
    precise = hidden.to(torch.float32)
    precise = precise * torch.rsqrt(precise.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * precise.to(hidden.dtype)


def _rotate(states: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding, step by step as transformers takes it."""
    half = states.shape[-1] // 2
    turned = torch.cat((-states[..., half:], states[..., :half]), dim=-1)
    return states * angles + turned * angles
