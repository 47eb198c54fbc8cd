"""What pruning costs, item by item: evidence that survives, loss of the right answer, and the answer itself."""

from __future__ import annotations

import copy
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from statistics import median
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from lazyllm.caches import LazyCache
from lazyllm.caches.row import PromptMarks
from lazyllm.callbacks import PrefillShare
from lazyllm.evaluation.fidelity import divergence, token_agreement, top1_agreement
from lazyllm.evaluation.metrics import rouge_l
from lazyllm.evaluation.tasks import Item
from lazyllm.generation.options import Options
from lazyllm.models.names import CACHE
from lazyllm.pipeline import LazyPipeline
from lazyllm.policies.query import AUTO_TOKENS
from lazyllm.prompts import EncodedPrompt, Prompt, tokens_touching

STOCK = "stock"
"""Name of the unmodified model, which everything is compared with."""


@dataclass(frozen=True)
class Verdict:
    """What a pipeline did with one item.

    Attributes:
        reference: the answer that was forced, in tokens.
        loss: mean negative log-likelihood per token of the reference.
        reply: token ids of the greedy answer, cut when it is right or at the end token.
        text: the greedy answer.
        score: how right it is by the item's metric, from 0 to 1; None for tasks that have no answers.
        ttft_seconds: the prefill's time.
        computed_fraction: layer-tokens the prefill computed, of all.
        recall: share of the evidence's tokens that have K/V at the last layer after the prefill; None where an item
            names no evidence, here and below for what was not noted.
        step_seconds: median time of the steps that force the reference.
        cache_bytes: K/V and waiting states at the end.
        divergence: mean KL in nats from the dense model's next-token distributions, along its own reply.
        top1: share of that reply's tokens for which both have the same most likely one.
        agreement: share of equal tokens in both greedy replies, up to the shorter one.
        rouge_l: of the text to the dense model's.
        follow_up_seconds: time from the second question to the first token behind it.
        follow_up_recall: as `recall`, after the second question.
        growth: by step and layer, the share of the context before the reply that has been computed; the first entry is
            before the reply's first step. Empty for the unmodified model.
    """

    reference: list[int]
    loss: float
    reply: list[int]
    text: str
    score: float | None
    ttft_seconds: float
    computed_fraction: float
    recall: float | None = None
    step_seconds: float | None = None
    cache_bytes: int | None = None
    divergence: float | None = None
    top1: float | None = None
    agreement: float | None = None
    rouge_l: float | None = None
    follow_up_seconds: float | None = None
    follow_up_recall: float | None = None
    growth: list[list[float]] = field(default_factory=list)

    @property
    def is_right(self) -> bool | None:
        """Whether the reply is wholly right; None for tasks that have no answers."""
        return None if self.score is None else self.score == 1


@dataclass(frozen=True)
class DenseRun:
    """What the unmodified model replies to an item: greedy tokens [n], the logits [n, vocabulary] before each, text."""

    reply: list[int]
    logits: Tensor
    text: str


def evidence_tokens(pipe: LazyPipeline, item: Item) -> Tensor:
    """The tokens [e] of an item's evidence."""
    return torch.cat([torch.arange(*span) for span in pipe.find(item.prompt, item.evidence)]).unique()


class Contender:
    """Something that can be judged: a pipeline, or the unmodified model."""

    def __init__(self, pipe: LazyPipeline, name: str, *, is_stock: bool = False) -> None:
        self.pipe, self.name, self.is_stock = pipe, name, is_stock

    @contextmanager
    def running(self, encoded: EncodedPrompt, loaded: int = 0) -> Iterator[tuple[Any, Any, PrefillShare]]:
        """The model as it runs, a cache for it, and a counter of what it computes.

        Of the prompt, a pipeline's cache has the first `loaded` tokens as a document that waits.
        """
        counter = PrefillShare()
        if self.is_stock:
            yield self.pipe.model, DynamicCache(config=self.pipe.model.config), counter
            return
        cache = _cache(self.pipe, encoded)
        if loaded:
            with self.pipe.loading(callbacks=[counter]) as (model, _):
                model(_ids(encoded, model)[:, :loaded], **{CACHE: cache}, logits_to_keep=1)
        with self.pipe.attached(callbacks=[counter]) as model:
            yield model, cache, counter


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
        return _said(model, cache, _forced(_first_logits(model, cache, encoded), tokens)).logits


@torch.no_grad()
def dense_run(stock: Contender, item: Item) -> DenseRun:
    """The reply that others are compared with, for `judge`; made once per item."""
    with _at_the_reply(stock, item) as start:
        reply = _said(start.model, start.cache, _greedy(start, item))
        return _dense_run(start.decode(reply.tokens), reply)


def judge(
    contender: Contender, item: Item, *, reference: Sequence[int] | None = None, dense: DenseRun | None = None
) -> Verdict:
    """Prefills once; then answers greedily and, from the same point, forces the reference and the dense reply.

    Args:
        contender: what is judged.
        item: on what.
        reference: token ids to force instead of the item's own reference, such as another run's reply; where there is
            neither, the contender's own reply.
        dense: the unmodified model's run of this item, to measure how near the contender stays to it.
    """
    return _judged(contender, item, reference, dense)[0]


def judge_and_run(stock: Contender, item: Item, *, reference: Sequence[int] | None = None) -> tuple[Verdict, DenseRun]:
    """As `judge`, with the greedy run too, which others are compared with: for the unmodified model."""
    verdict, reply = _judged(stock, item, reference, None)
    return verdict, _dense_run(verdict.text, reply)


@torch.no_grad()
def _judged(
    contender: Contender, item: Item, reference: Sequence[int] | None, dense: DenseRun | None
) -> tuple[Verdict, _Reply]:
    with _at_the_reply(contender, item) as start:
        wanted = list(reference) if reference is not None else _reference(start.tokenizer, item)
        reply, along = _greedy_and_along(start, item, dense)
        forced = _said(start.model, start.cache, _forced(start.logits, wanted or reply.tokens))
        held = _held_bytes(start.cache)
        text = start.decode(reply.tokens)
    verdict = Verdict(
        reference=wanted or reply.tokens,
        loss=forced.loss,
        reply=reply.tokens,
        text=text,
        score=item.score(text) if item.answers else None,
        ttft_seconds=start.ttft_seconds,
        computed_fraction=start.computed_fraction,
        recall=start.recall,
        step_seconds=forced.step_seconds,
        cache_bytes=held,
        follow_up_seconds=start.follow_up_seconds,
        follow_up_recall=start.follow_up_recall,
        growth=reply.growth,
    )
    return (verdict if dense is None or along is None else _beside(verdict, dense, along.logits)), reply


def _greedy_and_along(start: _Start, item: Item, dense: DenseRun | None) -> tuple[_Reply, _Forced | None]:
    """The greedy reply, and what came of forcing the dense one, which go on side by side; `start` stays as it is."""
    own = start.fork()
    if dense is None:
        return _said(own.model, own.cache, _greedy(own, item)), None
    other = start.fork()
    return tuple(
        _said_together(start.model, [own.cache, other.cache], [_greedy(own, item), _forced(start.logits, dense.reply)])
    )


def _dense_run(text: str, reply: _Reply) -> DenseRun:
    return DenseRun(reply.tokens, torch.stack(reply.logits).float().cpu(), text)


def _beside(verdict: Verdict, dense: DenseRun, logits: Tensor) -> Verdict:
    """The verdict with how near the run stays to the dense one, given its logits [n, vocabulary] along that reply."""
    return replace(
        verdict,
        divergence=divergence(dense.logits, logits),
        top1=top1_agreement(dense.logits, logits),
        agreement=token_agreement(verdict.reply, dense.reply),
        rouge_l=rouge_l(verdict.text, [dense.text]),
    )


@dataclass(frozen=True)
class _Start:
    """A run that has come to where the scored reply begins.

    Attributes:
        model, cache, tokenizer: as they run.
        logits: [vocabulary] before the reply's first token.
        ttft_seconds, computed_fraction, recall, follow_up_seconds, follow_up_recall: see `Verdict`.
    """

    model: Any
    cache: Any
    tokenizer: PreTrainedTokenizerBase
    logits: Tensor
    ttft_seconds: float
    computed_fraction: float
    recall: float | None
    follow_up_seconds: float | None = None
    follow_up_recall: float | None = None

    def fork(self) -> _Start:
        """The same point with a cache of its own."""
        return replace(self, cache=copy.deepcopy(self.cache))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a reply."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


@contextmanager
def _at_the_reply(contender: Contender, item: Item) -> Iterator[_Start]:
    """Prefills, goes on to the second turn or past what was said, and stops before the reply that is scored."""
    pipe, tokenizer = contender.pipe, cast(PreTrainedTokenizerBase, contender.pipe.tokenizer)
    started = time.perf_counter()
    encoded = pipe.encode(item.prompt)
    loaded = _before_the_question(pipe, item) if item.waits else 0
    encoded_at = time.perf_counter()
    with contender.running(encoded, loaded) as (model, cache, counter):
        started += (time.perf_counter() - encoded_at) if loaded else 0.0  # loading is not part of the answer
        logits = _first_logits(model, cache, encoded)
        int(logits.argmax())  # waits for the device
        ttft = time.perf_counter() - started
        start = _Start(model, cache, tokenizer, logits, ttft, counter.fraction, _recall(pipe, item, cache))
        if item.follow_up:
            start = _second_turn(contender, start, encoded, item)
        if item.said:
            said = tokenizer(item.said, add_special_tokens=False)["input_ids"]
            start = replace(start, logits=_say(model, cache, said))
        yield start


def _recall(pipe: LazyPipeline, item: Item, cache: Any) -> float | None:
    """Share of the evidence's tokens that have K/V at the last layer; the unmodified model has all."""
    if not item.evidence:
        return None
    if not isinstance(cache, LazyCache):
        return 1.0
    return float(torch.isin(evidence_tokens(pipe, item), cache.rows[0].stores[-1].tokens).double().mean())


def _held_bytes(cache: Any) -> int:
    """Bytes of K/V and of waiting states."""
    if isinstance(cache, LazyCache):
        return cache.kv_bytes + cache.aux_bytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _second_turn(contender: Contender, start: _Start, encoded: EncodedPrompt, item: Item) -> _Start:
    """Answers the first question, asks the second one on the same cache, and stops before its answer."""
    model, cache, tokenizer = start.model, start.cache, start.tokenizer
    ends = _ends(model, tokenizer)
    reply = _said(model, cache, _greedy(start, replace(item, answers=()))).tokens
    said = [token for token in reply if token not in ends]
    if not said:  # an empty first answer: say something, so that the turn has a text
        said = tokenizer("-", add_special_tokens=False)["input_ids"]
    asked_at = time.perf_counter()
    tail, (begin, end) = _turn(tokenizer, item)
    before = [*encoded.token_ids, *said]
    conversation, fed = [*before, *tail], cache.get_seq_length()
    if isinstance(cache, LazyCache):
        asked = (len(before) + begin, len(before) + end)
        cache.mark_prompts([PromptMarks(encoded.marks.protected, (asked,), asked=True)])
    new = torch.tensor([conversation[fed:]], device=model.device)
    logits = model(new, **{CACHE: cache}, logits_to_keep=1).logits[0, -1]
    int(logits.argmax())  # waits for the device
    seconds = time.perf_counter() - asked_at
    recall = _recall(contender.pipe, item, cache)
    return replace(start, logits=logits, follow_up_seconds=seconds, follow_up_recall=recall)


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


def _reference(tokenizer: PreTrainedTokenizerBase, item: Item) -> list[int]:
    return list(tokenizer(item.reference, add_special_tokens=False)["input_ids"])


def _before_the_question(pipe: LazyPipeline, item: Item) -> int:
    """How many tokens of a prompt stand before its question; all but the last ones where it asks nothing."""
    asked = pipe.encode(item.prompt, query="auto")
    return asked.marks.query[0][0] if asked.marks.query else max(0, len(asked.token_ids) - AUTO_TOKENS)


def _ids(encoded: EncodedPrompt, model: Any) -> Tensor:
    return torch.tensor([encoded.token_ids], device=model.device)


def _first_logits(model: Any, cache: Any, encoded: EncodedPrompt) -> Tensor:
    """Prefills what the cache does not hold; the logits [n] behind the prompt."""
    new = _ids(encoded, model)[:, cache.get_seq_length() :]
    return cast(Tensor, model(new, **{CACHE: cache}, logits_to_keep=1).logits[0, -1])


def _cache(pipe: LazyPipeline, encoded: EncodedPrompt) -> LazyCache:
    return pipe.new_cache(marks=[encoded.marks])


def _say(model: Any, cache: Any, tokens: Sequence[int]) -> Tensor:
    """Feeds tokens, each in a step of its own as in decoding; the logits [n] behind the last."""
    for token in tokens:
        logits = model(torch.tensor([[token]], device=model.device), **{CACHE: cache}).logits[0, -1]
    return cast(Tensor, logits)


Result = TypeVar("Result")
Saying: TypeAlias = Generator[int, Tensor, Result]
"""A reply in the making: it gives the token to say next, is sent the logits [vocabulary] behind it, and returns."""


def _said(model: Any, cache: Any, saying: Saying[Result]) -> Result:
    """What came of a reply."""
    return cast(Result, _said_together(model, [cache], [saying])[0])


def _said_together(model: Any, caches: Sequence[Any], sayings: Sequence[Saying[Any]]) -> list[Any]:
    """What came of several replies, each with a cache of its own; a step says a token of each."""
    next_tokens: dict[int, int] = {}
    results: dict[int, Any] = {}

    def go_on(index: int, logits: Tensor | None) -> None:
        try:
            next_tokens[index] = sayings[index].send(logits)  # type: ignore[arg-type]  # None begins
        except StopIteration as end:
            next_tokens.pop(index, None)
            results[index] = end.value

    for index in range(len(sayings)):
        go_on(index, None)
    while next_tokens:
        going = list(next_tokens)
        logits = _step(model, [caches[index] for index in going], [next_tokens[index] for index in going])
        for index, own in zip(going, logits, strict=True):
            go_on(index, own)
    return [results[index] for index in range(len(sayings))]


def _step(model: Any, caches: Sequence[Any], tokens: Sequence[int]) -> Tensor:
    """Feeds each cache its token; the logits [b, vocabulary] behind them."""
    if len(caches) == 1 or not all(isinstance(cache, LazyCache) for cache in caches):
        return torch.stack([_say(model, cache, [token]) for cache, token in zip(caches, tokens, strict=True)])
    ids = torch.tensor([[token] for token in tokens], device=model.device)
    positions = torch.tensor([[cache.get_seq_length()] for cache in caches], device=model.device)
    output = model(ids, position_ids=positions, **{CACHE: LazyCache.beside(caches)})
    return cast(Tensor, output.logits[:, -1])


@dataclass(frozen=True)
class _Forced:
    """What came of forcing tokens: their mean loss, the logits [vocabulary] before each, and times in between."""

    loss: float
    before: list[Tensor]
    seconds: list[float]

    @property
    def logits(self) -> Tensor:
        """All logits [n, vocabulary]."""
        return torch.stack(self.before)

    @property
    def step_seconds(self) -> float | None:
        """Median time of a step; None for a single token."""
        return median(self.seconds) if self.seconds else None


def _forced(logits: Tensor, tokens: Sequence[int]) -> Saying[_Forced]:
    """Says `tokens`, whatever the run would have said, given the logits [vocabulary] before the first."""
    total, before, clock = 0.0, [], []
    for token in tokens:
        total -= float(logits.float().log_softmax(-1)[token])
        clock.append(time.perf_counter())
        before.append(logits)
        if len(before) < len(tokens):
            logits = yield token
    return _Forced(total / len(tokens), before, [late - early for early, late in pairwise(clock)])


def _ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int | None]:
    """The tokens that end a reply."""
    return [*Options({}, model).end_token_ids, tokenizer.eos_token_id]


@dataclass(frozen=True)
class _Reply:
    """A greedy reply [n], the logits [vocabulary] before each token, and what of the context was computed by then."""

    tokens: list[int]
    logits: list[Tensor]
    growth: list[list[float]]


def _greedy(start: _Start, item: Item) -> Saying[_Reply]:
    """Says what is likeliest, until the reply is right or at an end token."""
    ends, logits, context = _ends(start.model, start.tokenizer), [start.logits], start.cache.get_seq_length()
    reply, growth = [int(start.logits.argmax())], [_computed_shares(start.cache, context)]
    while len(reply) < item.new_tokens and reply[-1] not in ends and not item.is_done(start.decode(reply)):
        logits.append((yield reply[-1]))
        reply.append(int(logits[-1].argmax()))
        growth.append(_computed_shares(start.cache, context))
    return _Reply(reply, logits, [shares for shares in growth if shares])


def _computed_shares(cache: Any, context: int) -> list[float]:
    """By layer, the share of the first `context` tokens that it has computed; empty for the unmodified model."""
    if not isinstance(cache, LazyCache):
        return []
    ledger = cache.rows[0].ledger
    finished = torch.bincount(ledger.depth[:context], minlength=ledger.layers + 1)
    deeper = finished.flip(0).cumsum(0).flip(0)[1:]  # [l] tokens of a depth above l
    return [round(share, 4) for share in (deeper / context).tolist()]
