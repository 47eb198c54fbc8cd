"""The public face: a model, a tokenizer and three policies that work together."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from lazyllm.caches import CachePolicy, LazyCache
from lazyllm.caches.row import PromptMarks
from lazyllm.caches.saved import load_cache
from lazyllm.callbacks import Callback, GenerateEnd
from lazyllm.config import LazyConfig
from lazyllm.errors import AttachError, CacheError, ConfigError, InputError, LazyLLMError
from lazyllm.generation import Options, reply_tokens
from lazyllm.models.attach import attached, check_model
from lazyllm.models.families import DecoderContract, contract_of
from lazyllm.models.flops import flop_model
from lazyllm.models.layers import CompiledLayers, RunLayer, run_layer
from lazyllm.models.loading import load_model
from lazyllm.models.reader import Reader, open_readers
from lazyllm.models.stack import Missing
from lazyllm.policies.base import Schedule, Scorer
from lazyllm.policies.protect import Protect
from lazyllm.policies.query import Query, TokenRange, check_query
from lazyllm.policies.select import Selector
from lazyllm.prompts import EncodedPrompt, Prompt, encode, is_batch, pad_left
from lazyllm.result import GenerationResult, GenerationStats, StepRecorder, make_stats

if TYPE_CHECKING:
    from lazyllm.mapping import Reply


class LazyPipeline:
    """Prunes, revives and generates with any Hugging Face decoder, as its policies say.

    Without a model it is a recipe: `recipe.bind(model, tokenizer)` gives the pipeline for a model.

    Args:
        model: a causal LM of transformers; None makes a recipe.
        tokenizer: its tokenizer; None allows token ids only.
        scorer: importance of each context token for the next token.
        schedule: fraction of the context that may enter each layer.
        cache: what happens to pruned tokens, and what is attended.
        protect: tokens that are never pruned.
        chunk: most tokens a layer computes at once.
        compile: whether steps of one token run compiled layers.
        callbacks: told about layers, steps and generations.

    Raises:
        ConfigError: when the policies do not fit each other or the model.
        UnsupportedModelError: when the model does not follow the layer contract.
    """

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        scorer: Scorer | str | Mapping[str, Any] | None = None,
        schedule: Schedule | str | Mapping[str, Any] | None = None,
        cache: CachePolicy | str | Mapping[str, Any] | None = None,
        protect: Protect | Mapping[str, Any] | None = None,
        chunk: int | None = None,
        compile: bool | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config = LazyConfig(
            **_given(scorer=scorer, schedule=schedule, cache=cache, protect=protect, chunk=chunk, compile=compile)
        )
        self.tokenizer = tokenizer
        self.callbacks = tuple(callbacks)
        self._model = model
        self._run: RunLayer = CompiledLayers() if self.config.compile else run_layer
        if model is not None:
            self._take(check_model(model))

    # -- making one --------------------------------------------------------------------------------

    @classmethod
    def from_config(
        cls,
        config: LazyConfig | Mapping[str, Any],
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        callbacks: Sequence[Callback] = (),
    ) -> LazyPipeline:
        """A pipeline, or a recipe, from a configuration."""
        config = config if isinstance(config, LazyConfig) else LazyConfig(**config)
        return cls(model, tokenizer, **dict(config), callbacks=callbacks)

    @classmethod
    def from_preset(
        cls,
        name: str | Path,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        callbacks: Sequence[Callback] = (),
    ) -> LazyPipeline:
        """A pipeline, or a recipe, from a shipped preset or the path of a configuration file."""
        return cls.from_config(LazyConfig.preset(name), model, tokenizer, callbacks=callbacks)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        gguf_file: str | None = None,
        dtype: torch.dtype | str = "auto",
        device_map: Any = None,
        weights: str | None = None,
        preset: str | Path | None = None,
        scorer: Scorer | str | Mapping[str, Any] | None = None,
        schedule: Schedule | str | Mapping[str, Any] | None = None,
        cache: CachePolicy | str | Mapping[str, Any] | None = None,
        protect: Protect | Mapping[str, Any] | None = None,
        chunk: int | None = None,
        compile: bool | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> LazyPipeline:
        """Loads a model and its tokenizer from a hub id, a folder or a GGUF file.

        Policies that are given replace those of the preset; without a preset the others are the paper's. `weights` is
        "int4" or "int8" for linear layers in so many bits.
        """
        base = dict(LazyConfig.preset(preset)) if preset is not None else {}
        own = _given(scorer=scorer, schedule=schedule, cache=cache, protect=protect, chunk=chunk, compile=compile)
        recipe = cls(**{**base, **own}, callbacks=callbacks)
        loaded = load_model(path_or_id, gguf_file=gguf_file, dtype=dtype, device_map=device_map, weights=weights)
        return recipe.bind(*loaded)

    def bind(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> LazyPipeline:
        """The same policies for another model."""
        return type(self).from_config(self.config, model, tokenizer, callbacks=self.callbacks)

    @property
    def model(self) -> PreTrainedModel:
        """The model.

        Raises:
            ConfigError: when this is a recipe.
        """
        if self._model is None:
            raise ConfigError("this pipeline has no model; make one with recipe.bind(model, tokenizer)")
        return self._model

    # -- running it --------------------------------------------------------------------------------

    def new_cache(self, *, marks: Sequence[PromptMarks] = ()) -> LazyCache:
        """An empty cache for one batch.

        Args:
            marks: what is known about the prompts, one each, such as `pipe.encode(prompt).marks`.
        """
        return LazyCache(self.config.cache, marks=marks)

    def load_cache(self, path: str | Path) -> LazyCache:
        """The cache that was saved to a file with `cache.save`, on this model's devices.

        Raises:
            CacheError: when there is no such file, it is damaged or was changed, or it comes from another version of
                the format, another model, or another cache policy than this pipeline's.
        """
        try:
            contract = contract_of(self.model, known=self._contract)
        except AttachError:
            contract = self._contract  # read when the model was attached
        return load_cache(path, self.config.cache, contract.decoder, contract.devices)

    @contextmanager
    def attached(self, *, callbacks: Sequence[Callback] = (), missing: Missing = "error") -> Iterator[PreTrainedModel]:
        """The model, running lazily for as long as the context lasts, for a generation loop of your own.

        Args:
            callbacks: in addition to the pipeline's own.
            missing: what to do when logits of pruned positions are asked for, "error" or "nan".

        Raises:
            AttachError: when the model is attached already.
            ConfigError, UnsupportedModelError: when it has changed and no longer fits.
        """
        contract = contract_of(self.model, known=self._contract)
        if contract is not self._contract:
            self._take(contract)
        everyone = (*self.callbacks, *callbacks)
        chunk, run = self.config.chunk, self._run
        with attached(self.model, contract, self._selector, everyone, missing=missing, chunk=chunk, run=run):
            yield self.model

    def generate(
        self, prompt: Prompt, *, query: Query | list[Query] | None = None, **options: Any
    ) -> GenerationResult | list[GenerationResult]:
        """Generates a reply to a prompt, or to each of a list of prompts as one batch.

        Args:
            prompt: a string, token ids or chat messages; or a list of these.
            query: what the prompt asks, instead of what the scorer would take for it: a substring of the prompt, a
                token range, a number of tokens at the end, or "auto"; for a batch one for all, or a list. Protected.
            options: those of transformers' `generate` (docs/generation.md); `past_key_values` continues a LazyCache.

        Returns:
            One result for one prompt, a list for a list or for `num_return_sequences` > 1, those of a prompt together.

        Raises:
            InputError, CacheError, ConfigError: before the model is touched, where that is possible.
        """
        started = time.perf_counter()
        many = is_batch(prompt)
        results = self.reply(self._encode(prompt if many else [prompt], query), options, started=started)
        return results if many or len(results) > 1 else results[0]

    def reply(
        self, prompts: Sequence[EncodedPrompt], options: Mapping[str, Any], *, started: float | None = None
    ) -> list[GenerationResult]:
        """Generates replies to prompts that `encode` has read, as one batch.

        Args:
            prompts: the prompts.
            options: as for `generate`.
            started: when the call began that times are counted from; now, where it is not given.

        Raises:
            InputError, CacheError, ConfigError: before the model is touched, where that is possible.
        """
        started = time.perf_counter() if started is None else started
        cache, asked = self._cache_in(options), Options(options, self.model)
        self._check_length(prompts)
        asked.check(len(prompts))
        ids, mask = pad_left(prompts, asked.pad_token_id, self.model.device)
        clock, recorder = TokenClock(self.model.device), StepRecorder(self._contract.windows)
        given = {**asked.for_model(self.tokenizer), "past_key_values": cache}
        given["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or ()), clock])
        read_before = self._read_flops
        with cache.claim("generation"), self.attached(callbacks=[recorder]) as lazy:
            if cache.columns >= ids.shape[1]:
                raise InputError(
                    f"the prompt has {ids.shape[1]} tokens, its cache already holds {cache.columns}; "
                    "give the whole conversation, what the cache holds and what is new"
                )
            marks = [prompt.marks for prompt in prompts]
            with cache.replying(marks, ids.shape[1], copies=asked.copies), _refusing(recorder):
                output = lazy.generate(ids, attention_mask=mask, **given)
        recorder.kv_bytes, recorder.aux_bytes = cache.kv_bytes, cache.aux_bytes
        recorder.reading_flops = self._read_flops - read_before
        results = self._results(output, prompts, ids.shape[1], recorder, clock, started, asked)
        for callback in self.callbacks:
            callback.on_generate_end(GenerateEnd(tuple(results)))
        return results

    def map(
        self,
        prompts: Iterable[Prompt],
        *,
        query: Query | list[Query | None] | None = None,
        batch_tokens: int = 8192,
        out: str | Path | None = None,
        progress: bool = False,
        errors: Literal["raise", "return"] = "raise",
        **options: Any,
    ) -> Iterator[Reply]:
        """Answers many prompts, one after the other as they are asked for; nothing runs before that.

        Prompts of like length share a batch. With greedy decoding a reply is the same in every batch.

        Args:
            prompts: strings, token ids or chat messages; an iterator is read as its prompts are needed.
            query: what they ask, as for `generate`: one for all, or a list.
            batch_tokens: most tokens of a batch, shorter rows counted as long as the longest.
            out: a file to which every reply is appended, as one JSON line; what stands there is not computed again.
            progress: whether a bar on stderr shows how far it is, and the time left.
            errors: "raise" ends with the first prompt that cannot be answered, when its turn comes; "return" gives a
                reply with `error` in its place.
            options: as for `generate`.

        Returns:
            One reply for each prompt, in order.

        Raises:
            InputError: for what can be seen to be wrong at once; other errors come from the iterator.
        """
        from lazyllm.mapping import PromptMap  # which needs this class

        return PromptMap(
            self, prompts, query=query, batch_tokens=batch_tokens, out=out, progress=progress, errors=errors,
            options=options,
        ).run()  # fmt: skip

    def encode(self, prompt: Prompt, *, query: Query | None = None) -> EncodedPrompt:
        """Token ids of one prompt, its protected ranges and its query, as `generate` would take them.

        Raises:
            InputError: when it cannot be used.
        """
        return self._encode([prompt], query)[0]

    def find(self, prompt: Prompt, passages: Sequence[str]) -> tuple[TokenRange, ...]:
        """Token ranges of passages of a prompt, the first occurrence of each.

        Raises:
            InputError: when one does not occur.
        """
        return encode(prompt, self.tokenizer, Protect(spans=tuple(passages)), None).marks.protected

    def stream(self, prompt: Prompt, **options: Any) -> TextStream:
        """Generates in the background and yields text as it comes; `.result` holds the rest.

        Raises:
            InputError: for a batch, or without a tokenizer.
        """
        if is_batch(prompt) or self.tokenizer is None:
            raise InputError("stream takes one prompt, and needs a tokenizer to yield text")
        return TextStream(self, prompt, options)

    # -- helpers -----------------------------------------------------------------------------------

    def _take(self, contract: DecoderContract) -> None:
        """Keeps the model's contract, and what follows from it, until another one is read off the model."""
        config = self.config
        config.check_model(self.model, self.tokenizer)
        self._contract = contract
        eviction = config.cache.eviction
        scorers = [config.scorer] if eviction is None else [config.scorer, eviction.scorer]
        names = list(dict.fromkeys(name for scorer in scorers for name in scorer.reads_models))
        self._readers = open_readers(names, self.model, self.tokenizer, contract)
        layers, reads = len(contract.layers), self._readers
        self._selector = Selector(config.scorer, config.schedule, config.protect, layers, reads=reads)
        self._costs = flop_model(self.model, contract)

    def _cache_in(self, options: Mapping[str, Any]) -> LazyCache:
        """The cache that options continue, or a new one."""
        cache = options.get("past_key_values")
        if cache is not None and not isinstance(cache, LazyCache):
            raise CacheError(f"past_key_values must be a LazyCache from new_cache(), got {type(cache).__name__}")
        return self.new_cache() if cache is None else cache

    @property
    def readers(self) -> Mapping[str | None, Reader]:
        """Language models that read prompts for scorers, by name; None is the model itself."""
        return self._readers

    @property
    def _read_flops(self) -> int:
        """Operations that language models have done for scorers so far."""
        return sum(reader.flops for reader in self._readers.values())

    def _encode(self, prompts: Sequence[Prompt], query: Query | list[Query] | None) -> list[EncodedPrompt]:
        queries = query if isinstance(query, list) else [query] * len(prompts)
        if len(queries) != len(prompts):
            raise InputError(f"{len(queries)} queries for {len(prompts)} prompts; give one for all, or one each")
        own = self.config.scorer.reads_query
        return [
            encode(prompt, self.tokenizer, self.config.protect, own if asked is None else check_query(asked))
            for prompt, asked in zip(prompts, queries, strict=True)
        ]

    def _check_length(self, prompts: Sequence[EncodedPrompt]) -> None:
        longest = self._contract.max_positions
        for prompt in prompts:
            if longest is not None and len(prompt.token_ids) > longest:
                raise InputError(
                    f"the prompt has {len(prompt.token_ids)} tokens, the model has positions for {longest}"
                )

    def _results(
        self,
        output: Any,
        prompts: Sequence[EncodedPrompt],
        width: int,
        recorder: StepRecorder,
        clock: TokenClock,
        started: float,
        asked: Options,
    ) -> list[GenerationResult]:
        sequences: Tensor = output if isinstance(output, Tensor) else output.sequences
        padding = asked.padding if sequences.shape[0] > 1 else None
        each = sequences.shape[0] // len(prompts)
        peak = peak_bytes(self.model.device)
        results = []
        for index, sequence in enumerate(sequences.tolist()):
            prompt = index // each
            new = reply_tokens(sequence[width:], asked.end_token_ids, padding)
            per_prompt = len(recorder.steps[0]) // len(prompts)
            rows = range(prompt * per_prompt, (prompt + 1) * per_prompt)
            stats = make_stats(
                [[step[row] for step in recorder.steps] for row in rows],
                self._costs,
                recorder,
                prompt_tokens=len(prompts[prompt].token_ids),
                new_tokens=len(new),
                clock=clock,
                started=started,
                peak_bytes=peak,
            )
            text = self.tokenizer.decode(new, skip_special_tokens=True) if self.tokenizer is not None else ""
            results.append(
                GenerationResult(cast(str, text), new, stats, None if isinstance(output, Tensor) else output)
            )
        return results


def _given(**fields: Any) -> dict[str, Any]:
    """The fields that were given."""
    return {name: value for name, value in fields.items() if value is not None}


@contextmanager
def _refusing(recorder: StepRecorder) -> Iterator[None]:
    """Errors of transformers about what it was asked for, before the model runs, are errors of ours.

    Raises:
        InputError: with what transformers says.
    """
    try:
        yield
    except ValueError as error:
        if recorder.has_begun or isinstance(error, LazyLLMError):
            raise
        raise InputError(f"generate cannot do this: {error}") from error


class TextStream:
    """Pieces of a reply as they come, and its result once they have all come.

    Leaving the loop early and calling `close()` ends the generation after the running step.
    """

    def __init__(self, pipeline: LazyPipeline, prompt: Prompt, options: dict[str, Any]) -> None:
        tokenizer = cast(Any, pipeline.tokenizer)
        self._pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stop = _StopSwitch()
        self._outcome: GenerationResult | BaseException | None = None
        criteria = [*(options.get("stopping_criteria") or ()), self._stop]
        options = {**options, "streamer": self._pieces, "stopping_criteria": StoppingCriteriaList(criteria)}
        self._thread = threading.Thread(target=self._run, args=(pipeline, prompt, options), daemon=True)
        self._thread.start()

    def _run(self, pipeline: LazyPipeline, prompt: Prompt, options: dict[str, Any]) -> None:
        try:
            self._outcome = cast(GenerationResult, pipeline.generate(prompt, **options))
        except BaseException as error:
            self._outcome = error
            self._pieces.end()

    def __iter__(self) -> Iterator[str]:
        try:
            for piece in self._pieces:
                if piece:
                    yield piece
        except GeneratorExit:
            self.close()
            raise
        self.result  # noqa: B018 - raises what the generation raised

    def close(self) -> None:
        """Ends the generation after the running step and waits for it."""
        self._stop.pulled = True
        self._thread.join()

    @property
    def result(self) -> GenerationResult:
        """The whole reply; waits for it, and raises what the generation raised."""
        self._thread.join()
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome


class _StopSwitch(StoppingCriteria):
    """Ends a generation from outside."""

    pulled = False

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.pulled, device=input_ids.device, dtype=torch.bool)


class TokenClock(StoppingCriteria):
    """Reads the clock whenever new tokens have come, one or several; stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []
        self._lengths: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        """Notes the time."""
        if not self.times and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())
        self._lengths.append(input_ids.shape[1])
        return torch.zeros(input_ids.shape[0], device=input_ids.device, dtype=torch.bool)

    @property
    def seconds_per_token(self) -> float | None:
        """Mean time from one token to the next; None when all came at once."""
        tokens = self._lengths[-1] - self._lengths[0]
        return (self.times[-1] - self.times[0]) / tokens if tokens else None


def peak_bytes(device: torch.device) -> int:
    """Peak of allocated memory on CUDA, else of the process's resident memory; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not a POSIX system
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


__all__ = ["GenerationStats", "LazyPipeline", "TextStream"]
