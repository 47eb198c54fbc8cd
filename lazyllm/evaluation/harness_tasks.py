"""lm-eval's tasks on one model, under one configuration after the other, item by item."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lazyllm.config import LazyConfig
from lazyllm.errors import InputError
from lazyllm.evaluation.compare import written
from lazyllm.evaluation.harness import LazyLM
from lazyllm.pipeline import LazyPipeline

# isort: split
# after harness, which says what to install where lm-eval is missing
import lm_eval
from lm_eval.api.metrics import perplexity
from lm_eval.tasks import TaskManager

BOOTSTRAPS = 1000
"""Samples behind the standard error of a metric that is no mean."""

Reply = str | tuple[float, bool]
"""A generated text, or a continuation's log-likelihood and whether it is the greedy one."""


@dataclass(frozen=True)
class HarnessItem:
    """One item of a task, as lm-eval has it.

    Attributes:
        doc_id: its number in the task; the same for every configuration.
        target: the right answer, as text.
        prompts: the text of each of its requests, a continuation to score not included.
        replies: to each request.
        metrics: its own values by metric; a metric of a filter is called `metric,filter`.
    """

    doc_id: int
    target: str
    prompts: tuple[str, ...]
    replies: tuple[Reply, ...]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class HarnessResult:
    """One configuration on one task.

    Attributes:
        cell, task: names.
        metrics: lm-eval's aggregates by metric.
        errors: their standard errors, where lm-eval knows one.
        items: in order of `doc_id`.
        computed_fraction: layer-tokens the prefills computed, of all, over all tasks of this cell.
        seconds: what all tasks of this cell took.
        lower_is_better: metrics of which an item had better have less.
    """

    cell: str
    task: str
    metrics: Mapping[str, float]
    errors: Mapping[str, float]
    items: tuple[HarnessItem, ...]
    computed_fraction: float
    seconds: float
    lower_is_better: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `written`."""
        return written(self)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    configs: Mapping[str, LazyConfig],
    tasks: Sequence[str | Mapping[str, Any]],
    *,
    limit: int | None = None,
    lengths: Sequence[int] = (),
    num_fewshot: int | None = None,
    generation: Mapping[str, Any] | None = None,
    chat: bool = False,
    batch_size: int = 1,
    truncate: bool = False,
    rolling_block: int | None = None,
    seed: int = 0,
    on_result: Callable[[HarnessResult], None] | None = None,
) -> list[HarnessResult]:
    """Runs tasks of lm-eval under each configuration, on the same items.

    Args:
        model, tokenizer: what is judged.
        configs: one per cell, by its name.
        tasks: names of tasks, groups or tags, paths of YAML files, or configurations of tasks.
        limit: items of each task; None = all.
        lengths: prompt lengths in tokens of tasks that make their own prompts, such as RULER's; () = the task's own.
        num_fewshot: examples before each prompt; None = the task's own number.
        generation: instead of what a task says, such as `{"max_gen_toks": 32}`.
        chat: whether prompts go through the tokenizer's chat template.
        batch_size, truncate, rolling_block: as in `LazyLM`; here a request that is too long is an error unless told
            otherwise.
        seed: of the tasks that draw their items, and of the examples.
        on_result: told about each cell's tasks as it finishes.

    Raises:
        InputError: for a task that does not exist, or whose data is not here.
        ConfigError: when a configuration does not fit the model.
    """
    models = {
        name: LazyLM(
            LazyPipeline.from_config(config, model, tokenizer),
            batch_size=batch_size,
            truncate=truncate,
            rolling_block=rolling_block,
        )
        for name, config in configs.items()
    }
    results: list[HarnessResult] = []
    with _loaded(tasks, tokenizer, lengths, seed) as (manager, loaded):
        for cell, own in models.items():
            started = time.perf_counter()
            output = lm_eval.simple_evaluate(
                model=own,
                tasks=list(loaded.values()),
                task_manager=manager,
                limit=limit,
                num_fewshot=num_fewshot,
                gen_kwargs=dict(generation or {}),
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                bootstrap_iters=BOOTSTRAPS,
                random_seed=seed,
                fewshot_random_seed=seed,
            )
            seconds = time.perf_counter() - started
            for result in _results(cell, output, loaded, own.share.fraction, seconds):
                results.append(result)
                if on_result is not None:
                    on_result(result)
    return results


def _results(
    cell: str, output: Mapping[str, Any], tasks: Mapping[str, Any], share: float, seconds: float
) -> Iterator[HarnessResult]:
    """One result per task of lm-eval's output."""
    for task, values in output["results"].items():
        if task in output["samples"]:
            items = _items(output["samples"][task])
            metrics, errors = _aggregates(values)
            lower = _lower_is_better(tasks[task], metrics)
            yield HarnessResult(cell, task, metrics, errors, items, share, seconds, lower)


def _lower_is_better(task: Any, metrics: Iterable[str]) -> tuple[str, ...]:
    """The metrics of which an item had better have less, as the task or lm-eval's registry says.

    What is aggregated to a perplexity is a log-likelihood item by item, of which more is better.
    """
    higher, aggregations = task.higher_is_better(), task.aggregation()
    names = {metric: metric.partition(",")[0] for metric in metrics}
    return tuple(
        metric
        for metric, name in names.items()
        if higher.get(name) is False and aggregations.get(name) is not perplexity
    )


@contextmanager
def _loaded(
    tasks: Sequence[str | Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], seed: int
) -> Iterator[tuple[TaskManager, dict[str, Any]]]:
    """The tasks by name with their data, once for all cells; RULER's read the tokenizer from a folder."""
    with TemporaryDirectory(prefix="lazyllm-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        asked = {"max_seq_lengths": list(lengths)} if lengths else {}
        known = any(map(_is_known_by_name, tasks))  # to look through lm-eval's own tasks takes seconds
        manager = TaskManager(metadata={"tokenizer": folder, **asked}, include_defaults=known)
        random.seed(seed)
        found: dict[str, Any] = {}
        for task in tasks:
            found.update(_load(manager, task))
        yield manager, found


def _load(manager: TaskManager, task: str | Mapping[str, Any]) -> dict[str, Any]:
    """A task, or those of a group, by name.

    Raises:
        InputError: when there is no such task, or its data cannot be had.
    """
    name = task if isinstance(task, str) else task.get("task")
    if _is_known_by_name(task) and name not in manager.task_index:
        near = get_close_matches(str(name), manager.all_tasks, n=3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise InputError(f"lm-eval has no task {name!r}.{hint} `lazyllm lm-eval ls tasks` lists all.")
    try:
        loaded: dict[str, Any] = manager.load([task if isinstance(task, str) else dict(task)])["tasks"]
    except (OSError, LookupError, ImportError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"the data of task {name!r} is not here: {reason} (load the task once with a connection, so that it is "
            "kept; or give a task configuration that reads local files: dataset_path='json', "
            "dataset_kwargs={'data_files': ...})"
        ) from None
    return loaded


def _is_known_by_name(task: str | Mapping[str, Any]) -> bool:
    return isinstance(task, str) and not task.endswith((".yaml", ".yml"))


def _items(samples: Sequence[Mapping[str, Any]]) -> tuple[HarnessItem, ...]:
    """Items from lm-eval's samples, of which it gives one for each filter."""
    found: dict[int, HarnessItem] = {}
    for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
        before = found.get(sample["doc_id"])
        values = {_key(name, sample["filter"]): sample[name] for name in sample["metrics"]}
        metrics = {name: float(value) for name, value in values.items() if _is_known(name, value)}
        found[sample["doc_id"]] = HarnessItem(
            doc_id=sample["doc_id"],
            target=str(sample["target"]),
            prompts=tuple(str(arguments[0]) for arguments in sample["arguments"]),
            replies=tuple(replies[0] for replies in sample["resps"]),
            metrics={**(before.metrics if before else {}), **metrics},
        )
    return tuple(found.values())


def _aggregates(values: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """A task's metrics, and their standard errors."""
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in values.items():
        name, comma, kind = key.partition(",")
        if not comma or not isinstance(value, (int, float)):
            continue
        known = errors if name.endswith("_stderr") else metrics
        if _is_known(name, value):
            known[_key(name.removesuffix("_stderr"), kind)] = float(value)
    return metrics, errors


def _key(metric: str, kind: str) -> str:
    return metric if kind == "none" else f"{metric},{kind}"


def _is_known(metric: str, value: object) -> bool:
    """Whether it is a value of its own; RULER's metrics are prompt lengths, with -1 at those an item has not."""
    return isinstance(value, (int, float)) and not (metric.partition(",")[0].isdecimal() and value == -1)
