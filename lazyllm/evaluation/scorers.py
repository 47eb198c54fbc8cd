"""Scorers judged apart from any score: how much of the evidence, and of an oracle's tokens, each would keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lazyllm.evaluation.quality import Contender, evidence_tokens, greedy_reply
from lazyllm.evaluation.ranking import Ranking, rankings
from lazyllm.evaluation.sections import Section, bold
from lazyllm.evaluation.tasks import Item
from lazyllm.pipeline import LazyPipeline
from lazyllm.policies import SCORERS, Oracle, Scorer

PARTS: dict[str, dict[str, Any]] = {
    "TwoHop": {"scorer": "LateInteraction"},
    "Pooled": {"scorer": "WindowAttention", "width": 33},
    "Blockwise": {"scorer": "WindowAttention", "size": 64},
    "Combined": {"scorers": {"LateInteraction": 1.0, "WindowAttention": 1.0}},
}
"""What scorers that are made of others are made of here."""
ORACLE = Oracle.__name__


Answer = str | tuple[int, ...]


def every_scorer(answer: Answer) -> dict[str, Scorer]:
    """One of each registered scorer, by name; all but those made of others as they are by default.

    Args:
        answer: what the oracle knows.
    """
    fields: dict[str, dict[str, Any]] = {**PARTS, ORACLE: {"answer": answer}}
    return {name: SCORERS.build({"name": name, **fields.get(name, {})}) for name in SCORERS}


@dataclass(frozen=True)
class Kept:
    """What one scorer keeps of a task's prompts.

    Attributes:
        task, scorer: names.
        layer: before which layer tokens are pruned.
        keep: keep ratio there.
        items: how many items.
        recall: share of the evidence's tokens that are kept, mean over the items that name some; None if none does.
        oracle: share of the tokens the oracle keeps at the same ratio that are kept, protected ones not counted.
    """

    task: str
    scorer: str
    layer: int
    keep: float
    items: int
    recall: float | None
    oracle: float | None = None


def judge_scorers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Sequence[Item]],
    *,
    layers: Sequence[int],
    keeps: Sequence[float],
    scorers: Mapping[str, Scorer] | None = None,
    on_item: Callable[[str, int], None] | None = None,
) -> Iterator[Kept]:
    """Every scorer at every layer and keep ratio, task by task; nothing but the query and the last token is protected.

    Each scorer makes one pass over an item, up to the deepest layer. Scorers that read attention are left out before
    layer 0, where there is none. The oracle knows the item's reference, or where it has none the model's own reply.

    Args:
        model, tokenizer: the model.
        tasks: items by task.
        layers: before which to prune.
        keeps: keep ratios.
        scorers: by name, those to judge beside the oracle; without them one of each.
        on_item: told of every item that is done.

    Raises:
        ConfigError: for a layer that the model lacks.
    """
    pipe = LazyPipeline.from_preset("dense", model, tokenizer)
    for task, items in tasks.items():
        found: dict[tuple[str, int, float], list[_Shares]] = {}
        for index, item in enumerate(items):
            for key, shares in _judged(pipe, item, layers, keeps, scorers):
                found.setdefault(key, []).append(shares)
            if on_item is not None:
                on_item(task, index)
        for (name, layer, keep), shared in found.items():
            recall, oracle = (_mean([getattr(one, part) for one in shared]) for part in ("recall", "oracle"))
            yield Kept(task, name, layer, keep, len(shared), recall, oracle)


@dataclass(frozen=True)
class _Shares:
    """What is kept of one item: of its evidence and of the oracle's tokens; None where there are none."""

    recall: float | None
    oracle: float | None


def _judged(
    pipe: LazyPipeline,
    item: Item,
    layers: Sequence[int],
    keeps: Sequence[float],
    scorers: Mapping[str, Scorer] | None,
) -> Iterator[tuple[tuple[str, int, float], _Shares]]:
    """By scorer, layer and keep ratio, what is kept of one item."""
    answer = item.reference or tuple(greedy_reply(Contender(pipe, "dense"), item.prompt, item.new_tokens)[0])
    everyone = every_scorer(answer)
    if scorers is not None:
        everyone = {**scorers, ORACLE: everyone[ORACLE]}
    ranked = {name: rankings(pipe, scorer, item.prompt, layers) for name, scorer in everyone.items()}
    evidence = evidence_tokens(pipe, item) if item.evidence else torch.empty(0, dtype=torch.long)
    for name, by_layer in ranked.items():
        for layer, ranking in by_layer.items():
            for keep in keeps:
                recall = _share(ranking.kept(keep)[evidence])
                yield (name, layer, keep), _Shares(recall, _of_the_oracles(ranking, ranked[ORACLE][layer], keep))


def _of_the_oracles(mine: Ranking, oracle: Ranking, keep: float) -> float | None:
    free = ~(mine.protected | oracle.protected)
    return _share(mine.kept(keep)[oracle.kept(keep) & free])


def _share(kept: Tensor) -> float | None:
    return float(kept.double().mean()) if kept.numel() else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


MEASURES = {"recall": "Evidence kept", "oracle": "Of the oracle's tokens kept"}
"""Fields of `Kept` that are shown, and their titles."""


def scorer_sections(found: Sequence[Kept], conditions: str) -> list[Section]:
    """Per measure, one table per layer: a row per scorer, a column per task; the oracle's row stands out."""
    layers = sorted({kept.layer for kept in found})
    return [
        _section(f"{title}, pruned before layer {layer}", conditions, found, layer, measure)
        for measure, title in MEASURES.items()
        if any(getattr(kept, measure) is not None for kept in found)
        for layer in layers
    ]


def _section(title: str, conditions: str, found: Sequence[Kept], layer: int, measure: str) -> Section:
    tasks, keeps = (list(dict.fromkeys(getattr(kept, name) for kept in found)) for name in ("task", "keep"))
    known = {(kept.task, kept.scorer, kept.layer, kept.keep): getattr(kept, measure) for kept in found}
    shares = " / ".join(f"{keep:.0%}" for keep in keeps)
    rows = []
    for name in dict.fromkeys(kept.scorer for kept in found if kept.layer == layer):
        cells = [" / ".join(_shown(known.get((task, name, layer, keep))) for keep in keeps) for task in tasks]
        row = [f"`{name}`", *cells]
        rows.append(bold(row) if name == ORACLE else row)
    return Section(title, conditions, ["scorer", *(f"{task}, {shares}" for task in tasks)], rows)


def _shown(share: float | None) -> str:
    return "-" if share is None else f"{share:.2f}"
