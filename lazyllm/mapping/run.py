"""The way of many prompts through a pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lazyllm.errors import InputError, LazyLLMError, unknown
from lazyllm.extras import needed
from lazyllm.generation.options import Options
from lazyllm.generation.result import GenerationResult
from lazyllm.mapping.identity import Addresses
from lazyllm.mapping.replies import Reply, ReplyFile
from lazyllm.models.names import CACHE_NAMES
from lazyllm.pipeline import LazyPipeline
from lazyllm.policies.query import Query
from lazyllm.prompts import EncodedPrompt, Prompt

Errors = Literal["raise", "return"]

WINDOW_BATCHES = 8
"""How many batches' tokens are looked at together, so that prompts of like length find each other."""
WINDOW_PROMPTS = 1024
"""Most prompts that are looked at together."""
REFUSED = {
    **dict.fromkeys(CACHE_NAMES, "each prompt has a cache of its own"),
    "streamer": "prompts are answered side by side; stream one with pipe.stream",
}


@dataclass(frozen=True)
class Task:
    """A prompt that is to be answered: the how many-th it is, its id, and its tokens."""

    index: int
    id: str
    encoded: EncodedPrompt

    @property
    def tokens(self) -> int:
        """How long it is."""
        return len(self.encoded.token_ids)


@dataclass
class Window:
    """Prompts that are looked at together.

    Attributes:
        tasks: those to be answered.
        replies: by index, what is there already.
        failures: by index, what is wrong with the others.
    """

    tasks: list[Task] = field(default_factory=list)
    replies: dict[int, Reply] = field(default_factory=dict)
    failures: dict[int, LazyLLMError] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Of the prompts to be answered."""
        return sum(task.tokens for task in self.tasks)

    def __len__(self) -> int:
        return len(self.tasks) + len(self.replies) + len(self.failures)


def packed(tasks: Iterable[Task], batch_tokens: int) -> list[list[Task]]:
    """Batches of at most so many tokens, shorter rows counted as long as the longest; a longer prompt is one alone.

    Prompts of like length come together, and the batch with the earliest prompt comes first.
    """
    batches: list[list[Task]] = []
    for task in sorted(tasks, key=lambda task: task.tokens):
        if batches and (len(batches[-1]) + 1) * task.tokens <= batch_tokens:
            batches[-1].append(task)
        else:
            batches.append([task])
    return sorted(batches, key=lambda batch: min(task.index for task in batch))


class PromptMap:
    """Answers many prompts, in order.

    Args:
        pipe: the pipeline.
        prompts: strings, token ids or chat messages, as many as there are; they are read as they are needed.
        query: what they ask, one for all or a list.
        batch_tokens: most tokens of a batch.
        out: a file that keeps the replies.
        progress: whether a bar shows how far it is.
        errors: whether a prompt that cannot be answered ends the map, or gives a reply that says why.
        options: those of transformers' `generate`.

    Raises:
        InputError: for what can be seen to be wrong before a prompt is read.
    """

    def __init__(
        self,
        pipe: LazyPipeline,
        prompts: Iterable[Prompt],
        *,
        query: Query | list[Query | None] | None = None,
        batch_tokens: int = 8192,
        out: str | Path | None = None,
        progress: bool = False,
        errors: Errors = "raise",
        options: Mapping[str, Any],
    ) -> None:
        self.pipe, self.options, self.errors = pipe, dict(options), errors
        self.out = None if out is None else Path(out)
        self._prompts, self._query, self._progress = prompts, query, progress
        self._check(batch_tokens)
        asked = Options(self.options, pipe.model)
        self._batch_tokens = 0 if asked.is_assisted else batch_tokens // asked.copies
        self._addresses = None if out is None else Addresses(pipe, {**self.options})

    def _check(self, batch_tokens: int) -> None:
        if isinstance(self._prompts, str):
            raise InputError(f"map takes many prompts, got one text: {self._prompts[:40]!r}")
        if self.errors not in ("raise", "return"):
            raise InputError(unknown("value of errors", self.errors, ("raise", "return")))
        if batch_tokens < 1:
            raise InputError(f"batch_tokens must be at least 1, got {batch_tokens}")
        for name, why in REFUSED.items():
            if self.options.get(name) is not None:
                raise InputError(f"map cannot take {name}: {why}")
        asked = Options(self.options, self.pipe.model)
        asked.check(1)
        if (asked.get("num_return_sequences") or 1) > 1:
            raise InputError("map gives one reply to each prompt; give a prompt as often as it is to be answered")
        if self._progress:
            needed("rich", what="progress=True", extra="cli")

    def run(self) -> Iterator[Reply]:
        """Replies in the order of the prompts; each is kept before it is given.

        Raises:
            LazyLLMError: with `errors="raise"`, when the turn of a prompt comes that cannot be answered.
        """
        total = len(self._prompts) if isinstance(self._prompts, Sized) else None
        with self._kept() as file, self._bar(total) as advance:
            known = {} if file is None else file.kept.replies
            for window in self._windows(known):
                for reply in self._answered(window, file):
                    advance()
                    if reply.error is not None and self.errors == "raise":
                        raise window.failures[reply.index]
                    yield reply

    def _windows(self, known: Mapping[str, Reply]) -> Iterator[Window]:
        """The prompts, encoded, so many at a time."""
        window = Window()
        for index, (prompt, query) in enumerate(self._asked()):
            try:
                encoded = self.pipe.encode(prompt, query=query)
            except LazyLLMError as error:
                window.failures[index] = error
            else:
                name = "" if self._addresses is None else self._addresses.of(encoded)
                if name in known:
                    window.replies[index] = _at(known[name], index)
                else:
                    window.tasks.append(Task(index, name, encoded))
            if window.tokens >= WINDOW_BATCHES * self._batch_tokens or len(window) >= WINDOW_PROMPTS:
                yield window
                window = Window()
        if len(window):
            yield window

    def _asked(self) -> Iterator[tuple[Prompt, Query | None]]:
        """Every prompt with its query."""
        if not isinstance(self._query, list):
            yield from ((prompt, self._query) for prompt in self._prompts)
            return
        queries = iter(self._query)
        missing = object()
        for prompt in self._prompts:
            if (query := next(queries, missing)) is missing:
                raise InputError(
                    f"there are more prompts than the {len(self._query)} queries; give one for all, or each"
                )
            yield prompt, query  # type: ignore[misc]

    def _answered(self, window: Window, file: ReplyFile | None) -> Iterator[Reply]:
        """The replies of a window, in order, each as soon as all before it are there."""
        there = dict(window.replies)
        there |= {index: Reply("", index, error=str(error)) for index, error in window.failures.items()}
        turn = min([*there, *(task.index for task in window.tasks)])
        for batch in [[], *packed(window.tasks, self._batch_tokens)]:
            new = self._batch(batch, window)
            if file is not None and new:
                file.add(new)
            there |= {reply.index: reply for reply in new}
            while turn in there:
                yield there.pop(turn)
                turn += 1

    def _batch(self, batch: Sequence[Task], window: Window) -> list[Reply]:
        """The replies of a batch; where it fails, each of its prompts is tried alone."""
        if not batch:
            return []
        try:
            results = self.pipe.reply([task.encoded for task in batch], self.options)
        except LazyLLMError as error:
            if len(batch) > 1:
                return [reply for task in batch for reply in self._batch([task], window)]
            window.failures[batch[0].index] = error
            return [Reply(batch[0].id, batch[0].index, prompt_tokens=batch[0].tokens, error=str(error))]
        return [_reply(task, result) for task, result in zip(batch, results, strict=True)]

    @contextmanager
    def _kept(self) -> Iterator[ReplyFile | None]:
        with nullcontext() if self.out is None else ReplyFile.opened(self.out) as file:
            for notice in [] if file is None else file.kept.notices:
                warnings.warn(notice, stacklevel=4)
            yield file

    @contextmanager
    def _bar(self, total: int | None) -> Iterator[Callable[[], None]]:
        if not self._progress:
            yield lambda: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("prompts", total=total)
            yield lambda: bar.advance(task)


def _reply(task: Task, result: GenerationResult) -> Reply:
    stats = result.stats
    tokens = tuple(result.token_ids)
    return Reply(task.id, task.index, result.text, tokens, stats.prompt_tokens, stats.computed_fraction)


def _at(reply: Reply, index: int) -> Reply:
    """A reply that is kept, as the one to the prompt at `index`."""
    return Reply(**{**vars(reply), "index": index})
