"""Scorers judged apart from any answer: how much of the evidence each would keep, beside an oracle that knows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lazyllm.caches import DropCache
from lazyllm.evaluation.quality import evidence_recall
from lazyllm.evaluation.sections import Section, bold
from lazyllm.evaluation.tasks import Item
from lazyllm.pipeline import LazyPipeline
from lazyllm.policies import SCORERS, Oracle, Protect, Scorer, Stages

PARTS: dict[str, dict[str, Any]] = {
    "TwoHop": {"scorer": "LateInteraction"},
    "Pooled": {"scorer": "WindowAttention", "width": 33},
    "Blockwise": {"scorer": "WindowAttention", "size": 64},
    "Combined": {"scorers": {"LateInteraction": 1.0, "WindowAttention": 1.0}},
}
"""What scorers that are made of others are made of here."""
ORACLE = Oracle.__name__


def every_scorer(answer: str) -> dict[str, Scorer]:
    """One of each registered scorer, by name; all but those made of others as they are by default.

    Args:
        answer: what the oracle knows.
    """
    fields: dict[str, dict[str, Any]] = {**PARTS, ORACLE: {"answer": answer}}
    return {name: SCORERS.build({"name": name, **fields.get(name, {})}) for name in SCORERS}


@dataclass(frozen=True)
class Kept:
    """What one scorer keeps of the evidence of a task's items.

    Attributes:
        task, scorer: names.
        layer: before which layer tokens are pruned.
        keep: keep ratio there.
        items: how many items.
        recall: share of the evidence's tokens that are kept, mean over the items.
    """

    task: str
    scorer: str
    layer: int
    keep: float
    items: int
    recall: float


def judge_scorers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Sequence[Item]],
    *,
    layers: Sequence[int],
    keeps: Sequence[float],
    on_item: Callable[[str, int], None] | None = None,
) -> Iterator[Kept]:
    """Every scorer at every layer and keep ratio, task by task; nothing but the query and the last token is protected.

    Scorers that read attention are left out before layer 0, where there is none.

    Raises:
        InputError: when an item names no evidence.
        ConfigError: for a layer that the model lacks.
    """
    for task, items in tasks.items():
        found: dict[tuple[str, int, float], list[float]] = {}
        for index, item in enumerate(items):
            for name, scorer in every_scorer(item.reference).items():
                for layer in layers:
                    if layer == 0 and scorer.needs_attention:
                        continue
                    for keep in keeps:
                        pipe = LazyPipeline(
                            model,
                            tokenizer,
                            scorer=scorer,
                            schedule=Stages(stages={layer: keep}),
                            cache=DropCache(),
                            protect=Protect(),
                        )
                        recall = evidence_recall(pipe, item, layer).evidence
                        found.setdefault((name, layer, keep), []).append(recall)
            if on_item is not None:
                on_item(task, index)
        for (name, layer, keep), recalls in found.items():
            yield Kept(task, name, layer, keep, len(recalls), mean(recalls))


def scorer_sections(found: Sequence[Kept], conditions: str) -> list[Section]:
    """One table per layer: a row per scorer, a column per task; the oracle's row stands out."""
    tasks, layers, keeps = (
        list(dict.fromkeys(getattr(kept, name) for kept in found)) for name in ("task", "layer", "keep")
    )
    known = {(kept.task, kept.scorer, kept.layer, kept.keep): kept.recall for kept in found}
    shares = " / ".join(f"{keep:.0%}" for keep in keeps)
    sections = []
    for layer in sorted(layers):
        rows = []
        for name in dict.fromkeys(kept.scorer for kept in found if kept.layer == layer):
            cells = [" / ".join(_shown(known.get((task, name, layer, keep))) for keep in keeps) for task in tasks]
            row = [f"`{name}`", *cells]
            rows.append(bold(row) if name == ORACLE else row)
        columns = ["scorer", *(f"{task}, {shares}" for task in tasks)]
        sections.append(Section(f"Evidence kept, pruned before layer {layer}", conditions, columns, rows))
    return sections


def _shown(recall: float | None) -> str:
    return "-" if recall is None else f"{recall:.2f}"
