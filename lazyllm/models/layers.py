"""How a layer of the model is run: as it is, or, for one token, compiled.

A decode step of a small model spends half of its time on starting small operations. Compiled, a layer is one call: of
SmolLM2-135M with four-bit weights a step took 9 to 20 % less on two CPU cores (docs/performance.md). In bfloat16 and
float32, where reading the weights takes the time, it took as long as before. So compiling is off unless asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from lazyllm.caches.lazy_cache import LayerView
from lazyllm.errors import UnsupportedModelError
from lazyllm.models.attention import AttentionCall, AttentionPlan, Captured, planned_attention
from lazyllm.models.families import DecoderContract
from lazyllm.models.names import CACHE


@dataclass(frozen=True)
class Packed:
    """What a layer is given for the packed tokens.

    Attributes:
        hidden: [1, t, c] their hidden states.
        positions: [1, t] their positions.
        rope: their RoPE, tensors with tokens along axis 1.
    """

    hidden: Tensor
    positions: Tensor
    rope: Any

    def at(self, place: slice) -> Packed:
        """The part at `place`."""
        if place == slice(0, self.hidden.shape[1]):
            return self
        return Packed(self.hidden[:, place], self.positions[:, place], _cut(self.rope, place))


def _cut(value: Any, place: slice) -> Any:
    return tuple(_cut(part, place) for part in value) if isinstance(value, tuple) else value[:, place]


RunLayer: TypeAlias = Callable[[nn.Module, Packed, AttentionPlan, LayerView, dict[str, Any]], Tensor]
"""Runs a layer over packed tokens: the layer, the tokens, how they attend, where their K/V go and those attended come
from, and what the caller of the model passed on to its layers; gives the layer's output [1, t, c]."""


def run_layer(
    layer: nn.Module, packed: Packed, plan: AttentionPlan, view: LayerView, options: dict[str, Any]
) -> Tensor:
    """The layer as it is."""
    output: Tensor = layer(
        packed.hidden,
        attention_mask=plan,
        position_ids=packed.positions,
        position_embeddings=packed.rope,
        **{CACHE: view},
        **options,
    )
    return output


@contextmanager
def noting_updates(contract: DecoderContract, layer: int, captured: Captured | None) -> Iterator[None]:
    """Notes what a layer's attention adds to its states, where that is asked for."""
    if captured is None or captured.updates is None:
        yield
        return
    updates, attention = captured.updates, contract.attention_of(layer)
    assert attention is not None, "scorers that set needs_update refuse other layers"
    hook = attention.register_forward_hook(lambda _, __, output: updates.append(output[0]))
    try:
        yield
    finally:
        hook.remove()


class CompiledLayers:
    """Layers compiled for steps of one token; longer steps, and those a scorer looks at, run them as they are.

    All layers of one build share a graph, and it holds for every length of the context: the cache and attention are one
    operation of it, `lazyllm::attend`, that runs as Python.

    Args:
        backend: of `torch.compile`.
    """

    def __init__(self, backend: str | Callable[..., Any] = "inductor") -> None:
        self._calls: WeakKeyDictionary[nn.Module, AttentionCall] = WeakKeyDictionary()
        self._compiled = torch.compile(_run_inside, fullgraph=True, dynamic=False, backend=backend)

    def __call__(
        self, layer: nn.Module, packed: Packed, plan: AttentionPlan, view: LayerView, options: dict[str, Any]
    ) -> Tensor:
        """Output [1, t, c] of a layer.

        Raises:
            UnsupportedModelError: when it cannot be compiled.
        """
        call = self._calls.get(layer)
        # What the graph hands over lies in memory that it uses again, so nobody may hold on to it: a scorer, or a store
        # that takes its first entries without a copy.
        if call is None or packed.hidden.shape[1] > 1 or plan.captured is not None or not view.copies:
            output = run_layer(layer, packed, plan, view, options)
            called = plan.calls[0]
            lasting = {name: option for name, option in called.options.items() if name != "position_ids"}
            self._calls[layer] = replace(called, options=lasting)
            return output
        running = _RUNNING.set(Attending(call, plan, view))
        try:
            return self._compiled(layer, packed.hidden, packed.positions, packed.rope, options)
        except TorchDynamoException as error:
            raise UnsupportedModelError(_why_not(layer, error)) from error
        finally:
            _RUNNING.reset(running)


def _why_not(layer: nn.Module, error: Exception) -> str:
    """Why a layer cannot be compiled, as far as that can be told, and what to do."""
    told = " ".join(str(error).split("\n")[:2])
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in layer.modules())
    advice = (
        ": it has forward hooks, such as transformers leaves on a model that was once asked for attention or hidden "
        "states; load the model anew, or leave compile off"
    )
    return f"{type(layer).__name__} cannot be compiled{advice if hooked else '; leave compile off'} (torch: {told})"


@dataclass(frozen=True)
class Attending:
    """What the running layer's attention needs besides queries, keys and values.

    Attributes:
        call: how the layer calls the attention function, noted when it ran as it is.
        plan: how the tokens attend.
        view: where their K/V go.
    """

    call: AttentionCall
    plan: AttentionPlan
    view: LayerView


_RUNNING: ContextVar[Attending] = ContextVar("running layer")


class _HandedThrough:
    """Stands in for the cache inside the graph."""

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return keys, values


_CACHE = _HandedThrough()


def _run_inside(layer: nn.Module, hidden: Tensor, positions: Tensor, rope: Any, options: dict[str, Any]) -> Any:
    """A layer whose attention is `lazyllm::attend`; this is what is compiled."""
    return layer(
        hidden,
        attention_mask=None,
        position_ids=positions,
        position_embeddings=rope,
        **{CACHE: _CACHE},
        **options,
    )


@torch.library.custom_op("lazyllm::attend", mutates_args=())
def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Stores key and value [1, g, t, d] of the running layer and attends: query [1, h, t, d] to [1, t, h, d]."""
    running = _RUNNING.get()
    keys, values = running.view.update(key, value)
    return planned_attention(running.call.module, query, keys, values, running.plan, **running.call.options)[0]


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
