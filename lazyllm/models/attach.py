"""Putting a LazyStack into a model and taking it out again, whatever happens in between."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from lazyllm.callbacks import Callback
from lazyllm.errors import AttachError
from lazyllm.models.attention import ATTENTION_NAME
from lazyllm.models.families import DecoderContract, contract_of, try_layers
from lazyllm.models.layers import RunLayer, run_layer
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
    hook = model.register_forward_pre_hook(_note_call(stack), with_kwargs=True)
    decoder = cast(Any, contract.decoder)
    before = decoder.layers
    with lazy_attention(contract):
        decoder.layers = nn.ModuleList([stack])
        try:
            yield stack
        finally:
            decoder.layers = before
            hook.remove()


def _note_call(stack: LazyStack) -> Any:
    """A forward pre-hook that tells the stack the token ids, and which logits the caller will read; 0 means all."""

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stack.token_ids = kwargs.get("input_ids", args[0] if args else None)
        stack.logits_to_keep = kwargs.get("logits_to_keep", 0)

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
        if self._owner == threading.get_ident():
            raise AttachError("this model is attached already; leave the other attached() or generate() first")

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
