"""Running scripts of steps, and Hypothesis strategies for them."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from lazyllm import (
    AccumulatedAttention,
    AttentionMass,
    AuxCache,
    Blockwise,
    BudgetCache,
    ByQuestion,
    CachePolicy,
    Combined,
    Cosine,
    DropCache,
    EvictingCache,
    FullBelow,
    Funnel,
    LastTokenAttention,
    LateInteraction,
    LazyCache,
    LazyPipeline,
    LexicalOverlap,
    OffloadedAux,
    PerPhase,
    Pooled,
    Power,
    Protect,
    Pyramid,
    QuantizedAux,
    QuantizedKV,
    Random,
    Schedule,
    ScoreContext,
    ScoreGap,
    Scorer,
    SinkRecent,
    Stages,
    TokenBudget,
    TokenTrace,
    TwoHop,
    WindowAttention,
)
from lazyllm.callbacks import LayerEnd
from tests.tiny import LAYERS, VOCABULARY


@dataclass
class History:
    """A cache that has been through some steps, with everything needed to replay it.

    `ids[r]` are the real tokens of row r; `logits[s]` [b, t, vocabulary] is what step s returned, and
    `tokens[s][r]` says which tokens of the row its columns held (-1 = padding).
    """

    pipe: LazyPipeline
    cache: LazyCache
    trace: TokenTrace = field(default_factory=TokenTrace)
    ids: list[list[int]] = field(default_factory=list)
    columns: Tensor | None = None
    mask: Tensor | None = None
    logits: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)

    def step(self, ids: Tensor, real: Tensor | None = None) -> Tensor:
        """Runs ids [b, t]; `real` [b, t] marks real tokens. Missing logits are NaN."""
        real = torch.ones_like(ids) if real is None else real
        if not self.ids:
            self.ids = [[] for _ in range(ids.shape[0])]
        self.mask = real if self.mask is None else torch.cat([self.mask, real], dim=1)
        held = torch.full(ids.shape, -1)
        for row in range(ids.shape[0]):
            chosen = real[row].bool()
            held[row, chosen] = torch.arange(len(self.ids[row]), len(self.ids[row]) + int(chosen.sum()))
            self.ids[row] += ids[row, chosen].tolist()
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.no_grad(), self.pipe.attached(callbacks=[self.trace], missing="nan") as model:
            logits = model(ids, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache).logits
        self.logits.append(logits)
        self.tokens.append(held)
        return logits

    def fork(self) -> "History":
        """A fork of the cache, with the same past."""
        twin = History(self.pipe, self.cache.fork(), ids=[list(ids) for ids in self.ids], mask=self.mask)
        twin.trace.steps = [list(step) for step in self.steps]
        twin.logits, twin.tokens = list(self.logits), list(self.tokens)
        return twin

    @property
    def steps(self) -> list[list[LayerEnd]]:
        """What every layer of every step did."""
        return self.trace.steps


def new_history(model: PreTrainedModel, **policies) -> History:
    """An empty history of a pipeline with these policies."""
    pipe = LazyPipeline(model, **policies)
    return History(pipe, pipe.new_cache())


class Moving(Scorer):
    """Prefers other tokens at every layer and context length, so that every step revives some, and looks back."""

    needs_memory: ClassVar[bool] = True

    def score(self, context: ScoreContext) -> Tensor:
        moving = (context.tokens * 7 + context.layer * 5) * context.context_tokens % 23
        return moving + context.states_of(context.tokens).sum(-1).tanh()


def batches(rows: int, max_length: int = 12):
    """Strategies for (ids, real) of one step, padded left, right or in both."""

    @st.composite
    def build(draw):
        width = draw(st.integers(1, max_length))
        ids = torch.tensor(
            [[draw(st.integers(3, VOCABULARY - 1)) for _ in range(width)] for _ in range(rows)], dtype=torch.long
        )
        real = torch.ones_like(ids)
        for row in range(rows):
            left = draw(st.integers(0, width - 1))
            right = draw(st.integers(0, width - 1 - left))
            real[row, :left] = 0
            real[row, width - right :] = 0
        return ids, real

    return build()


_WINDOWS = st.builds(
    WindowAttention, window=st.integers(1, 6), heads=st.sampled_from(["mean", "max"]), pool=st.sampled_from([1, 3])
)
_POOLS = st.sampled_from([1, 3, 5])
_QUERY_READERS = st.one_of(
    st.builds(LateInteraction, query=st.integers(1, 4), pool=_POOLS, temperature=st.sampled_from([0.5, 1.0])),
    st.builds(LexicalOverlap, query=st.integers(1, 4), pool=_POOLS),
)
_SIMPLE = st.one_of(
    st.just(LastTokenAttention()),
    _WINDOWS,
    st.builds(Random, seed=st.integers(0, 99)),
    st.builds(SinkRecent, sinks=st.integers(0, 3)),
    _QUERY_READERS,
)
_JOINS = st.sampled_from(["max", "mean"])
SCORERS: st.SearchStrategy[Scorer] = st.one_of(
    _SIMPLE,
    _QUERY_READERS,
    st.builds(TwoHop, scorer=_QUERY_READERS, tokens=st.integers(1, 4), weight=st.sampled_from([0.25, 1.0])),
    st.builds(Pooled, scorer=_SIMPLE, width=_POOLS, by=_JOINS),
    st.builds(Blockwise, scorer=_SIMPLE, size=st.integers(1, 5), by=_JOINS),
    st.lists(st.tuples(_SIMPLE, st.sampled_from([0.5, 1.0, 2.0])), min_size=1, max_size=2).map(Combined),
)
PROTECT = st.builds(Protect, sinks=st.integers(0, 3), recent=st.integers(0, 4), generated=st.booleans())
_AUX_FIELDS = {
    "decode": st.sampled_from(["select", "select", "reuse"]),
    "attend": st.sampled_from(["visible", "cached"]),
    "max_revived": st.sampled_from([None, None, 0, 1, 3]),
    "revive_every": st.sampled_from([1, 1, 2]),
}
AUX_CACHES: st.SearchStrategy[CachePolicy] = st.one_of(
    st.builds(AuxCache, **_AUX_FIELDS),
    st.builds(OffloadedAux, where=st.sampled_from(["cpu", "disk"]), **_AUX_FIELDS),
)
ROUNDING_CACHES: st.SearchStrategy[CachePolicy] = st.one_of(
    st.builds(QuantizedAux, bits=st.sampled_from([8, 4]), **_AUX_FIELDS),
    st.builds(QuantizedKV, bits=st.sampled_from([8, 4]), **_AUX_FIELDS),
)
"""Caches that keep the ledger's laws as they are, and those about numbers with numbers that are rounded."""
FORGETTING_CACHES: st.SearchStrategy[CachePolicy] = st.one_of(
    st.builds(
        BudgetCache, tokens=st.integers(1, 12), layer=st.integers(1, LAYERS - 1), sinks=st.integers(0, 2), **_AUX_FIELDS
    ),
    st.builds(
        EvictingCache,
        scorer=st.sampled_from([WindowAttention(window=2), AccumulatedAttention(), Random()]),
        budget=st.sampled_from([1, 4, 9, 0.3, 1.0]),
        when=st.sampled_from(["prefill", "decode"]),
    ),
)
"""Caches that give up K/V, in a step or after it."""
CACHES: st.SearchStrategy[CachePolicy] = st.one_of(
    AUX_CACHES, st.builds(DropCache, attend=st.sampled_from(["visible", "cached"]))
)


@st.composite
def stages(draw, first: int = 1, layers: int = LAYERS) -> Schedule:
    """Non-increasing stages at layers first .. layers-1."""
    places = draw(st.sets(st.integers(first, layers - 1), min_size=1))
    ratios = sorted((draw(st.floats(0.05, 1)) for _ in places), reverse=True)
    return Stages(dict(zip(sorted(places), ratios, strict=True)))


def masses(start: int) -> st.SearchStrategy[Schedule]:
    """Cuts before layer `start` that keep a share of the score."""
    return st.builds(
        AttentionMass,
        share=st.floats(0.05, 1),
        floor=st.floats(0, 0.2),
        ceiling=st.floats(0.2, 1),
        start=st.just(start),
    )


@st.composite
def curves(draw, first: int, layers: int) -> Schedule:
    """Ratios that fall from layer to layer, from any layer of first .. layers-1 on."""
    last, top = sorted(draw(st.tuples(st.floats(0.05, 1), st.floats(0.05, 1))))
    start = draw(st.integers(first, layers - 1))
    return draw(
        st.sampled_from(
            [
                Cosine(first=top, last=last, start=start),
                Power(first=top, last=last, start=start, exponent=draw(st.sampled_from([0.3, 1.0, 3.0]))),
                Pyramid(stages=draw(st.integers(2, layers)), keep=top),
                Pyramid(stages=2, keep=top, start=start),
            ]
        )
    )


@st.composite
def budgets(draw, first: int, layers: int) -> Schedule:
    """Falling counts of tokens at layers first .. layers-1."""
    places = draw(st.sets(st.integers(first, layers - 1), min_size=1))
    counts = sorted((draw(st.integers(1, 20)) for _ in places), reverse=True)
    return TokenBudget(dict(zip(sorted(places), counts, strict=True)))


def gaps(start: int) -> st.SearchStrategy[Schedule]:
    """Cuts before layer `start` where the scores fall most."""
    return st.builds(ScoreGap, floor=st.floats(0, 0.2), ceiling=st.floats(0.2, 1), start=st.just(start))


def schedules(first: int = 1, layers: int = LAYERS) -> st.SearchStrategy[Schedule]:
    """Schedules of every kind that prune nothing before layer `first`."""
    funnels = st.sets(st.integers(first, layers - 1), min_size=1, max_size=3).flatmap(
        lambda places: st.tuples(*(masses(place) for place in sorted(places))).map(Funnel)
    )
    places = st.integers(first, layers - 1)
    plain = st.one_of(
        stages(first, layers),
        places.flatmap(masses),
        funnels,
        places.flatmap(gaps),
        curves(first, layers),
        budgets(first, layers),
    )
    return st.one_of(
        plain,
        plain,
        st.builds(FullBelow, length=st.integers(0, 20), schedule=plain),
        st.builds(PerPhase, prefill=plain, decode=plain),
        st.builds(ByQuestion, asked=plain, unasked=plain),
    )


@st.composite
def policies(draw) -> dict[str, Scorer | Schedule | Protect | int]:
    """A scorer and a schedule that fit each other, before layer 0 too where no attention is read; and the rest."""
    scorer = draw(SCORERS)
    first = 1 if scorer.needs_attention else 0
    chunk = draw(st.sampled_from([4096, 4096, 1, 3, 8]))
    return {"scorer": scorer, "schedule": draw(schedules(first)), "protect": draw(PROTECT), "chunk": chunk}


@st.composite
def scripts(draw, rows: int) -> list[tuple[Tensor, Tensor]]:
    """Prefill, then any mixture of chunks and decode steps."""
    steps = [draw(batches(rows, 16))]
    for _ in range(draw(st.integers(0, 4))):
        steps.append(draw(batches(rows, draw(st.sampled_from([1, 1, 1, 6])))))
    return steps
