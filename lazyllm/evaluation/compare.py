"""Methods beside the unmodified model, item by item: what each gains in time and loses in quality.

Every item is done by every contender before the next one, in shuffled order, so that differences are paired and a
slow moment of the machine hits all alike. Each verdict is written to disk as it comes; a run that was cut off goes on.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from lazyllm.evaluation.fidelity import token_agreement
from lazyllm.evaluation.quality import Contender, Verdict, judge
from lazyllm.evaluation.statistics import Effect, median_effect, median_ratio, paired_difference, paired_p_value
from lazyllm.evaluation.tasks import Item

STOCK = "stock"
"""Name of the unmodified model, which everything is compared with."""


class Journal:
    """Verdicts by key, kept in a JSON-lines file as they come. A line that was cut off in the middle is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, Verdict] = {}
        if path.exists():
            written = path.read_bytes()
            whole = written[: written.rfind(b"\n") + 1]
            if whole != written:
                path.write_bytes(whole)
            for line in whole.decode("utf-8").splitlines():
                entry = json.loads(line)
                self._known[entry["key"]] = Verdict(**entry["verdict"])

    def get(self, key: str) -> Verdict | None:
        """What was found before, if it was."""
        return self._known.get(key)

    def put(self, key: str, verdict: Verdict) -> None:
        """Keeps a verdict, on disk first."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "verdict": asdict(verdict)}) + "\n")
        self._known[key] = verdict


@dataclass(frozen=True)
class Line:
    """One contender on one task.

    Attributes:
        task, contender: names.
        items: how many.
        score: mean score of the replies, None for tasks without.
        won, lost: answers with a higher score here than in the unmodified model, and the other way round.
        p_value: two-sided and exact, of no difference between the scores; None where no item differs.
        loss: mean loss of the reference per token.
        loss_change: against the unmodified model, paired by item.
        speedup: TTFT of the unmodified model over this one's, median of the items' ratios (bootstrap interval).
        agreement: share of reply tokens equal to the unmodified model's, up to the shorter reply.
        computed_fraction: layer-tokens computed in prefill, of all.
        recall: share of the evidence that has K/V at the last layer after the prefill; None for tasks without evidence,
            here and below for verdicts that did not note it.
        decode_speedup: time per output token of the unmodified model over this one's, as for the TTFT.
        memory: K/V and waiting states at the end, of the unmodified model's K/V.
        follow_up_speedup: time from a second question to its answer's first token, as for the TTFT.
    """

    task: str
    contender: str
    items: int
    score: float | None
    won: int
    lost: int
    p_value: float | None
    loss: float
    loss_change: Effect
    speedup: Effect
    agreement: float
    computed_fraction: float
    recall: float | None = None
    decode_speedup: Effect | None = None
    memory: float | None = None
    follow_up_speedup: Effect | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def run(
    contenders: Sequence[Contender],
    tasks: Mapping[str, Sequence[Item]],
    journal: Journal,
    *,
    prefix: str,
    seed: int = 0,
    on_item: Callable[[str, int], None] | None = None,
) -> dict[str, dict[str, list[Verdict]]]:
    """Verdicts by task and contender, in order of the items; those in the journal are not run again.

    The unmodified model goes first on every item: its reply is the reference where an item has none.
    """
    order = random.Random(seed)
    stock = next(one for one in contenders if one.is_stock)
    others = [one for one in contenders if one is not stock]
    verdicts: dict[str, dict[str, list[Verdict]]] = {}
    for task, items in tasks.items():
        verdicts[task] = defaultdict(list)
        for index, item in enumerate(items):
            order.shuffle(others)
            for contender in (stock, *others):
                key = f"{prefix}/{task}/{_digest(item)}/{contender.name}/{_digest(contender.pipe.config)}"
                verdict = journal.get(key)
                if verdict is None:
                    own = item.reference or contender is stock
                    reference = None if own else verdicts[task][stock.name][-1].reply
                    verdict = judge(contender, item, reference=reference)
                    journal.put(key, verdict)
                verdicts[task][contender.name].append(verdict)
            if on_item is not None:
                on_item(task, index)
    return verdicts


def _digest(thing: Any) -> str:
    """A few letters that change whenever an item or a configuration does.

    What stands at its default does not count, so that a new field leaves earlier journals valid. A default that is
    changed leaves them valid too, wrongly: it needs a new journal.
    """
    return hashlib.sha256(_described(thing).encode()).hexdigest()[:12]


def _described(thing: Any) -> str:
    """A value as text; of an object its class and, by name, the fields that differ from their default."""
    if isinstance(thing, Mapping):
        return "{" + ", ".join(sorted(f"{key!r}: {_described(value)}" for key, value in thing.items())) + "}"
    if isinstance(thing, (list, tuple)):
        return "[" + ", ".join(map(_described, thing)) + "]"
    if isinstance(thing, BaseModel):
        known = type(thing).model_fields.items()
        defaults = {name: field.get_default(call_default_factory=True) for name, field in known}
    elif is_dataclass(thing):
        defaults = {field.name: field.default for field in fields(thing)}
    else:
        return repr(thing)
    told = {name: _described(getattr(thing, name)) for name in sorted(defaults)}
    own = [f"{name}={text}" for name, text in told.items() if text != _described(defaults[name])]
    return f"{type(thing).__name__}({', '.join(own)})"


def compare(verdicts: Mapping[str, Mapping[str, Sequence[Verdict]]]) -> list[Line]:
    """Every contender against the unmodified model, task by task."""
    return [
        _line(task, name, mine, by_name[STOCK]) for task, by_name in verdicts.items() for name, mine in by_name.items()
    ]


def _line(task: str, name: str, mine: Sequence[Verdict], stock: Sequence[Verdict]) -> Line:
    pairs = list(zip(mine, stock, strict=True))
    losses = np.array([(one.loss, other.loss) for one, other in pairs])
    seconds = np.array([(one.ttft_seconds, other.ttft_seconds) for one, other in pairs])
    known = [(one.score, other.score) for one, other in pairs if one.score is not None]
    scored = np.array(known, dtype=float).reshape(-1, 2)
    won, lost = int((scored[:, 0] > scored[:, 1]).sum()), int((scored[:, 0] < scored[:, 1]).sum())
    return Line(
        task=task,
        contender=name,
        items=len(mine),
        score=float(scored[:, 0].mean()) if known else None,
        won=won,
        lost=lost,
        p_value=paired_p_value(*scored.T) if won + lost else None,
        loss=float(losses[:, 0].mean()),
        loss_change=paired_difference(*losses.T),
        speedup=median_ratio(seconds[:, 1], seconds[:, 0]),
        agreement=float(np.mean([token_agreement(one.reply, other.reply) for one, other in pairs])),
        computed_fraction=float(np.mean([one.computed_fraction for one in mine])),
        recall=_mean([one.recall for one in mine]),
        decode_speedup=_paired_speedup([(one.step_seconds, other.step_seconds) for one, other in pairs]),
        memory=_mean([_ratio(one.cache_bytes, other.cache_bytes) for one, other in pairs]),
        follow_up_speedup=_paired_speedup([(one.follow_up_seconds, other.follow_up_seconds) for one, other in pairs]),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean of what is known."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _paired_speedup(seconds: Sequence[tuple[float | None, float | None]]) -> Effect | None:
    """Median of the other's time over one's own, where both are known."""
    ratios = [ratio for own, other in seconds if (ratio := _ratio(other, own)) is not None]
    return median_effect(ratios) if ratios else None


def groups(lines: Sequence[Line]) -> Iterator[tuple[str, list[Line]]]:
    """Lines by task."""
    for task in dict.fromkeys(line.task for line in lines):
        yield task, [line for line in lines if line.task == task]
