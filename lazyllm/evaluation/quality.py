"""What pruning costs, item by item: evidence that survives, loss of the right answer, and the answer itself."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from lazyllm.caches import LazyCache
from lazyllm.caches.row import PromptMarks
from lazyllm.callbacks import Callback, LayerEnd
from lazyllm.errors import InputError
from lazyllm.evaluation.tasks import Item
from lazyllm.pipeline import LazyPipeline
from lazyllm.prompts import EncodedPrompt, Prompt, end_token_ids, tokens_touching

STOCK = "stock"
"""Name of the unmodified model, which everything is compared with."""


@dataclass(frozen=True)
class Recall:
    """How much of an item's evidence is left at a layer.

    Attributes:
        layer: which layer it is that the tokens enter.
        evidence: share of the evidence's tokens that enter it.
        kept: share of all tokens that enter it.
    """

    layer: int
    evidence: float
    kept: float


@dataclass(frozen=True)
class Verdict:
    """What a pipeline did with one item.

    Attributes:
        reference: the answer that was forced, in tokens.
        loss: mean negative log-likelihood per token of the reference.
        reply: token ids of the greedy answer, cut when it is right or at the end token.
        text: the greedy answer.
        is_right: whether it holds an accepted answer, None for tasks that have none.
        ttft_seconds: the prefill's time.
        computed_fraction: layer-tokens the prefill computed, of all.
        recall: share of the evidence's tokens that have K/V at the last layer after the prefill; None where an item
            names no evidence, here and below for what was not noted.
        step_seconds: median time of the steps that force the reference.
        cache_bytes: K/V and waiting states at the end.
    """

    reference: list[int]
    loss: float
    reply: list[int]
    text: str
    is_right: bool | None
    ttft_seconds: float
    computed_fraction: float
    recall: float | None = None
    step_seconds: float | None = None
    cache_bytes: int | None = None


class _Stop(Exception):
    """Ends a prefill once enough layers have run."""


class _VisibleAt(Callback):
    """Notes who enters a layer and ends the run there."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.visible: Tensor | None = None

    def on_layer_end(self, event: LayerEnd) -> None:
        """Stops at the layer."""
        if event.layer == self.layer:
            self.visible = event.rows[0].visible
            raise _Stop


def evidence_recall(pipe: LazyPipeline, item: Item, layer: int) -> Recall:
    """Runs a prefill up to `layer` and looks which of the evidence's tokens are still there.

    Raises:
        InputError: when the item names no evidence.
    """
    if not item.evidence:
        raise InputError(f"an item of task {item.task!r} names no evidence")
    encoded = pipe.encode(item.prompt)
    wanted = _evidence(pipe, item)
    spy = _VisibleAt(layer)
    try:
        with torch.no_grad(), pipe.attached(callbacks=[spy]) as model:
            model(_ids(encoded, model), past_key_values=_cache(pipe, encoded), logits_to_keep=1)
    except _Stop:
        pass
    assert spy.visible is not None
    there = torch.isin(wanted, spy.visible).double().mean()
    return Recall(layer, float(there), spy.visible.numel() / len(encoded.token_ids))


def _evidence(pipe: LazyPipeline, item: Item) -> Tensor:
    """The tokens [e] of an item's evidence."""
    return torch.cat([torch.arange(*span) for span in pipe.find(item.prompt, item.evidence)]).unique()


class Contender:
    """Something that can be judged: a pipeline, or the unmodified model."""

    def __init__(self, pipe: LazyPipeline, name: str, *, is_stock: bool = False) -> None:
        self.pipe, self.name, self.is_stock = pipe, name, is_stock

    @contextmanager
    def running(self, encoded: EncodedPrompt) -> Iterator[tuple[Any, Any, _Computed]]:
        """The model as it runs, an empty cache for it, and a counter of what it computes."""
        counter = _Computed()
        if self.is_stock:
            yield self.pipe.model, DynamicCache(config=self.pipe.model.config), counter
            return
        with self.pipe.attached(callbacks=[counter]) as model:
            yield model, _cache(self.pipe, encoded), counter


@torch.no_grad()
def greedy_reply(contender: Contender, prompt: Prompt, new_tokens: int) -> tuple[list[int], Tensor]:
    """A greedy reply [n] of up to `new_tokens` tokens, an end token included, and the logits [n, vocabulary] before."""
    encoded = contender.pipe.encode(prompt)
    with contender.running(encoded) as (model, cache, _):
        ends = _ends(model, cast(PreTrainedTokenizerBase, contender.pipe.tokenizer))
        logits = [_first_logits(model, cache, encoded)]
        reply = [int(logits[0].argmax())]
        while len(reply) < new_tokens and reply[-1] not in ends:
            logits.append(_say(model, cache, reply[-1:]))
            reply.append(int(logits[-1].argmax()))
    return reply, torch.stack(logits)


@torch.no_grad()
def forced_logits(contender: Contender, prompt: Prompt, tokens: Sequence[int]) -> Tensor:
    """The logits [n, vocabulary] before each of `tokens` [n], which follow the prompt whatever the contender says."""
    encoded = contender.pipe.encode(prompt)
    with contender.running(encoded) as (model, cache, _):
        return torch.stack(list(_forced(model, cache, _first_logits(model, cache, encoded), tokens)))


@torch.no_grad()
def judge(contender: Contender, item: Item, *, reference: Sequence[int] | None = None) -> Verdict:
    """Prefills once; then answers greedily and, from the same point, forces the reference answer.

    Args:
        contender: what is judged.
        item: on what.
        reference: token ids to force instead of the item's own reference, such as another run's reply; where there is
            neither, the contender's own reply.
    """
    tokenizer = cast(PreTrainedTokenizerBase, contender.pipe.tokenizer)
    forced = list(reference) if reference is not None else _reference(tokenizer, item)
    started = time.perf_counter()
    encoded = contender.pipe.encode(item.prompt)
    with contender.running(encoded) as (model, cache, counter):
        logits = _first_logits(model, cache, encoded)
        first = int(logits.argmax())
        ttft = time.perf_counter() - started
        recall = _recall(contender.pipe, item, cache)
        if item.follow_up:
            logits, first = _second_turn(contender, model, cache, encoded, first, item)
        if item.said:
            logits = _say(model, cache, tokenizer(item.said, add_special_tokens=False)["input_ids"])
            first = int(logits.argmax())
        reply = _greedy(model, copy.deepcopy(cache), first, tokenizer, item)
        forced = forced or reply
        clock: list[float] = []
        loss = _forced_loss(model, cache, logits, forced, clock)
        held = _held_bytes(cache)
    text = str(tokenizer.decode(reply, skip_special_tokens=True)).strip()
    right = item.is_right(text) if item.answers else None
    step_seconds = median(after - before for before, after in pairwise(clock)) if len(clock) > 1 else None
    share = counter.share(len(encoded.token_ids))
    return Verdict(forced, loss, reply, text, right, ttft, share, recall, step_seconds, held)


def _recall(pipe: LazyPipeline, item: Item, cache: Any) -> float | None:
    """Share of the evidence's tokens that have K/V at the last layer; the unmodified model has all."""
    if not item.evidence:
        return None
    if not isinstance(cache, LazyCache):
        return 1.0
    return float(torch.isin(_evidence(pipe, item), cache.rows[0].stores[-1].tokens).double().mean())


def _held_bytes(cache: Any) -> int:
    """Bytes of K/V and of waiting states."""
    if isinstance(cache, LazyCache):
        return cache.kv_bytes + cache.aux_bytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _second_turn(
    contender: Contender, model: Any, cache: Any, encoded: EncodedPrompt, first: int, item: Item
) -> tuple[Tensor, int]:
    """Answers the first question, asks the second one on the same cache, and returns what comes after it."""
    tokenizer = cast(PreTrainedTokenizerBase, contender.pipe.tokenizer)
    ends = _ends(model, tokenizer)
    reply = _greedy(model, cache, first, tokenizer, replace(item, answers=()))
    said = [token for token in reply if token not in ends]
    if not said:  # an empty first answer: say something, so that the turn has a text
        said = tokenizer("-", add_special_tokens=False)["input_ids"]
    tail, (start, stop) = _turn(tokenizer, item)
    before = [*encoded.token_ids, *said]
    conversation, fed = [*before, *tail], cache.get_seq_length()
    if isinstance(cache, LazyCache):
        asked = (len(before) + start, len(before) + stop)
        cache.mark_prompts([PromptMarks(encoded.marks.protected, (asked,), asked=True)])
    new = torch.tensor([conversation[fed:]], device=model.device)
    logits = model(new, past_key_values=cache, logits_to_keep=1).logits[0, -1]
    return logits, int(logits.argmax())


def _turn(tokenizer: PreTrainedTokenizerBase, item: Item) -> tuple[list[int], tuple[int, int]]:
    """What the template puts behind one reply to ask the second question, and where in it the question stands."""
    mark = "REPLY"
    if tokenizer.chat_template is None:
        text = f"{mark}\n\nQuestion: {item.follow_up}\nAnswer:"
    else:
        turns = [{"role": "user", "content": "-"}, {"role": "assistant", "content": mark}]
        turns.append({"role": "user", "content": item.follow_up})
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    tail = text.rpartition(mark)[2]
    encoded = tokenizer(tail, add_special_tokens=False, return_offsets_mapping=True)
    left = tail.index(item.follow_up)
    asked = tokens_touching((left, left + len(item.follow_up)), encoded["offset_mapping"])
    assert asked is not None, "a question has tokens"
    return list(encoded["input_ids"]), asked


class _Computed(Callback):
    """Counts the layer-tokens of the first step."""

    def __init__(self) -> None:
        self.tokens = self.layers = 0

    def on_layer_end(self, event: LayerEnd) -> None:
        """Counts one layer."""
        if event.is_prefill:
            self.layers = event.layers
            self.tokens += sum(row.computed.numel() for row in event.rows)

    def share(self, tokens: int) -> float:
        """Of all layer-tokens of a prompt; 1 when nothing was counted, as for the unmodified model."""
        return self.tokens / (self.layers * tokens) if self.layers else 1.0


def _reference(tokenizer: PreTrainedTokenizerBase, item: Item) -> list[int]:
    return list(tokenizer(item.reference, add_special_tokens=False)["input_ids"])


def _ids(encoded: EncodedPrompt, model: Any) -> Tensor:
    return torch.tensor([encoded.token_ids], device=model.device)


def _first_logits(model: Any, cache: Any, encoded: EncodedPrompt) -> Tensor:
    """Prefills; the logits [n] behind the prompt."""
    return cast(Tensor, model(_ids(encoded, model), past_key_values=cache, logits_to_keep=1).logits[0, -1])


def _cache(pipe: LazyPipeline, encoded: EncodedPrompt) -> LazyCache:
    return pipe.new_cache(marks=[encoded.marks])


def _say(model: Any, cache: Any, tokens: Sequence[int]) -> Tensor:
    """Feeds tokens, each in a step of its own as in decoding; the logits [n] behind the last."""
    for token in tokens:
        logits = model(torch.tensor([[token]], device=model.device), past_key_values=cache).logits[0, -1]
    return cast(Tensor, logits)


def _forced(model: Any, cache: Any, logits: Tensor, tokens: Sequence[int]) -> Iterator[Tensor]:
    """The logits [n] before each of `tokens`, given those before the first."""
    for token in tokens[:-1]:
        yield logits
        logits = _say(model, cache, [token])
    yield logits


def _forced_loss(
    model: Any, cache: Any, logits: Tensor, tokens: Sequence[int], clock: list[float] | None = None
) -> float:
    """Mean negative log-likelihood of the tokens; `clock` gets the time at which each was judged."""
    total = 0.0
    for token, before in zip(tokens, _forced(model, cache, logits, tokens), strict=True):
        total -= float(before.float().log_softmax(-1)[token])
        if clock is not None:
            clock.append(time.perf_counter())
    return total / len(tokens)


def _ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int | None]:
    """The tokens that end a reply."""
    return [*end_token_ids(model, {}), tokenizer.eos_token_id]


def _greedy(model: Any, cache: Any, first: int, tokenizer: PreTrainedTokenizerBase, item: Item) -> list[int]:
    ends = _ends(model, tokenizer)
    reply = [first]
    while len(reply) < item.new_tokens and reply[-1] not in ends:
        if item.answers and item.is_right(str(tokenizer.decode(reply, skip_special_tokens=True))):
            break
        reply.append(int(_say(model, cache, reply[-1:]).argmax()))
    return reply
