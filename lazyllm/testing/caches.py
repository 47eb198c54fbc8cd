"""The check of caches."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lazyllm.caches.lazy_cache import LazyCache
from lazyllm.caches.policy import CachePolicy
from lazyllm.caches.row import Row
from lazyllm.pipeline import LazyPipeline
from lazyllm.policies.base import ScoreContext, Scorer, layer_number
from lazyllm.policies.schedules import Stages
from lazyllm.policies.scorers import AccumulatedAttention, Combined, LateInteraction
from lazyllm.testing.models import LEAST_LAYERS, VOCABULARY, tiny_models, untouched
from lazyllm.testing.rules import check_kind, check_value, require, running, stateless
from lazyllm.testing.runs import (
    PROTECT,
    Interrupting,
    Interruption,
    Run,
    batch_ids,
    check_steps,
    difference,
    safe_tokens,
)

STAGES = Stages(stages={1: 0.7, 2: 0.5, 3: 0.3})
CROPPED = 3
"""Columns that are taken out again."""


class Shifting(Scorer):
    """Prefers other tokens at every layer and context length, so that a cache that revives has to."""

    def score(self, context: ScoreContext) -> Tensor:
        """Scores [v]."""
        return ((context.tokens * 7 + context.layer * 5) * context.context_tokens % 23).double()


SCORER = Combined(scorers=((Shifting(), 2.0), (LateInteraction(query=4, pool=3), 1.0), (AccumulatedAttention(), 1.0)))
"""One that makes tokens come and go, one whose memory the cache keeps, one that reads keys and adds up."""


def check_cache(*caches: CachePolicy, layers: int = LEAST_LAYERS) -> None:
    """Checks caches on tiny models: what they hold after every step, copies, crops, batches, steps that fail.

    Args:
        caches: instances; bounds on what they hold should be ones that 40 tokens reach.
        layers: layers of the models, for caches that name a layer.

    Raises:
        ContractViolation: for the first rule that is broken.
        ConfigError: for what is no cache policy.
    """
    for policy in caches:
        check_kind(policy, CachePolicy)
        with stateless(policy):
            check_value(policy, "cache")
            _check_store(policy)
            _check_frontier(policy)
            for model in tiny_models(layers):
                with untouched(model, policy):
                    _check_on(policy, model)


# -- stores by themselves ----------------------------------------------------------------------------------


def _check_store(policy: CachePolicy) -> None:
    """The rule "stores" for K/V: two parts go in, and each token's own come out, whatever the order."""
    with running(policy, "new_store"):
        store, other = policy.new_store(), policy.new_store()
    require(store is not other, "stores", policy, "new_store gives the same store twice")
    require(len(store) == 0, "stores", policy, f"a new store holds {len(store)} tokens")
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, 12, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    tokens = torch.tensor([0, 2, 3, 5, 7, 8, 9, 11, 1, 6, 4, 10])
    with running(policy, "storing K/V"):
        for part in (slice(0, 8), slice(8, 12)):
            store.append(tokens[part], keys[:, :, part], values[:, :, part])
        wanted = tokens[[9, 2, 11, 0]]
        found = store.gather(wanted)
        read, stored = store.read(), store.tokens
    require(len(other) == 0, "stores", policy, "what is put into one store is in another one too")
    named = stored.tolist()
    require(sorted(named) == list(range(12)), "stores", policy, f"of 12 tokens stored, it names {named}")
    order = [tokens.tolist().index(token) for token in wanted.tolist()]
    every = [tokens.tolist().index(token) for token in named]
    for name, put, gathered, whole in zip(("keys", "values"), (keys, values), found, read, strict=True):
        _check_nearest(policy, f"gathered {name}", gathered[0].transpose(0, 1), put[0].transpose(0, 1), order)
        _check_nearest(policy, f"{name} read", whole[0].transpose(0, 1), put[0].transpose(0, 1), every)


def _check_frontier(policy: CachePolicy) -> None:
    """The rule "stores" for waiting states."""
    with running(policy, "new_frontier"):
        frontier, other = policy.new_frontier(), policy.new_frontier()
    require(frontier is not other, "stores", policy, "new_frontier gives the same store twice")
    require(len(frontier) == 0, "stores", policy, f"a new frontier holds {len(frontier)} tokens")
    states = torch.randn(9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with running(policy, "keeping states"):
        frontier.put(torch.tensor([1, 2, 4, 6, 7]), states[[1, 2, 4, 6, 7]])
        frontier.free(torch.tensor([2, 6]))
        frontier.put(torch.tensor([4, 8, 0, 3]), states[[5, 8, 0, 3]])
        twin = frontier.copy()
        frontier.crop(8)
    held, expected = frontier.tokens.tolist(), {0: 0, 1: 1, 3: 3, 4: 5, 7: 7}
    require(held == sorted(expected), "stores", policy, f"the frontier should hold {sorted(expected)}, holds {held}")
    require(8 in twin.tokens.tolist(), "stores", policy, "a crop of the frontier crops its copy")
    require(len(other) == 0, "stores", policy, "what is put into one frontier is in another one too")
    with running(policy, "reading states"):
        wanted = [7, 0, 4]
        read = frontier.read(torch.tensor(wanted))
    _check_nearest(policy, "states read", read, states, [expected[token] for token in wanted])


def _check_nearest(policy: CachePolicy, what: str, found: Tensor, put: Tensor, order: list[int]) -> None:
    """What was found may be rounded, but is nearest to what was put in for that token."""
    shape = (len(order), *put.shape[1:])
    require(tuple(found.shape) == shape, "stores", policy, f"{what}: wanted shape {shape}, got {tuple(found.shape)}")
    nearest = torch.cdist(found.flatten(1).to(put), put.flatten(1)).argmin(1).tolist()
    require(nearest == order, "stores", policy, f"{what}: wanted those at {order}, got what is nearest to {nearest}")


# -- in a run ----------------------------------------------------------------------------------------------


def _check_on(policy: CachePolicy, model: PreTrainedModel) -> None:
    with running(policy, "made into a pipeline"):
        pipe = LazyPipeline(model, scorer=SCORER, schedule=STAGES, cache=policy, protect=PROTECT)
    ids = batch_ids()
    batch = Run(pipe, rows=2)
    for number, tokens in enumerate(zip(*ids, strict=True)):
        doing = f"in step {number} of a batch of two"
        _check_failing(policy, batch, tokens)
        with running(policy, doing):
            batch.step(tokens)
        check_books(policy, batch.cache, doing, protected=_most_protected(batch.lengths[-1]))
    check_steps(batch, policy)
    for row, own in enumerate(ids):
        with running(policy, f"row {row} alone"):
            alone = Run(pipe, rows=1).play([own])
        found = difference(alone.row(0), batch.row(row))
        require(found is None, "rows", policy, f"row {row}, alone and in a batch, has other logits, {found}")
    with running(policy, "the same batch again"):
        again = Run(pipe, rows=2).play(ids)
    found = difference(batch.row(0), again.row(0))
    require(found is None, "stateless", policy, f"the same batch, run again, has other logits, {found}")
    for doing, check in MANAGED.items():
        with running(policy, doing):
            check(policy, batch)
    with running(policy, "in generate with beams"):
        pipe.generate(ids[0][0], max_new_tokens=3, num_beams=2, do_sample=False, eos_token_id=VOCABULARY)


def _most_protected(lengths: Sequence[int]) -> int:
    """How many tokens a prefill to these lengths protects at most."""
    return max(len(safe_tokens(length, length)) for length in lengths)


def check_books(policy: CachePolicy, cache: LazyCache, when: str, *, protected: int) -> None:
    """What a cache holds between two steps: the rules "ledger", "kept", "frontier", "bound" and "bytes"."""
    for index, row in enumerate(cache.rows):
        where = f"{when}, row {index}"
        depth, layers = row.ledger.depth, row.ledger.layers
        counts = torch.bincount(depth, minlength=layers + 1).tolist()
        found = f"{where}, depths count {counts}, the ledger says {row.ledger.at_depth}"
        require(row.ledger.at_depth == counts, "ledger", policy, found)
        for layer, store in enumerate(row.stores):
            stored, deeper = sorted(store.tokens.tolist()), torch.nonzero(depth > layer).flatten().tolist()
            strange = sorted({*stored} - {*deeper}) or sorted(token for token in stored if stored.count(token) > 1)
            found = f"{where}, layer {layer} stores tokens {strange[:8]}, which it has not computed or has twice"
            require(not strange, "kept", policy, found)
            missing = sorted({*deeper} - {*stored}) if policy.eviction is None else []
            found = f"{where}, layer {layer} has computed tokens {missing[:8]} and does not store them"
            require(not missing, "kept", policy, found)
            if len(store):
                finite = all(bool(part.isfinite().all()) for part in store.read())
                require(finite, "kept", policy, f"{where}, K/V of layer {layer} are not finite")
        _check_waiting(policy, row, where)
        _check_bounds(policy, row, where, protected)
    sizes = f"{when}, kv_bytes is {cache.kv_bytes} and aux_bytes {cache.aux_bytes}"
    require(cache.kv_bytes > 0 and cache.aux_bytes >= 0, "bytes", policy, sizes)


def _check_waiting(policy: CachePolicy, row: Row, where: str) -> None:
    waiting = torch.nonzero(row.ledger.depth < row.ledger.layers).flatten() if policy.revives else row.ledger.depth[:0]
    held = row.frontier.tokens
    found = f"{where}, tokens {waiting.tolist()} wait, there are states of {held.tolist()}"
    require(torch.equal(held, waiting), "frontier", policy, found)
    if waiting.numel():
        states = row.frontier.read(waiting)
        fits = states.ndim == 2 and states.shape[0] == waiting.numel() and bool(states.isfinite().all())
        found = f"{where}, states of {waiting.numel()} tokens are of shape {tuple(states.shape)}, or not finite"
        require(fits, "frontier", policy, found)


def _check_bounds(policy: CachePolicy, row: Row, where: str, protected: int) -> None:
    eviction, retreat, length = policy.eviction, policy.retreat, len(row.ledger)
    if eviction is not None and length == row.reply_start:  # a prefill has just been
        most = max(eviction.most_tokens(length), protected)
        stored = [len(store) for store in row.stores]
        found = f"{where}, layers store {stored} tokens, {most} are allowed"
        require(max(stored) <= most, "bound", policy, found)
    if retreat is not None:
        layer = layer_number(retreat.layer, row.ledger.layers, owner=policy)
        deep, most = int((row.ledger.depth > layer).sum()), max(retreat.most_tokens, retreat.sinks)
        require(deep <= most, "bound", policy, f"{where}, {deep} tokens are deeper than layer {layer}, {most} may be")


def snapshot(cache: LazyCache) -> dict[str, Tensor]:
    """Everything a cache holds, by name."""
    parts = {"columns": torch.tensor(cache.columns)}
    for index, row in enumerate(cache.rows):
        own: dict[str, Tensor] = {"depth": row.ledger.depth, "position": row.ledger.position}
        own["column"], own["reply_start"] = row.ledger.column, torch.tensor(row.reply_start)
        own["counted"] = torch.tensor(row.counted)
        own["frontier tokens"], own["last_used"] = row.frontier.tokens, row.last_used
        if len(row.frontier):
            own["frontier states"] = row.frontier.read(row.frontier.tokens)
        for layer, store in enumerate(row.stores):
            own[f"tokens of layer {layer}"] = tokens = store.tokens.sort().values
            if len(store):
                own[f"keys of layer {layer}"], own[f"values of layer {layer}"] = store.gather(tokens)
        own |= {f"memory of layer {layer}": torch.tensor(len(memory)) for layer, memory in row.memories.items()}
        own |= {f"sums of {key}": tally for key, tally in row.tallies.items()}
        parts |= {f"{name} of row {index}": tensor.clone() for name, tensor in own.items()}
    return parts


def _changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> str | None:
    """The first thing that differs, None when nothing does."""
    if odd := sorted(before.keys() ^ after.keys()):
        return f"{odd[0]} has come or gone"
    return next((name for name in before if not torch.equal(before[name], after[name])), None)


def _check_failing(policy: CachePolicy, run: Run, tokens: tuple[Tensor, ...]) -> None:
    """The rule "failing step", before the step that succeeds."""
    before = snapshot(run.cache)
    with running(policy, "in a step that is interrupted"), suppress(Interruption):
        run.step(tokens, callbacks=[Interrupting()])
    changed = _changed(before, snapshot(run.cache))
    require(changed is None, "failing step", policy, f"after {before['columns']} columns, {changed} has changed")


def _check_copy(policy: CachePolicy, run: Run) -> None:
    before = snapshot(run.cache)
    gone_on = []
    for name in ("a fork", "a deep copy"):
        twin = run.fork()
        if name == "a deep copy":
            twin.cache = copy.deepcopy(run.cache)
        changed = _changed(before, snapshot(twin.cache))
        require(changed is None, "fork", policy, f"{changed} differs in {name}")
        for step in (torch.tensor([5]), torch.arange(4, 10), torch.tensor([8])):
            twin.step((step, step))
        changed = _changed(before, snapshot(run.cache))
        require(changed is None, "fork", policy, f"{changed} has changed when {name} went on")
        gone_on.append(twin)
    found = difference(gone_on[0].row(0), gone_on[1].row(0))
    require(found is None, "fork", policy, f"a fork and a copy that go on alike have other logits, {found}")


def _check_reorder(policy: CachePolicy, run: Run) -> None:
    straight, turned, twice = run.fork(), run.fork(), run.fork()
    turned.reorder([1, 0])
    twice.reorder([1, 1])
    one, other = torch.tensor([5]), torch.tensor([8])
    for left, right in ((one, other), (other, one)):
        straight.step((left, right))
        turned.step((right, left))
        twice.step((right, right))
    for name, found, wanted in (
        ("rows 1, 0", turned.row(1), straight.row(0)),
        ("rows 1, 0", turned.row(0), straight.row(1)),
        ("rows 1, 1", twice.row(0), straight.row(1)),
        ("rows 1, 1", twice.row(1), straight.row(1)),
    ):
        differs = difference(found, wanted)
        require(differs is None, "reorder", policy, f"as {name}, they go on with other logits, {differs}")
    check_books(policy, turned.cache, "reordered", protected=_most_protected(turned.lengths[-1]))


def _check_crop(policy: CachePolicy, run: Run) -> None:
    cropped = run.fork()
    cropped.crop(CROPPED)
    before, after = run.cache.rows, cropped.cache.rows
    for index, (was, now) in enumerate(zip(before, after, strict=True)):
        length = len(was.ledger) - CROPPED
        found = f"row {index} had {len(was.ledger)} tokens, has {len(now.ledger)} without {CROPPED} columns"
        require(len(now.ledger) == length, "crop", policy, found)
        for layer, (old, new) in enumerate(zip(was.stores, now.stores, strict=True)):
            kept = old.tokens[old.tokens < length].sort().values
            stored = new.tokens.sort().values
            found = f"row {index}, layer {layer} stores {stored.tolist()}, not {kept.tolist()}"
            require(torch.equal(stored, kept), "crop", policy, found)
            if kept.numel():
                same = all(torch.equal(a, b) for a, b in zip(old.gather(kept), new.gather(kept), strict=True))
                require(same, "crop", policy, f"row {index}, layer {layer}: K/V of tokens that stay have changed")
    check_books(policy, cropped.cache, "cropped", protected=_most_protected(run.lengths[-1]))
    for token in (5, 8):
        cropped.step((torch.tensor([token]), torch.tensor([token + 1])))
        check_books(policy, cropped.cache, "after a crop", protected=_most_protected(cropped.lengths[-1]))


def _check_reset(policy: CachePolicy, run: Run) -> None:
    twin = run.fork()
    twin.cache.reset()
    sizes = f"after a reset, kv_bytes is {twin.cache.kv_bytes} and aux_bytes {twin.cache.aux_bytes}"
    require(twin.cache.kv_bytes == twin.cache.aux_bytes == 0, "bytes", policy, sizes)


def _check_saved(policy: CachePolicy, run: Run) -> None:
    before = snapshot(run.cache)
    with tempfile.TemporaryDirectory() as folder:
        path = run.cache.save(Path(folder) / "cache.safetensors")
        loaded = run.fork()
        loaded.cache = run.pipe.load_cache(path)
    changed = _changed(before, snapshot(loaded.cache))
    require(changed is None, "saved", policy, f"{changed} differs in what was loaded")
    going_on = run.fork()
    for twin in (going_on, loaded):
        for step in (torch.tensor([5]), torch.arange(4, 10), torch.tensor([8])):
            twin.step((step, step))
    found = difference(going_on.row(0), loaded.row(0))
    require(found is None, "saved", policy, f"what was loaded goes on with other logits, {found}")


MANAGED: Mapping[str, Callable[[CachePolicy, Run], None]] = {
    "forked": _check_copy,
    "saved and loaded": _check_saved,
    "reordered": _check_reorder,
    "cropped": _check_crop,
    "reset": _check_reset,
}
"""What else is done to a cache than steps."""
