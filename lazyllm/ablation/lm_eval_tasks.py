"""Tasks of lm-eval under several configurations, for `lazyllm eval`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lazyllm.ablation.models import Shelf
from lazyllm.ablation.study import Study
from lazyllm.config import LazyConfig
from lazyllm.errors import InputError
from lazyllm.evaluation.harness_tasks import HarnessItem, HarnessResult, evaluate
from lazyllm.evaluation.statistics import Comparison, Paired, compare_pairs

BASELINE = "dense"
"""The configuration that the others are compared with; it gives what lm-eval's own model gives."""


def judged(
    study: Study,
    configs: Mapping[str, LazyConfig],
    tasks: Sequence[str],
    items: int,
    path: Path,
    tell: Callable[[str], None],
) -> list[HarnessResult]:
    """The results of each configuration on each task; written to `path` as they come.

    Args:
        study: names the model, the length of prompts that tasks make themselves, and the seed.
        configs: by name.
        tasks: names of lm-eval.
        items: of each task.
        path: a JSON file.
        tell: told what has been done.

    Raises:
        InputError: for a task that does not exist or has no data here, and when the file cannot be written.
    """
    loaded = Shelf().get(study.setting.ref)
    found: list[HarnessResult] = []

    def keep(result: HarnessResult) -> None:
        found.append(result)
        _write(found, path)
        tell(f"{result.task}: {result.cell}")

    evaluate(
        loaded.model,
        loaded.tokenizer,
        configs,
        tasks,
        limit=items,
        lengths=[study.tokens],
        seed=study.seed,
        on_result=keep,
    )
    return found


def family(results: Sequence[HarnessResult]) -> list[Comparison]:
    """Every configuration against the unmodified model, metric by metric, as one family."""
    base = {result.task: result.items for result in results if result.cell == BASELINE}
    return compare_pairs(
        _paired(result, metric, base[result.task])
        for result in results
        for metric in dict.fromkeys(metric for item in base[result.task] for metric in item.metrics)
        if result.cell != BASELINE
    )


def _paired(result: HarnessResult, metric: str, base: Sequence[HarnessItem]) -> Paired:
    """A configuration's values of a metric beside the baseline's, item by item of that."""
    known = {item.doc_id: item.metrics.get(metric) for item in result.items}
    return Paired(
        f"{result.task} {metric}",
        result.cell,
        mine=[known.get(item.doc_id) for item in base],
        theirs=[item.metrics.get(metric) for item in base],
        lower_is_better=metric in result.lower_is_better,
    )


def _write(results: Sequence[HarnessResult], path: Path) -> None:
    """The whole file anew, so that it is there as a whole or as it was."""
    new = path.with_name(f"{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps([result.to_dict() for result in results], indent=1), encoding="utf-8")
        os.replace(new, path)
    except OSError as error:
        raise InputError(f"cannot write {str(path)!r}: {error.strerror}") from None
