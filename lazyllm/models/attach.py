"""Putting a LazyStack into a model and taking it out again, whatever happens in between."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PreTrainedModel

from lazyllm.caches.lazy_cache import LazyCache
from lazyllm.callbacks import Callback
from lazyllm.errors import AttachError, InputError
from lazyllm.models.attention import ATTENTION_NAME
from lazyllm.models.families import DecoderContract, contract_of, try_layers
from lazyllm.models.layers import RunLayer, run_layer
from lazyllm.models.masks import seen_by
from lazyllm.models.names import cache_in
from lazyllm.models.stack import LazyStack, Missing
from lazyllm.policies.depth_limit import DepthLimit
from lazyllm.policies.select import Selector


@contextmanager
def attached(
    model: PreTrainedModel,
    contract: DecoderContract,
    selector: Selector | DepthLimit,
    callbacks: Sequence[Callback] = (),
    *,
    missing: Missing = "error",
    chunk: int = sys.maxsize,
    run: RunLayer = run_layer,
) -> Iterator[LazyStack]:
    """The model with its layers run by a LazyStack; restored on the way out, also after an exception.

    `contract` is the one that `contract_of` reads off the model as it is now.
    """
    stack = LazyStack(contract, selector, callbacks, missing, chunk, run)
    stack.training = model.training  # of the stack alone: its layers stay as they are
    decoder = cast(Any, contract.decoder)
    hooks = [
        model.register_forward_pre_hook(_note_call(stack), with_kwargs=True),
        decoder.register_forward_pre_hook(_check_call(contract), with_kwargs=True),
        decoder.rotary_emb.register_forward_pre_hook(_note_places(stack), with_kwargs=True),
    ]
    before = decoder.layers
    with lazy_attention(contract):
        decoder.layers = nn.ModuleList([stack])
        try:
            yield stack
        finally:
            decoder.layers = before
            for hook in hooks:
                hook.remove()


def _note_call(stack: LazyStack) -> Any:
    """A forward pre-hook that tells the stack the token ids, and which logits the caller will read; 0 means all."""

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = _without_held(kwargs)
        stack.token_ids = kwargs.get("input_ids", args[0] if args else None)
        stack.logits_to_keep = kwargs.get("logits_to_keep", 0)
        return args, kwargs

    return note


def _without_held(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call without the columns its cache holds: assisted decoding begins with the whole sequence all the same."""
    cache, ids = cache_in(kwargs.get), kwargs.get("input_ids")
    if not isinstance(cache, LazyCache) or ids is None or not cache.repeats(ids.shape[1]):
        return kwargs
    parts = {name: kwargs[name] for name in ("input_ids", "position_ids") if kwargs.get(name) is not None}
    return {**kwargs, **{name: part[..., cache.columns :] for name, part in parts.items()}}


def _check_call(contract: DecoderContract) -> Any:
    """A forward pre-hook that refuses what the decoder would use between its layers, where there is one now."""

    def check(decoder: nn.Module, _: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [name for name in contract.extras if isinstance(kwargs.get(name), (Tensor, list, tuple))]
        if given:
            raise InputError(
                f"{type(decoder).__name__} was given {', '.join(given)}, which it uses between its layers; lazyllm "
                "prunes nothing there: give the prompt as text alone"
            )
        if isinstance(masks := kwargs.get("attention_mask"), Mapping):
            _check_masks(masks)

    return check


def _check_masks(masks: Mapping[str, Any]) -> None:
    """Refuses masks, by type of layer, that let tokens see different tokens behind them."""
    one, *others = (seen_by(mask).ahead for mask in masks.values())
    if not all(_same(one, other) for other in others):
        raise InputError(
            f"tokens of this prompt see other tokens behind them in some layers than in others ({', '.join(masks)}); "
            "lazyllm knows one rule for all layers: give the prompt as text alone"
        )


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else one.equal(other)


def _note_places(stack: LazyStack) -> Any:
    """A forward pre-hook that tells the stack where the decoder's RoPE sees the tokens, if along several axes."""

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        stack.places = positions if isinstance(positions, Tensor) and positions.ndim == 3 else None

    return note


@contextmanager
def lazy_attention(contract: DecoderContract) -> Iterator[None]:
    """Routes the decoder's attention through `planned_attention` for as long as the context lasts."""
    before = [config._attn_implementation for config in contract.configs]
    try:
        for config in contract.configs:
            config._attn_implementation_internal = ATTENTION_NAME
        yield
    finally:
        for config, kernel in zip(contract.configs, before, strict=True):
            config._attn_implementation_internal = kernel


def check_model(model: PreTrainedModel) -> DecoderContract:
    """Reads a model's contract and tries its layers with one token.

    Raises:
        UnsupportedModelError: when it does not follow the contract.
    """
    contract = contract_of(model)
    with lazy_attention(contract):
        try_layers(contract, type(model).__name__)
    return contract


class ModelTurn:
    """Whose turn it is with a model: one thread at a time runs it, others wait for theirs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None

    def refuse_own(self) -> None:
        """Raises where waiting would never end.

        Raises:
            AttachError: when it is this thread's turn already.
        """
        if self.is_own:
            raise AttachError("this model is attached already; leave the other attached() or generate() first")

    @property
    def is_own(self) -> bool:
        """Whether it is this thread's turn."""
        return self._owner == threading.get_ident()

    def __enter__(self) -> None:
        self.refuse_own()
        self._lock.acquire()
        self._owner = threading.get_ident()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._owner = None
        self._lock.release()


_TURNS: WeakKeyDictionary[PreTrainedModel, ModelTurn] = WeakKeyDictionary()


def turn_of(model: PreTrainedModel) -> ModelTurn:
    """The turns of a model, which all pipelines that run it share."""
    return _TURNS.setdefault(model, ModelTurn())
