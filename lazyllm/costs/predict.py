"""Time, memory and limits of a prompt, dense and pruned: a roofline over layers, from sizes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import sqrt
from typing import Any

import torch

from lazyllm.config import LazyConfig
from lazyllm.costs.device import Device
from lazyllm.costs.shape import Matrix, ModelShape
from lazyllm.errors import InputError
from lazyllm.models.flops import causal_pairs
from lazyllm.policies.base import Keep, Phase, Scorer, layer_number, tokens_of
from lazyllm.policies.query import query_tokens
from lazyllm.policies.schedules import FullBelow
from lazyllm.policies.select import Selector

MEASURED_KEPT = (0.48, 0.22)
"""Share of the context behind the second last and the last cut that adapts: `recommended` on HotpotQA prompts."""
LONGEST = 1 << 20
"""The longest prompt tried for break-even, in tokens."""
REPLY_TOKENS = 64
"""Length of reply over which the share of decode steps that select is taken."""
GATHER_PASSES = 4
"""Numbers moved at a cut per hidden value: gathered for the scorer, and for those that go on."""
MATCH_PASSES = 20
"""Numbers moved at a cut per pair of a token and a query token: softmax and pooling."""
SCORE_BYTES = 4
"""Scores are taken in float32."""


@dataclass(frozen=True)
class Seconds:
    """Where the time of one step goes.

    Attributes:
        linear: matrix products of the layers.
        attention: queries, keys and values.
        moving: norms, rotary embedding, activations, additions.
        head: one row of logits.
        scoring: ranking at the cuts.
        host: launching layers, where the device does not work meanwhile.
        links: between the devices of a group.
    """

    linear: float = 0.0
    attention: float = 0.0
    moving: float = 0.0
    head: float = 0.0
    scoring: float = 0.0
    host: float = 0.0
    links: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, part.name) for part in fields(self))

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))


@dataclass(frozen=True)
class Cost:
    """What one prompt and the decode steps after it cost.

    Attributes:
        prefill, decode: of the whole prompt, and of one step after it.
        flops: operations of the prefill, over all devices.
        kv_bytes: K/V of the prompt, over all devices.
        aux_bytes: frontier states, and states a scorer looks back on.
        device_bytes: what one device holds: weights, K/V, aux states, and the largest temporaries of the prefill.
        fits: whether its memory is large enough.
    """

    prefill: Seconds
    decode: Seconds
    flops: int
    kv_bytes: int
    aux_bytes: int
    device_bytes: float
    fits: bool

    @property
    def ttft_seconds(self) -> float:
        """Time to the first token."""
        return self.prefill.total

    @property
    def seconds_per_output_token(self) -> float:
        """Time per token after the first."""
        return self.decode.total


@dataclass(frozen=True)
class Prediction:
    """A prompt of one length on one device or group, dense and pruned.

    Attributes:
        device: its name.
        tokens: length of the prompt.
        parallel: devices that share every layer.
        entering: by layer, how many tokens enter it.
        kept: share of the context behind each cut that adapts, given or assumed.
        assumed: the layers whose share was assumed.
        dense, pruned: costs of the unmodified model and of the configuration.
        break_even_tokens: the shortest prompt whose first token comes sooner than from the unmodified model; None when
            there is none of up to 2**20 tokens.
        keep_limit: 1 over the mean share that enters, the most that linear layers alone can gain.
        layer_limit: layers over those that everything enters, the most that any share kept behind them can gain; None
            when there are none.
        notes: what was left out.
    """

    device: str
    tokens: int
    parallel: int
    entering: tuple[int, ...]
    kept: dict[int, float]
    assumed: tuple[int, ...]
    dense: Cost
    pruned: Cost
    break_even_tokens: int | None
    keep_limit: float
    layer_limit: float | None
    notes: tuple[str, ...]

    @property
    def speedup(self) -> float:
        """TTFT of the unmodified model over the pruned one's."""
        return self.dense.ttft_seconds / self.pruned.ttft_seconds

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the sums."""
        data = asdict(self)
        for name, cost in (("dense", self.dense), ("pruned", self.pruned)):
            data[name] |= {
                "ttft_seconds": cost.ttft_seconds,
                "seconds_per_output_token": cost.seconds_per_output_token,
            }
        return data | {"speedup": self.speedup}


@dataclass(frozen=True)
class Flow:
    """How many tokens go where in one step.

    Attributes:
        tokens: of the context.
        entering: by layer, tokens that enter.
        ranked: by cut that asks the scorer, tokens it ranks.
        remembered: states that the scorer keeps to look back on.
    """

    tokens: int
    entering: tuple[int, ...]
    ranked: dict[int, int]
    remembered: int


def predict(
    shape: ModelShape,
    config: LazyConfig,
    device: Device,
    *,
    tokens: int,
    parallel: int = 1,
    asked: bool = True,
    kept: Mapping[int, float] | None = None,
) -> Prediction:
    """What a prompt will cost.

    Args:
        shape: of the model.
        config: what to prune.
        device: each of the devices.
        tokens: length of the prompt.
        parallel: devices that share every layer (tensor parallelism).
        asked: whether the prompt asks a question.
        kept: by layer of a cut that adapts, the share of the context that goes on, protected tokens included;
            `MEASURED_KEPT` where it is not given.

    Raises:
        ConfigError: when the configuration does not fit the model.
        InputError: for a length, group or share that cannot be.
    """
    if tokens < 1:
        raise InputError(f"a prompt has at least 1 token, got {tokens}")
    _check_group(shape, device, parallel)
    model = _Model(shape, config, device, parallel, asked, _check_kept(kept or {}))
    flow = model.flow(tokens)
    shares = model.shares(tokens)
    whole = sum(count == tokens for count in flow.entering)
    return Prediction(
        device=device.name,
        tokens=tokens,
        parallel=parallel,
        entering=flow.entering,
        kept=shares,
        assumed=tuple(layer for layer in shares if layer not in model.kept),
        dense=model.dense(tokens),
        pruned=model.pruned(tokens),
        break_even_tokens=model.break_even(),
        keep_limit=shape.layers * tokens / sum(flow.entering),
        layer_limit=shape.layers / whole if whole else None,
        notes=model.notes(),
    )


def full_below_break_even(config: LazyConfig, prediction: Prediction) -> LazyConfig:
    """The configuration with prompts that are too short to pay run dense, as predicted for a model and a device.

    Raises:
        InputError: when no length pays.
    """
    least = prediction.break_even_tokens
    if least is None:
        raise InputError(f"pruning pays at no length on {prediction.device}; take the preset dense")
    return config.model_copy(update={"schedule": FullBelow.at_least(least, config.schedule)})


def entering_tokens(
    config: LazyConfig, layers: int, tokens: int, *, asked: bool = True, kept: Mapping[int, float] | None = None
) -> tuple[int, ...]:
    """By layer, how many tokens of a prompt enter it; the arguments are those of `predict`."""
    return _flow(
        _selector(config, layers), config, layers, Phase(True, tokens, asked), _check_kept(kept or {})
    ).entering


def _check_kept(kept: Mapping[int, float]) -> dict[int, float]:
    ordered = dict(sorted(kept.items()))
    before = 1.0
    for layer, share in ordered.items():
        if not 0 < share <= 1:
            raise InputError(f"the share kept at layer {layer} must be in (0, 1], got {share}")
        if share > before:
            raise InputError(
                f"the share kept rises from {before} to {share} at layer {layer}; "
                "a pruned token cannot come back within a step"
            )
        before = share
    return ordered


def _check_group(shape: ModelShape, device: Device, parallel: int) -> None:
    if parallel < 1 or not _divides(shape, parallel):
        allowed = [count for count in range(1, shape.kv_heads + 1) if _divides(shape, count)]
        raise InputError(
            f"{parallel} devices cannot share {shape.heads} query heads, {shape.kv_heads} key and value heads and an "
            f"MLP of {shape.intermediate} evenly; allowed: {', '.join(map(str, allowed))}"
        )
    if parallel > 1 and device.link_bytes_per_second is None:
        raise InputError(f"the device {device.name!r} has no link to others, so {parallel} of them cannot share layers")


def _divides(shape: ModelShape, count: int) -> bool:
    return not (shape.kv_heads % count or shape.heads % count or shape.intermediate % count)


def _selector(config: LazyConfig, layers: int) -> Selector:
    return Selector(config.scorer, config.schedule, config.protect, layers)


def _shares(cuts: Mapping[int, Keep], kept: Mapping[int, float]) -> dict[int, float]:
    """By cut that adapts, the share of the context that it is taken to keep: what was given, or measured.

    Raises:
        InputError: when a share is given for a layer where no cut adapts.
    """
    adapting = sorted(layer for layer, keep in cuts.items() if keep.adapts)
    if cuts and (strange := sorted(set(kept) - set(adapting))):
        where = f"cuts adapt before layers {', '.join(map(str, adapting))}" if adapting else "no cut adapts"
        raise InputError(f"a share is given for layer {strange[0]}, but {where}")
    measured = (MEASURED_KEPT[0],) * len(adapting) + MEASURED_KEPT[-1:]
    assumed = dict(zip(adapting, measured[-len(adapting) :], strict=True)) if adapting else {}
    return {layer: kept.get(layer, share) for layer, share in assumed.items()}


def _protected(config: LazyConfig, tokens: int, asked: bool, scorer: Scorer | None = None) -> int:
    """How many tokens of a prompt a scorer, by default the configuration's, never gets to judge; what only the text
    could tell is not counted.
    """
    everything = torch.arange(tokens)
    mask = config.protect.mask(everything, tokens, tokens, [], asked=asked)
    query = (scorer or config.scorer).reads_query
    if query is not None:
        mask[query_tokens("auto" if isinstance(query, str) else query, [], tokens, rolling=False)] = True
    return int(mask.sum())


def _flow(selector: Selector, config: LazyConfig, layers: int, phase: Phase, kept: Mapping[int, float]) -> Flow:
    """The selector's rule on counts: at a cut as many stay as may, but never fewer than are protected."""
    tokens = phase.context_tokens
    cuts = selector.cuts(phase) if config.cache.prunes else {}
    shares = _shares(cuts, kept)
    protected = _protected(config, tokens, phase.asked) if cuts else 0
    count, entering, ranked, remembered = tokens, [], {}, 0
    for layer in range(layers):
        if config.cache.prunes and config.scorer.needs_memory and layer in selector.cut_layers:
            remembered += count
        keep = cuts.get(layer)
        if keep is not None and count > protected and (keep.adapts or count > keep.limit(tokens)):
            ranked[layer] = count
            most = min(keep.limit(tokens), tokens_of(shares.get(layer, 1.0), tokens))
            count = min(count, max(protected, most))
        entering.append(count)
    return Flow(tokens, tuple(entering), ranked, remembered)


class _Model:
    """A model with a configuration on a group of devices; every method takes the length of the prompt."""

    def __init__(
        self,
        shape: ModelShape,
        config: LazyConfig,
        device: Device,
        parallel: int,
        asked: bool,
        kept: dict[int, float],
    ) -> None:
        self.shape, self.config, self.device, self.parallel = shape, config, device, parallel
        self.asked, self.kept = asked, kept
        self.selector = _selector(config, shape.layers)

    def flow(self, tokens: int, *, is_prefill: bool = True) -> Flow:
        """Where the tokens of a step over the whole context go."""
        phase = Phase(is_prefill, tokens, self.asked)
        return _flow(self.selector, self.config, self.shape.layers, phase, self.kept)

    def cuts(self, tokens: int) -> dict[int, Keep]:
        """The cuts of a prefill."""
        return self.selector.cuts(Phase(True, tokens, self.asked)) if self.config.cache.prunes else {}

    def shares(self, tokens: int) -> dict[int, float]:
        """The share of the context behind each cut of a prefill that adapts."""
        return _shares(self.cuts(tokens), self.kept)

    def dense(self, tokens: int) -> Cost:
        """Of the unmodified model; a window bounds what it keeps, computes and reads at a layer."""
        held = [min(tokens, self.shape.window(layer) or tokens) for layer in range(self.shape.layers)]
        prefill = self._prefill([tokens] * self.shape.layers)
        return self._cost([tokens] * self.shape.layers, held, 0, prefill, self._step(1, held), 0.0)

    def pruned(self, tokens: int) -> Cost:
        """Of the configuration; its cache keeps and reads all tokens computed at a layer, whatever the window."""
        flow = self.flow(tokens)
        prefill = self._prefill(flow.entering) + self._pruning(flow)
        scorer, hidden = self.config.scorer, self.shape.hidden
        states = self._waiting(flow) + self._origins(flow)
        aux = (states * hidden + flow.remembered * scorer.remembered_values(hidden)) * self.device.value_bytes
        scratch = max(flow.ranked.values(), default=0) * 3 * SCORE_BYTES * scorer.remembered_values(hidden)
        return self._cost(flow.entering, self._held(flow), aux, prefill, self._decode(tokens, flow), scratch)

    def _held(self, flow: Flow) -> list[int]:
        """By layer, how many tokens have K/V after a prefill: those that entered it, up to the cache's budget."""
        cache, held = self.config.cache, list(flow.entering)
        if cache.eviction is not None:
            protected = _protected(self.config, flow.tokens, self.asked, cache.eviction.scorer)
            most = max(cache.eviction.most_tokens(flow.tokens), protected)
            held = [min(count, most) for count in held]
        if cache.retreat is not None:
            first = layer_number(cache.retreat.layer, len(held), owner=cache)
            held[first:] = [min(count, cache.retreat.most_tokens) for count in held[first:]]
        return held

    def _origins(self, flow: Flow) -> int:
        """States kept of tokens that may be sent back to an early layer."""
        retreat = self.config.cache.retreat
        if retreat is None:
            return 0
        return flow.entering[layer_number(retreat.layer, len(flow.entering), owner=self.config.cache) - 1]

    def pays(self, tokens: int) -> bool:
        """Whether the first token comes sooner than from the unmodified model."""
        flow = self.flow(tokens)
        if not flow.ranked:
            return False
        pruned = self._prefill(flow.entering) + self._pruning(flow)
        return pruned.total < self._prefill([tokens] * self.shape.layers).total

    def break_even(self) -> int | None:
        """The shortest prompt that pays, by bisection: from there on, longer ones do."""
        low, high = 0, LONGEST
        if not self.pays(high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.pays(middle) else (middle, high)
        return high

    def notes(self) -> tuple[str, ...]:
        """What the numbers leave out."""
        cache, notes = self.config.cache, []
        if cache.prunes and cache.most_revived is None and self._selecting_share():
            notes.append("tokens that decode steps revive are not counted: this cache does not bound them")
        if self.config.scorer.reads_models:
            notes.append("the work of the language model that reads the prompt for the scorer is not counted")
        return tuple(notes)

    def _cost(
        self,
        entering: tuple[int, ...] | list[int],
        held: tuple[int, ...] | list[int],
        aux_bytes: int,
        prefill: Seconds,
        decode: Seconds,
        scratch_bytes: float,
    ) -> Cost:
        shape, size, group = self.shape, self.device.value_bytes, self.parallel
        kv_bytes = sum(held) * shape.key_values * size
        per_token = 2 * shape.hidden + 3 * shape.intermediate * shape.active_experts / group
        temporaries = max(max(entering) * per_token * size, scratch_bytes)
        device_bytes = (shape.weights * size + kv_bytes) / group + aux_bytes + temporaries
        return Cost(
            prefill=prefill,
            decode=decode,
            flops=shape.costs.total(entering, self._pairs(entering)) + shape.costs.per_logits,
            kv_bytes=kv_bytes,
            aux_bytes=aux_bytes,
            device_bytes=device_bytes,
            fits=device_bytes <= self.device.memory_bytes,
        )

    def _pairs(self, entering: tuple[int, ...] | list[int]) -> list[int]:
        return [causal_pairs(count, self.shape.window(layer)) for layer, count in enumerate(entering)]

    def _prefill(self, entering: tuple[int, ...] | list[int]) -> Seconds:
        parts = zip(entering, self._pairs(entering), strict=True)
        return sum((self._layer(count, pairs, count) for count, pairs in parts), self._ends())

    def _step(self, tokens: float, held: tuple[int, ...] | list[int]) -> Seconds:
        """A decode step that computes `tokens`, each of which attends to what a layer holds."""
        return sum((self._layer(tokens, tokens * count, count) for count in held), self._ends())

    def _decode(self, tokens: int, flow: Flow) -> Seconds:
        """Some steps select anew; its cost is spread over all."""
        share = self._selecting_share()
        step = self._step(1 + share * (self.config.cache.most_revived or 0), self._held(flow))
        ranked = self.flow(tokens, is_prefill=False).ranked.values() if share else ()
        return step + Seconds(scoring=share * sum(map(self._ranking, ranked)))

    def _selecting_share(self) -> float:
        cache = self.config.cache
        if not cache.prunes:
            return 0.0
        return sum(cache.selects_in_decode(number) for number in range(1, REPLY_TOKENS + 1)) / REPLY_TOKENS

    def _layer(self, tokens: float, pairs: float, attended: float) -> Seconds:
        shape, device, group = self.shape, self.device, self.parallel
        size = device.value_bytes
        linear = sum(self._product(matrix, tokens) for matrix in shape.matrices)
        operations = 4 * shape.heads * shape.head_dim * pairs / device.attention.at(tokens, shape.head_dim)
        reading = attended * shape.key_values * size / device.bytes_per_second
        moved = tokens * size * (shape.moved_whole + shape.moved_split / group)
        attention = max(operations, reading) / group
        moving = moved / device.moving.at(tokens, shape.moved_whole + shape.moved_split)
        work = linear + attention + moving
        host = max(0.0, device.layer_seconds - work) if device.overlaps else device.layer_seconds
        return Seconds(linear, attention, moving, host=host, links=2 * self._all_reduce(tokens))

    def _product(self, matrix: Matrix, tokens: float) -> float:
        """Seconds of one weight: its operations or reading it, whichever takes longer."""
        group = self.parallel
        copies = min(matrix.copies, tokens * matrix.visited)
        width = sqrt(matrix.inputs * matrix.outputs / group)
        rows = tokens * matrix.visited / copies
        operations = 2 * matrix.active * tokens / self.device.linear.at(rows, width)
        reading = matrix.inputs * matrix.outputs * copies * self.device.value_bytes / self.device.bytes_per_second
        return max(operations, reading) / group

    def _all_reduce(self, tokens: float) -> float:
        """Seconds of summing hidden states over the group in a ring."""
        group, device = self.parallel, self.device
        if group == 1 or device.link_bytes_per_second is None:
            return 0.0
        sent = 2 * (group - 1) / group * tokens * self.shape.hidden * device.value_bytes
        return sent / device.link_bytes_per_second + device.link_seconds

    def _ends(self) -> Seconds:
        """Logits of one row, and what the host does once per step."""
        head = Matrix(self.shape.hidden, self.shape.vocabulary)
        return Seconds(head=self._product(head, 1), host=self.device.step_seconds)

    def _waiting(self, flow: Flow) -> int:
        """Tokens whose frontier state is kept after a prefill."""
        return flow.tokens - self._held(flow)[-1] if self.config.cache.revives else 0

    def _pruning(self, flow: Flow) -> Seconds:
        """Ranking at every cut, and parking what does not go on."""
        parking = self._waiting(flow) * self.device.parked_token_seconds
        return Seconds(scoring=sum(map(self._ranking, flow.ranked.values())) + parking)

    def _ranking(self, tokens: int) -> float:
        """Seconds of one cut: comparing `tokens` with the query, moving their states, ordering the scores."""
        shape, device, queries = self.shape, self.device, self.config.scorer.compares
        remembered = self.config.scorer.remembered_values(shape.hidden)
        width = remembered or shape.heads * shape.head_dim
        operations = 2 * queries * tokens * width / device.linear.at(tokens, sqrt(max(1, queries) * width))
        moved = tokens * (GATHER_PASSES * shape.hidden + MATCH_PASSES * queries) * SCORE_BYTES
        standardised = tokens * remembered * SCORE_BYTES
        host = device.cut_seconds + tokens * device.ranked_token_seconds
        moving = moved / device.moving.at(tokens, shape.hidden) + standardised / device.standardising
        return operations + moving + host
