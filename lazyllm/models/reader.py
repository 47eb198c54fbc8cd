"""A language model that reads a prompt for a scorer: dense, and beside the run that is scored."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lazyllm.caches.dense_cache import DenseCache
from lazyllm.caches.lazy_cache import LazyCache
from lazyllm.caches.step import Step
from lazyllm.errors import ConfigError, InputError, LazyLLMError
from lazyllm.models.attach import attached, check_model
from lazyllm.models.attention import Captured
from lazyllm.models.families import DecoderContract, input_device
from lazyllm.models.flops import causal_pairs, flop_model
from lazyllm.models.loading import load_model
from lazyllm.models.names import CACHE
from lazyllm.policies.base import LayerIndex
from lazyllm.policies.protect import Protect
from lazyllm.policies.schedules import Constant
from lazyllm.policies.scorers import Random
from lazyllm.policies.scoring import Readings
from lazyllm.policies.select import Selector

CHUNK = 512
"""Tokens whose logits are held at once."""


class Reader:
    """Reads prompts with a model, pruning nothing, in a cache of its own.

    It may be the very model that is running: its layers are lent to the reader for as long as it reads.

    Attributes:
        flops: operations done so far.

    Args:
        model: the model.
        tokenizer: its tokenizer; None where no text is read.
        contract: what is known about its layers.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, contract: DecoderContract
    ) -> None:
        self.model, self.tokenizer, self.contract = model, tokenizer, contract
        self.flops = 0

    def encode(self, text: str) -> Tensor:
        """Token ids [t] of a text, without special tokens.

        Raises:
            InputError: when there is no tokenizer.
        """
        if self.tokenizer is None:
            raise InputError(f"{text[:40]!r} is text, and the pipeline has no tokenizer; give token ids")
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)

    def attention(self, token_ids: Tensor, *, queries: int, layers: LayerIndex | None = None) -> list[Tensor]:
        """By layer, attention [h, q, t] of the last `queries` tokens over [t], of the first `layers` layers or all."""
        contract = self._shortened(layers)
        watcher = _Watcher(len(contract.layers), queries)
        with self._running(watcher, contract), torch.no_grad():
            # The decoder alone: logits of a model without its last layers would mean nothing.
            contract.decoder(input_ids=self._batch(token_ids), **{CACHE: LazyCache(DenseCache())})
        self._count(contract, 0, token_ids.numel())
        return watcher.noted[0]

    def look_ahead(self, token_ids: Tensor, *, tokens: int) -> list[Tensor]:
        """By layer, attention [h, q, t] over [t] of the last token and its greedy continuation, `tokens` in all."""
        watcher = _Watcher(len(self.contract.layers), 1)
        cache = LazyCache(DenseCache())
        step, seen = self._batch(token_ids), 0
        with self._running(watcher, self.contract), torch.no_grad():
            for _ in range(tokens):
                logits = self.model(step, **{CACHE: cache}, logits_to_keep=1).logits
                self._count(self.contract, seen, seen + step.shape[1])
                seen += step.shape[1]
                step = logits[:, -1:].argmax(-1)
        by_layer = zip(*watcher.noted, strict=True)
        return [torch.cat([part[..., : token_ids.numel()] for part in parts], dim=1) for parts in by_layer]

    def surprise(self, token_ids: Tensor) -> Tensor:
        """Self-information [t] of each token after those before it, in nats; 0 for the first."""
        ids, cache = self._batch(token_ids), LazyCache(DenseCache())
        parts = [torch.zeros(1)]
        with self._running(_Watcher(len(self.contract.layers), 0), self.contract), torch.no_grad():
            for start in range(0, ids.shape[1], CHUNK):
                logits = self.model(ids[:, start : start + CHUNK], **{CACHE: cache}).logits[0]
                told = ids[0, start + 1 : start + 1 + logits.shape[0]]
                losses = nn.functional.cross_entropy(logits[: told.numel()].float(), told, reduction="none")
                parts.append(losses.cpu())
        self._count(self.contract, 0, token_ids.numel())
        return torch.cat(parts)

    def _batch(self, token_ids: Tensor) -> Tensor:
        return token_ids[None].to(input_device(self.model))

    def _running(self, watcher: _Watcher, contract: DecoderContract) -> AbstractContextManager[object]:
        return attached(self.model, contract, watcher, missing="nan")

    def _shortened(self, layers: LayerIndex | None) -> DecoderContract:
        """The contract of the model's first layers."""
        contract = self.contract
        if layers is None:
            return contract
        has = len(contract.layers)
        most = max(1, int(layers * has + 1e-9)) if isinstance(layers, float) else layers
        if most > has:
            raise InputError(f"the scorer's model has {has} layers, of which {most} cannot run")
        return replace(
            contract,
            layers=nn.ModuleList(list(contract.layers)[:most]),
            windows=contract.windows[:most],
            rope_types=contract.rope_types[:most],
            devices=contract.devices[:most],
        )

    def _count(self, contract: DecoderContract, before: int, after: int) -> None:
        costs = flop_model(self.model, contract)
        pairs = [causal_pairs(after, window) - causal_pairs(before, window) for window in contract.windows]
        self.flops += costs.total([after - before] * len(pairs), pairs)


class _Watcher(Selector):
    """Keeps every token, and notes the attention of the last queries of each step.

    Attributes:
        noted: by step, by layer, attention [h, q, k].
    """

    def __init__(self, layers: int, queries: int) -> None:
        super().__init__(Random(), Constant(), Protect(), layers)
        self.queries = queries
        self.noted: list[list[Tensor]] = []

    def notes_of(self, step: Step, layer: int, visible: list[Tensor]) -> Captured | None:
        """Everything, if attention is to be noted."""
        return Captured() if self.queries else None

    def select(self, step: Step, layer: int, visible: list[Tensor], readings: Readings) -> list[Tensor]:
        """All of `visible`."""
        if layer < 0:
            self.noted.append([])
        for attention in readings.attention(0)[-1:]:
            self.noted[-1].append(attention.probabilities(self.queries))
        return visible


_OPEN: WeakValueDictionary[tuple[str, torch.dtype, str], Reader] = WeakValueDictionary()
"""Readers of models that were loaded for scorers, for as long as a pipeline holds them."""


def open_readers(
    names: Sequence[str | None],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    contract: DecoderContract,
) -> dict[str | None, Reader]:
    """Readers for the models a scorer names, in the dtype and on the device of the pipeline's own; None is that one.

    Raises:
        ConfigError: when a model cannot be loaded, cannot be run, or has another tokenizer.
    """
    return {
        name: Reader(model, tokenizer, contract) if name is None else _open(name, model, tokenizer) for name in names
    }


def _open(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Reader:
    key = (str(Path(name).resolve()) if Path(name).exists() else name, model.dtype, str(model.device))
    reader = _OPEN.get(key)
    if reader is None:
        try:
            draft, own = load_model(name, dtype=model.dtype)
            draft = draft.to(model.device)
            reader = Reader(draft, own, check_model(draft))
        except (LazyLLMError, OSError, ValueError, ImportError, KeyError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ConfigError(f"the scorer's model {name!r} cannot be used: {reason}") from None
        _OPEN[key] = reader
    _check_tokenizer(name, reader.tokenizer, tokenizer)
    return reader


def _check_tokenizer(
    name: str, draft: PreTrainedTokenizerBase | None, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    if draft is None or tokenizer is None:
        return
    theirs, ours = draft.get_vocab(), tokenizer.get_vocab()
    if theirs != ours:
        different = sum(ours.get(token) != number for token, number in theirs.items())
        raise ConfigError(
            f"the scorer's model {name!r} has another tokenizer: {different:,} of its {len(theirs):,} tokens have "
            "another number or none; it must read the same token ids as the model"
        )
