"""Many jobs on one model at once: rows join and leave a batch between two steps, long prefills let replies go on."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lazyllm.caches.lazy_cache import LazyCache
from lazyllm.callbacks import Callback, PieceEnd
from lazyllm.contexts.documents import Document
from lazyllm.contexts.prefixes import PrefixCache
from lazyllm.errors import Cancelled, Closed, ConfigError, DocumentGone, InputError, QueueFull, TooLong
from lazyllm.generation.options import Options
from lazyllm.models.families import input_device
from lazyllm.models.names import CACHE
from lazyllm.pipeline import LazyPipeline
from lazyllm.runtime import end_helper_threads, give_back_free_memory
from lazyllm.serving.jobs import DocumentLoaded, Event, Job
from lazyllm.serving.policies import NamedPipelines
from lazyllm.serving.replies import LOG, LoadTask, PromptTask, Reply, Task
from lazyllm.serving.sampling import Sampler
from lazyllm.serving.shelf import Shelf
from lazyllm.serving.texts import ReplyText

SHORTER = 4
"""A prompt goes before the one that is being computed when it has so many times fewer tokens."""
IDLE_SECONDS = 0.5
"""After so long with nothing to do the engine gives free memory back."""
SNAPSHOT_SECONDS = 0.2
"""How old `stats` may be while replies are made."""


@dataclass(frozen=True)
class EngineLimits:
    """How much an engine takes on.

    Attributes:
        running: most replies that are made at once.
        waiting: most jobs that wait; a further one is refused.
        piece: most tokens a layer of a prefill computes before running replies get a step.
        prefix_bytes: of what is kept of earlier prompts, used longest ago out first; 0 = nothing is kept.
        document_bytes: of loaded documents, used longest ago out first.
    """

    running: int = 16
    waiting: int = 64
    piece: int = 512
    prefix_bytes: int = 2**30
    document_bytes: int = 2**30


@dataclass(frozen=True)
class EngineStats:
    """What an engine is doing, and has done so far.

    Attributes:
        running: replies that are being made.
        waiting: jobs that wait for their prefill.
        jobs: jobs that have ended, by outcome: "done", "cancelled", "failed".
        prompt_tokens, cached_tokens, reply_tokens, revived_tokens: sums over the jobs that are done.
        prefix_entries, prefix_bytes: what is kept of earlier prompts.
        documents, document_bytes: documents that are loaded.
        kv_bytes, aux_bytes: what running replies hold.
        steps: decode steps so far.
    """

    running: int
    waiting: int
    jobs: Mapping[str, int]
    prompt_tokens: int
    cached_tokens: int
    reply_tokens: int
    revived_tokens: int
    prefix_entries: int
    prefix_bytes: int
    documents: int
    document_bytes: int
    kv_bytes: int
    aux_bytes: int
    steps: int


class Ticket:
    """A job that the engine has taken."""

    def __init__(self, task: Task, wake: Callable[[], None]) -> None:
        self._task, self._wake = task, wake

    def cancel(self) -> None:
        """Gives the job up: its memory is free after the running step or piece; it ends with `JobFailed`."""
        self._task.reason = self._task.reason or Cancelled()
        self._wake()


class Engine(NamedPipelines):
    """Runs jobs on one model in a thread of its own; what comes of them is handed to their `deliver`.

    Replies of one policy are one batch: a step computes the next token of each. A prefill runs by itself, layer by
    layer and piece by piece; between two pieces the replies get a step whenever the prefill has had as much time as
    their latest one took, and a much shorter prompt gets its turn. On the processor, other threads that compute with
    torch meanwhile slow it down by more than what they compute.

    Args:
        pipelines: by name, pipelines that share one model and tokenizer; the first is the default.
        limits: how much it takes on.

    Raises:
        ConfigError: for no pipeline, or several models.
    """

    def __init__(self, pipelines: Mapping[str, LazyPipeline], limits: EngineLimits | None = None) -> None:
        self.limits = limits or EngineLimits()
        if len({id(pipe.model) for pipe in pipelines.values()}) != 1:
            raise ConfigError(f"an engine has pipelines of one model, got {len(pipelines)} of several or none")
        super().__init__({name: _in_pieces(pipe, self.limits.piece) for name, pipe in pipelines.items()})
        self._batches: dict[str, list[Reply]] = {name: [] for name in self._pipelines}
        self._prefixes = PrefixCache(max_bytes=max(self.limits.prefix_bytes, 1))
        self._shelf = Shelf(self.limits.document_bytes)
        self._waiting: list[Task] = []
        self._computing: list[Task] = []  # prefills that have begun, each inside the one before
        self._changed = threading.Condition()
        self._closing: float | None = None
        self._jobs: Counter[str] = Counter()
        self._sums: Counter[str] = Counter()
        self._step_ended, self._step_seconds = 0.0, 0.0
        self._pace: float | None = None
        self._held, self._held_at = (0, 0), 0.0
        self._has_worked = False  # since free memory was given back
        end_helper_threads()  # of the thread that has loaded the model
        self._thread = threading.Thread(target=self._work, name="lazyllm-engine", daemon=True)
        self._thread.start()

    # -- asked by any thread -----------------------------------------------------------------------

    @property
    def words(self) -> int:
        """How many tokens the model knows."""
        return int(self.pipeline().model.get_input_embeddings().num_embeddings)

    def submit(self, job: Job, deliver: Callable[[Event], None]) -> Ticket:
        """Takes a job; may be called by any thread. `deliver` is called by the engine's, and must not wait.

        Raises:
            QueueFull: when as many jobs wait as may.
            TooLong: when the prompt and `max_tokens` need more positions than the model has.
            DocumentGone: when its document is not loaded (any more).
            InputError: when it cannot be done.
            Closed: when the engine is closed, or closing.
        """
        self._check(job)
        return self._take(PromptTask(job, deliver))

    def load(
        self,
        texts: Sequence[str],
        deliver: Callable[[Event], None],
        *,
        system: str | None = None,
        policy: str | None = None,
    ) -> Ticket:
        """Loads texts as one document for later jobs; as `submit`."""
        pipe = self.pipeline(policy)
        if not pipe.config.cache.revives:
            raise InputError(f"policy {policy or self._default!r} keeps no tokens that wait, so it loads no documents")
        tokens = sum(len(self.encode(text, policy=policy).token_ids) for text in texts)
        longest = pipe.max_positions
        if longest is not None and tokens >= longest:
            raise TooLong(f"the documents have {tokens} tokens, the model has positions for {longest}")
        return self._take(LoadTask(tuple(texts), system, policy, tokens, deliver))

    def document(self, name: str) -> Document:
        """A loaded document, whose `prompt(question)` a job with its id needs.

        Raises:
            DocumentGone: when it is not loaded (any more).
        """
        return self._shelf.get(name)

    @property
    def stats(self) -> EngineStats:
        """Counts; may be asked for by any thread."""
        prefixes = self._prefixes.stats
        kv_bytes, aux_bytes = self._held
        with self._changed:
            return EngineStats(
                running=sum(map(len, self._batches.values())),
                waiting=len(self._waiting),
                jobs=dict(self._jobs),
                prompt_tokens=self._sums["prompt_tokens"],
                cached_tokens=self._sums["cached_tokens"],
                reply_tokens=self._sums["reply_tokens"],
                revived_tokens=self._sums["revived_tokens"],
                prefix_entries=prefixes.entries,
                prefix_bytes=prefixes.bytes,
                documents=len(self._shelf),
                document_bytes=self._shelf.bytes,
                kv_bytes=kv_bytes,
                aux_bytes=aux_bytes,
                steps=self._sums["steps"],
            )

    @property
    def is_open(self) -> bool:
        """Whether it takes jobs."""
        return self._closing is None and self._thread.is_alive()

    def close(self, *, timeout: float | None = None) -> None:
        """Takes nothing new and refuses what waits; running replies go on to their end, for at most `timeout` seconds.

        The rest then ends with `JobFailed`. Returns when the thread has ended.
        """
        with self._changed:
            self._closing = sys.float_info.max if timeout is None else time.perf_counter() + timeout
            self._changed.notify_all()
        self._thread.join()

    def _check(self, job: Job) -> None:
        """Refuses what cannot be done, by anyone at any time."""
        pipe, ids, asked = self.pipeline(job.policy), job.prompt.token_ids, job.sampling
        words = self.words
        strange = [token for token in (*ids, *asked.logit_bias) if not 0 <= token < words]
        if strange:
            raise InputError(f"token id {strange[0]} is none of this model, which has 0 to {words - 1}")
        if not 1 <= job.replies <= self.limits.running:
            raise InputError(f"a job has 1 to {self.limits.running} replies here, not {job.replies}")
        if not ids:
            raise InputError("the prompt is empty; give at least one token")
        longest, wanted = pipe.max_positions, asked.max_tokens or 1
        if longest is not None and len(ids) + wanted > longest:
            raise TooLong(
                f"the prompt has {len(ids)} tokens and the reply may have {wanted}, that is {len(ids) + wanted} in "
                f"all; the model has positions for {longest}"
            )
        if job.document is not None:
            held = self.document(job.document)
            if held.pipe is not pipe:
                own, other = self.policy_of(held.pipe), self.policy_of(pipe)
                raise InputError(
                    f"document {job.document!r} was loaded by the policy {own!r}, and is asked by {other!r}"
                )
            if ids[: len(held)] != held.token_ids:
                raise InputError(f"the prompt does not begin with document {job.document!r}")

    def _take(self, task: Task) -> Ticket:
        with self._changed:
            if not self.is_open:
                raise Closed("the engine takes no more jobs")
            if len(self._waiting) >= self.limits.waiting:
                raise QueueFull(
                    f"{len(self._waiting)} jobs wait already, as many as may; try again later", self._patience()
                )
            self._waiting.append(task)
            self._changed.notify_all()
        return Ticket(task, self._wake)

    def _patience(self) -> float:
        """In how many seconds there may be room in the queue: when one of its jobs has been done."""
        return max(1.0, self._pace or 1.0)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # -- done by its own thread --------------------------------------------------------------------

    def _work(self) -> None:
        """Starts what waits, as far as there is room, and steps through what runs, until it is closed."""
        with torch.no_grad():
            while True:
                try:
                    if self._is_done():
                        return
                except Exception as error:  # of the engine's own: whoever waits for it must not wait for ever
                    LOG.exception("the engine failed; all its jobs end")
                    for reply in self._running():
                        self._fail(reply.task, error)

    def _is_done(self) -> bool:
        """Does the next thing there is to do, and says whether nothing can come any more."""
        self._drop_given_up()
        task = self._next()
        if task is not None:
            self._start(task)
        elif any(self._batches.values()):
            self._step()
        else:
            self._note_held()
            return self._is_over()
        return False

    def _is_over(self) -> bool:
        """Whether nothing can come any more; waits for something to do where something can."""
        with self._changed:
            if self._closing is not None:
                return not self._waiting
            if self._waiting or self._changed.wait(IDLE_SECONDS if self._has_worked else None):
                return False
        give_back_free_memory()
        self._has_worked = False
        return False

    def _next(self, most_tokens: int = sys.maxsize) -> Task | None:
        """Takes a task of at most so many tokens from the queue, if there is room for its replies: the first one."""
        with self._changed:
            running = sum(map(len, self._batches.values())) + sum(map(_replies, self._computing))
            for index, task in enumerate(self._waiting):
                if running + _replies(task) > self.limits.running:
                    return None  # nobody overtakes a job that waits for room
                if task.tokens <= most_tokens:
                    return self._waiting.pop(index)
        return None

    def _drop_given_up(self) -> None:
        """Ends the tasks that were given up, and all of them once time is over."""
        with self._changed:
            closing, over = self._closing is not None, self._closing is not None and time.perf_counter() > self._closing
            gone = [task for task in self._waiting if closing or task.reason is not None]
            self._waiting = [task for task in self._waiting if task not in gone]
        if over:
            for task in (*self._computing, *(reply.task for reply in self._running())):
                task.reason = task.reason or Closed("the engine was closed before the job was done")
        for task in gone:
            self._fail(task, task.reason or Closed("the engine takes no more jobs"))
        for task in {reply.task for reply in self._running() if reply.task.reason is not None}:
            self._fail(task, task.reason)

    def _running(self) -> list[Reply]:
        return [reply for batch in self._batches.values() for reply in batch]

    def _fail(self, task: Task, error: BaseException | None) -> None:
        """Ends a task with an error; its rows are gone."""
        for name, batch in self._batches.items():
            self._batches[name] = [reply for reply in batch if reply.task is not task]
        if isinstance(task, PromptTask):
            task.replies = []  # whoever holds the ticket does not hold the cache
        error = error or Cancelled()
        self._count(task, "cancelled" if isinstance(error, Cancelled) else "failed")
        task.fail(error)

    def _count(self, task: Task, outcome: str) -> None:
        """Counts a task that ends, before anybody is told."""
        with self._changed:
            self._jobs[outcome] += 1
        passed = time.perf_counter() - task.submitted
        self._pace = passed if self._pace is None else 0.9 * self._pace + 0.1 * passed

    # -- prefill -----------------------------------------------------------------------------------

    def _start(self, task: Task) -> None:
        """Computes the prompt of a task, whose replies then run, or its documents."""
        self._computing.append(task)
        self._has_worked = True
        try:
            task.check()
            if isinstance(task, PromptTask):
                self._prefill(task)
            elif isinstance(task, LoadTask):
                self._load(task)
        except Exception as error:
            if not isinstance(error, (InputError, Cancelled, Closed)):
                LOG.exception("a prefill failed")
            self._fail(task, error)
        finally:
            self._computing.remove(task)

    def _prefill(self, task: PromptTask) -> None:
        job, name = task.job, task.job.policy or self._default
        pipe, ids = self.pipeline(job.policy), task.job.prompt.token_ids
        task.started = time.perf_counter()
        cache = self._cache_for(task, pipe)
        task.cached = cache.columns
        before = _depth(cache)
        new = torch.tensor([ids[cache.columns :]], device=input_device(pipe.model))
        with (
            cache.claim("generation"),
            pipe.attached(callbacks=[_Between(self, task)], inside=True) as model,
            cache.replying([job.prompt.marks], len(ids)),
        ):
            logits = model(input_ids=new, **{CACHE: cache}, logits_to_keep=1).logits[0, -1]
        ledger = cache.rows[0].ledger
        task.computed = (_depth(cache) - before) / (ledger.layers * task.tokens)
        depths = ledger.depth[: task.tokens].clone()
        task.tell_depths(0, ledger.layers, torch.arange(task.tokens), depths)
        task.first = time.perf_counter()
        most = job.sampling.max_tokens or sys.maxsize
        if pipe.max_positions is not None:
            most = min(most, pipe.max_positions - task.tokens)
        caches = [cache, *(cache.fork() for _ in range(job.replies - 1))]
        task.replies = [
            Reply(
                task,
                number,
                own,
                Sampler(job.sampling, number),
                ReplyText(pipe.tokenizer, job.sampling.stop),
                most,
                depths,
            )
            for number, own in enumerate(caches)
        ]
        self._advance(name, task.replies, logits.expand(job.replies, -1))
        self._batches[name] += [reply for reply in task.replies if not reply.ended]

    def _cache_for(self, task: PromptTask, pipe: LazyPipeline) -> LazyCache:
        """The cache to begin with: a fork of the document's, what is kept of an earlier prompt, or an empty one."""
        if task.job.document is not None:
            return self.document(task.job.document).cache.fork()
        if self._keeps_prefixes(pipe):
            return self._prefixes.take(pipe.bound_cache(), pipe.config, task.job.prompt.token_ids)
        return pipe.new_cache()

    def _keeps_prefixes(self, pipe: LazyPipeline) -> bool:
        """Not where what one question left out would be lost for the next one."""
        cache = pipe.config.cache
        return self.limits.prefix_bytes > 0 and (cache.revives or not cache.prunes) and cache.eviction is None

    def _load(self, task: LoadTask) -> None:
        pipe = self.pipeline(task.policy)
        document = pipe.load(task.texts, system=task.system, callbacks=[_Between(self, task)])
        loaded = document.loaded
        assert loaded is not None, "it was loaded just now"
        name = self._shelf.add(document)
        held = loaded.kv_bytes + loaded.aux_bytes
        self._count(task, "done")
        task.tell(DocumentLoaded(name, loaded.tokens, loaded.depth, loaded.layers, loaded.seconds, held))

    def between(self, task: Task) -> None:
        """Lets others go on between two pieces of a prefill: replies when it is their turn, and much shorter prompts.

        Raises:
            Cancelled, Closed: when the task was given up.
        """
        self._drop_given_up()
        task.check()
        if time.perf_counter() - self._step_ended >= self._step_seconds and any(self._batches.values()):
            self._step()
        shorter = self._next(task.tokens // SHORTER)
        if shorter is not None:
            self._start(shorter)

    # -- decode ------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Every running reply goes on by one token."""
        began = time.perf_counter()
        for name, batch in list(self._batches.items()):
            if batch:
                self._step_batch(name, batch)
        self._step_ended = time.perf_counter()
        self._step_seconds = self._step_ended - began
        self._note_held()

    def _step_batch(self, name: str, batch: list[Reply]) -> None:
        """One step of the replies of a policy; where it fails, one of each, so that the others go on."""
        try:
            logits = self._logits(name, batch)
        except Exception as error:
            if len(batch) > 1:
                for reply in batch:
                    self._step_batch(name, [reply])
                return
            LOG.exception("a step failed")
            self._fail(batch[0].task, error)
            return
        self._sums["steps"] += 1
        self._advance(name, batch, logits)

    def _logits(self, name: str, batch: Sequence[Reply]) -> Tensor:
        """Logits [b, v] behind the last token of each reply."""
        pipe = self._pipelines[name]
        device = input_device(pipe.model)
        ids = torch.tensor([[reply.last_token] for reply in batch], device=device)
        positions = torch.tensor([[reply.position] for reply in batch], device=device)
        cache = LazyCache.beside([reply.cache for reply in batch])
        with pipe.attached(inside=True) as model:
            output = model(input_ids=ids, position_ids=positions, **{CACHE: cache}, logits_to_keep=1)
        for reply in batch:
            reply.note_depths()
        logits: Tensor = output.logits[:, -1]
        return logits

    def _advance(self, name: str, batch: Sequence[Reply], logits: Tensor) -> None:
        """Each reply takes its next token, chosen from logits [b, v]; those that are complete leave."""
        pipe = self._pipelines[name]
        ends = Options({}, pipe.model).end_token_ids
        likeliest = logits.argmax(-1).tolist()  # one transfer for all rows that ask for no more
        for reply, own, best in zip(batch, logits, likeliest, strict=True):
            token = best if reply.sampler.greedy else reply.sampler.draw(own)
            reply.take(own, token, pipe.tokenizer, ends)
        self._batches[name] = [reply for reply in self._batches[name] if not reply.ended]
        for task in {reply.task for reply in batch if reply.ended}:
            if all(reply.ended for reply in task.replies):
                self._end(task, pipe)

    def _end(self, task: PromptTask, pipe: LazyPipeline) -> None:
        """All replies of a task are complete: what they have computed may serve later ones."""
        usage = task.usage()
        with self._changed:
            for name in ("prompt_tokens", "cached_tokens", "reply_tokens", "revived_tokens"):
                self._sums[name] += getattr(usage, name)
        self._count(task, "done")
        cache, task.replies = task.replies[0].cache, []
        if task.job.document is not None:
            self._give_back(task.job.document, cache)
        elif self._keeps_prefixes(pipe):
            self._prefixes.put(cache, pipe.config)
        task.end(usage)

    def _give_back(self, name: str, cache: LazyCache) -> None:
        """Leaves with a document what a question has taken deeper."""
        try:
            document = self.document(name).fork()
        except DocumentGone:
            return  # it had to leave meanwhile
        cache.crop(len(document) - cache.columns)
        document.cache = cache
        self._shelf.deepen(name, document)

    def _note_held(self) -> None:
        """Bytes of the running replies, from time to time."""
        now = time.perf_counter()
        if now - self._held_at < SNAPSHOT_SECONDS and any(self._batches.values()):
            return
        caches = [reply.cache for reply in self._running()]
        self._held = sum(cache.kv_bytes for cache in caches), sum(cache.aux_bytes for cache in caches)
        self._held_at = now


class _Between(Callback):
    """Tells the engine whenever a prefill has computed a piece."""

    def __init__(self, engine: Engine, task: Task) -> None:
        self._engine, self._task = engine, task

    def on_piece_end(self, event: PieceEnd) -> None:
        """Lets others go on."""
        self._engine.between(self._task)


def _in_pieces(pipe: LazyPipeline, piece: int) -> LazyPipeline:
    """The same pipeline, whose layers compute at most `piece` tokens at once."""
    config = pipe.config.model_copy(update={"chunk": min(piece, pipe.config.chunk)})
    return LazyPipeline.from_config(config, pipe.model, pipe.tokenizer, callbacks=pipe.callbacks)


def _replies(task: Task) -> int:
    """How many replies a task makes."""
    return task.job.replies if isinstance(task, PromptTask) else 0


def _depth(cache: LazyCache) -> int:
    """Layer-tokens that a cache of one row, or none yet, has computed."""
    return sum(int(row.ledger.depth.sum()) for row in cache.rows)
