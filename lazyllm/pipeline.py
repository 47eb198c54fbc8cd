"""The public face: a model, a tokenizer and three policies that work together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from lazyllm.caches import CachePolicy, LazyCache
from lazyllm.caches.row import PromptMarks
from lazyllm.caches.saved import load_cache
from lazyllm.callbacks import Callback, GenerateEnd
from lazyllm.config import LazyConfig
from lazyllm.contexts.conversation import Conversation, Documents, Overflow
from lazyllm.contexts.conversation_file import load_conversation
from lazyllm.contexts.documents import LAYOUT, Document, load_document, open_document
from lazyllm.contexts.prefixes import PrefixCache
from lazyllm.contexts.turns import Tool
from lazyllm.errors import AttachError, CacheError, ConfigError, InputError, LazyLLMError
from lazyllm.generation.clock import TokenClock, peak_bytes
from lazyllm.generation.options import Options, reply_tokens
from lazyllm.generation.result import GenerationResult, Lengths, StepRecorder, make_stats
from lazyllm.generation.streams import TextStream
from lazyllm.models.adapters import unwrapped
from lazyllm.models.attach import attached, check_model, turn_of
from lazyllm.models.families import DecoderContract, contract_of, input_device
from lazyllm.models.flops import flop_model
from lazyllm.models.layers import CompiledLayers, RunLayer, run_layer
from lazyllm.models.loading import load_model
from lazyllm.models.names import CACHE, CACHE_NAMES, cache_in
from lazyllm.models.reader import Reader, open_readers
from lazyllm.models.stack import Missing
from lazyllm.policies.base import Schedule, Scorer
from lazyllm.policies.depth_limit import DepthLimit
from lazyllm.policies.protect import Protect
from lazyllm.policies.query import Query, TokenRange, check_query
from lazyllm.policies.select import Selector
from lazyllm.prompts import EncodedPrompt, Prompt, encode, is_batch, pad_left

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

    readers: dict[str | None, Reader]
    """Language models that read prompts for the scorers, by path or hub id; None is the pipeline's own."""

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
        self._model = None if model is None else unwrapped(model)
        self._run: RunLayer = CompiledLayers() if self.config.compile else run_layer
        if self._model is not None:
            with turn_of(self._model):
                self._take(check_model(self._model))

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

    @property
    def max_positions(self) -> int | None:
        """How many positions the model has; None = no limit is known."""
        return self._contract.max_positions

    # -- running it --------------------------------------------------------------------------------

    def new_cache(self, *, marks: Sequence[PromptMarks] = ()) -> LazyCache:
        """An empty cache for one batch.

        Args:
            marks: what is known about the prompts, one each, such as `pipe.encode(prompt).marks`.
        """
        return LazyCache(self.config.cache, marks=marks)

    def bound_cache(self) -> LazyCache:
        """An empty cache that belongs to this model already."""
        cache = self.new_cache()
        cache.bind(self._contract.decoder)
        return cache

    def load_cache(self, path: str | Path) -> LazyCache:
        """The cache that was saved to a file with `cache.save`, on this model's devices.

        Raises:
            CacheError: when there is no such file, it is damaged or was changed, or it comes from another version of
                the format, another model, or another cache policy than this pipeline's.
        """
        return self.load_noted_cache(path)[0]

    def load_noted_cache(self, path: str | Path, *, mapped: bool = False) -> tuple[LazyCache, str]:
        """As `load_cache`, with the note that `cache.save` was given.

        Args:
            path: the file.
            mapped: leave what stays on the CPU in the file, from which the system reads it as it is needed. The file
                may be replaced or removed meanwhile, but must not be written to.
        """
        try:
            contract = contract_of(self.model, known=self._contract)
        except AttachError:
            contract = self._contract  # read when the model was attached
        return load_cache(path, self.config.cache, contract.decoder, contract.devices, contract.adapters, mapped=mapped)

    @contextmanager
    def attached(
        self, *, callbacks: Sequence[Callback] = (), missing: Missing = "error", inside: bool = False
    ) -> Iterator[PreTrainedModel]:
        """The model, running lazily for as long as the context lasts, for a generation loop of your own.

        Threads take turns: where another one has the model attached, this one waits.

        Args:
            callbacks: in addition to the pipeline's own.
            missing: what to do when logits of pruned positions are asked for, "error" or "nan".
            inside: also where this thread has attached the model already, for a callback that runs steps of other
                caches while a prefill waits (`Callback.on_piece_end`).

        Raises:
            AttachError: when this thread has attached the model already.
            ConfigError, UnsupportedModelError: when it has changed and no longer fits.
        """
        turn = turn_of(self.model)
        if inside and turn.is_own:
            with self._attached(self._selector, callbacks, missing):
                yield self.model
            return
        with turn:
            self._refresh()
            with self._attached(self._selector, callbacks, missing):
                yield self.model

    @contextmanager
    def loading(
        self, depth: int | None = None, *, callbacks: Sequence[Callback] = ()
    ) -> Iterator[tuple[PreTrainedModel, int]]:
        """The model, taking every token through its first layers only, for documents that wait for a question.

        Args:
            depth: number of layers; None = as many as every question computes for all tokens, which is up to the
                first layer after layer 0 before which the schedule cuts.
            callbacks: in addition to the pipeline's own.

        Yields:
            The model, whose logits are NaN, and the number of layers.

        Raises:
            ConfigError: when the cache keeps no waiting tokens, or the model has fewer layers.
            AttachError: when this thread has attached the model already.
        """
        with turn_of(self.model):
            self._refresh()
            depth = self._loaded_depth(depth)
            with self._attached(DepthLimit(self._selector, depth), callbacks, "nan"):
                yield self.model, depth

    def _loaded_depth(self, depth: int | None) -> int:
        """How many layers load a document."""
        layers = len(self._contract.layers)
        if depth is None:
            depth = min((layer for layer in self._selector.cut_layers if layer), default=layers)
        if not 0 <= depth <= layers:
            raise ConfigError(f"depth {depth} of {layers} layers: a document is loaded 0 to {layers} layers deep")
        if depth < layers and not self.config.cache.revives:
            raise ConfigError(
                f"{type(self.config.cache).__name__} keeps no tokens that wait, so a document cannot be loaded "
                f"{depth} of {layers} layers deep; use a cache that revives, such as AuxCache"
            )
        return depth

    def _attached(
        self, selector: Selector | DepthLimit, callbacks: Sequence[Callback], missing: Missing
    ) -> AbstractContextManager[Any]:
        everyone, chunk = (*self.callbacks, *callbacks), self.config.chunk
        return attached(self.model, self._contract, selector, everyone, missing=missing, chunk=chunk, run=self._run)

    def _refresh(self) -> None:
        """Reads the model's contract anew where it has changed."""
        contract = contract_of(self.model, known=self._contract)
        if contract is not self._contract:
            self._take(contract)

    def generate(
        self,
        prompt: Prompt,
        *,
        query: Query | list[Query] | None = None,
        prefixes: PrefixCache | None = None,
        callbacks: Sequence[Callback] = (),
        **options: Any,
    ) -> GenerationResult | list[GenerationResult]:
        """Generates a reply to a prompt, or to each of a list of prompts as one batch.

        Args:
            prompt: a string, token ids, chat messages or what `encode` gave; or a list of these.
            query: what the prompt asks, instead of what the scorer would take for it: a substring of the prompt, a
                token range, a number of tokens at the end, or "auto"; for a batch one for all, or a list. Protected.
            prefixes: where to find what an earlier call has computed of the same beginning; one prompt only.
            callbacks: in addition to the pipeline's own.
            options: those of transformers' `generate` (docs/generation.md); `past_key_values` continues a LazyCache.

        Returns:
            One result for one prompt, a list for a list or for `num_return_sequences` > 1, those of a prompt together.

        Raises:
            InputError, CacheError, ConfigError: before the model is touched, where that is possible.
        """
        started = time.perf_counter()
        many = is_batch(prompt)
        encoded = self._encode(prompt if many else [prompt], query)
        results = self.reply(encoded, options, prefixes=prefixes, callbacks=callbacks, started=started)
        return results if many or len(results) > 1 else results[0]

    def reply(
        self,
        prompts: Sequence[EncodedPrompt],
        options: Mapping[str, Any],
        *,
        prefixes: PrefixCache | None = None,
        callbacks: Sequence[Callback] = (),
        started: float | None = None,
    ) -> list[GenerationResult]:
        """Generates replies to prompts that `encode` has read, as one batch.

        Args:
            prompts: the prompts.
            options, prefixes, callbacks: as for `generate`.
            started: when the call began that times are counted from; now, where it is not given.

        Raises:
            InputError, CacheError, ConfigError: before the model is touched, where that is possible.
        """
        started = time.perf_counter() if started is None else started
        asked = Options(options, self.model)
        self._check_length(prompts)
        asked.check(len(prompts))
        cache = self._cache_for(prompts, prefixes, asked)
        held = [len(row.ledger) for row in cache.rows]
        ids, mask = pad_left(prompts, asked.pad_token_id, input_device(self.model))
        clock, recorder = TokenClock(self.model.device), StepRecorder(self._contract.windows)
        given = {name: one for name, one in asked.for_model(self.tokenizer).items() if name not in CACHE_NAMES}
        given[CACHE] = cache
        given["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or ()), clock])
        with cache.claim("generation"), self.attached(callbacks=[recorder, *callbacks]) as lazy:
            read_before = self._read_flops
            if cache.columns >= ids.shape[1]:
                raise InputError(
                    f"the prompt has {ids.shape[1]} tokens, its cache already holds {cache.columns}; "
                    "give the whole conversation, what the cache holds and what is new"
                )
            marks = [prompt.marks for prompt in prompts]
            with cache.replying(marks, ids.shape[1], copies=asked.copies), _refusing(recorder):
                output = lazy.generate(ids, attention_mask=mask, **given)
            recorder.reading_flops = self._read_flops - read_before
        recorder.kv_bytes, recorder.aux_bytes = cache.kv_bytes, cache.aux_bytes
        results = self._results(output, prompts, held, recorder, clock, started, asked)
        if prefixes is not None:
            prefixes.put(cache, self.config)
        for callback in (*self.callbacks, *callbacks):
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

    # -- documents ---------------------------------------------------------------------------------

    def load(
        self,
        texts: str | Sequence[str],
        *,
        layout: str = LAYOUT,
        system: str | None = None,
        depth: int | None = None,
        start: int = 0,
        callbacks: Sequence[Callback] = (),
    ) -> Document:
        """Documents that wait, a few layers deep, for questions that take deeper what they need.

        Args:
            texts: one text, or several in this order.
            layout: the user's message, with `{documents}` before `{question}`.
            system: a system message before it.
            depth: how many layers compute the documents now, see `loading`.
            start: position of the first token; above 0, a part to be joined behind another, without what the chat
                template puts before it.
            callbacks: in addition to the pipeline's own.

        Raises:
            InputError: for texts, a layout or a template that cannot be used, or more tokens than positions.
            ConfigError: when the cache keeps no tokens that wait.
        """
        return load_document(self, texts, layout=layout, system=system, depth=depth, start=start, callbacks=callbacks)

    def open(self, path: str | Path, *, mapped: bool = True) -> Document:
        """The document that was saved to a file with `document.save`.

        Args:
            path: the file.
            mapped: leave what stays on the CPU in the file, from which the system reads it as it is needed. The file
                may be replaced or removed meanwhile, but must not be written to.

        Raises:
            CacheError: when there is no such file, it is damaged or was changed, or does not fit this pipeline.
        """
        return open_document(self, path, mapped=mapped)

    # -- prompts -----------------------------------------------------------------------------------

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
        return self.stream_of(partial(self.generate, prompt), options)

    def stream_of(self, generate: Callable[..., Any], options: Mapping[str, Any]) -> TextStream:
        """What `generate(**options)` generates with this model, as a stream.

        Raises:
            AttachError: when this thread has the model attached, so that another one would wait for it for ever.
        """
        turn_of(self.model).refuse_own()
        return TextStream(self.tokenizer, generate, options)

    # -- conversations -----------------------------------------------------------------------------

    def conversation(
        self,
        *,
        documents: Documents = (),
        system: str | None = None,
        tools: Sequence[Tool] = (),
        overflow: Overflow = "error",
    ) -> Conversation:
        """A conversation in turns over one cache.

        Args:
            documents: texts that come before the first question, or a loaded document, which is forked.
            system: the system message.
            tools: definitions of tools for the chat template, JSON schemas or functions.
            overflow: what a turn that finds the context full does: "error" refuses it, "slide" first lets go of the
                oldest turns, never of the system message or the documents.

        Raises:
            InputError: without a chat template, or for documents and tools that cannot be used.
        """
        return Conversation(self, documents=documents, system=system, tools=tools, overflow=overflow)

    def load_conversation(self, path: str | Path) -> Conversation:
        """The conversation that was saved to a file with `chat.save`.

        Raises:
            CacheError: as for `load_cache`, and for a file that holds a cache alone.
        """
        return load_conversation(self, path)

    # -- helpers -----------------------------------------------------------------------------------

    def _take(self, contract: DecoderContract) -> None:
        """Keeps the model's contract, and what follows from it, until another one is read off the model."""
        config = self.config
        config.check_model(self.model, self.tokenizer)
        self._contract = contract
        eviction = config.cache.eviction
        scorers = [config.scorer] if eviction is None else [config.scorer, eviction.scorer]
        names = list(dict.fromkeys(name for scorer in scorers for name in scorer.reads_models))
        self.readers = open_readers(names, self.model, self.tokenizer, contract)
        layers, reads = len(contract.layers), self.readers
        policies = (config.scorer, config.schedule, config.protect)
        self._selector = Selector(*policies, layers, reads=reads, ranks=contract.ranks)
        self._costs = flop_model(self.model, contract)

    @property
    def _read_flops(self) -> int:
        """Operations that language models have done for scorers so far."""
        return sum(reader.flops for reader in self.readers.values())

    def _encode(self, prompts: Sequence[Prompt], query: Query | list[Query] | None) -> list[EncodedPrompt]:
        queries = query if isinstance(query, list) else [query] * len(prompts)
        if len(queries) != len(prompts):
            raise InputError(f"{len(queries)} queries for {len(prompts)} prompts; give one for all, or one each")
        own = self.config.scorer.reads_query
        if any(
            isinstance(one, EncodedPrompt) and asked is not None for one, asked in zip(prompts, queries, strict=True)
        ):
            raise InputError("an encoded prompt has its query already; give it to pipe.encode, not to generate")
        return [
            encode(prompt, self.tokenizer, self.config.protect, own if asked is None else check_query(asked))
            for prompt, asked in zip(prompts, queries, strict=True)
        ]

    def _cache_for(self, prompts: Sequence[EncodedPrompt], prefixes: PrefixCache | None, options: Options) -> LazyCache:
        """The cache to generate on: the one among the options, a stored one, or a new one."""
        cache = cache_in(options.get)
        if prefixes is not None:
            if cache is not None:
                raise InputError("give prefixes or past_key_values, not both: a cache that is given has its own tokens")
            if len(prompts) * options.copies > 1:
                raise InputError(
                    "prefixes are stored one row each: give one prompt, without beams and with one reply, or generate "
                    "without prefixes"
                )
            return prefixes.take(self.bound_cache(), self.config, prompts[0].token_ids)
        if cache is None:
            return self.new_cache()
        if not isinstance(cache, LazyCache):
            raise CacheError(f"past_key_values must be a LazyCache from new_cache(), got {type(cache).__name__}")
        return cache

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
        held: Sequence[int],
        recorder: StepRecorder,
        clock: TokenClock,
        started: float,
        asked: Options,
    ) -> list[GenerationResult]:
        sequences: Tensor = output if isinstance(output, Tensor) else output.sequences
        padding = asked.padding if sequences.shape[0] > 1 else None
        each = sequences.shape[0] // len(prompts)
        width = max(len(prompt.token_ids) for prompt in prompts)
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
                lengths=Lengths(
                    len(prompts[prompt].token_ids), held[prompt * len(held) // len(prompts)] if held else 0, len(new)
                ),
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


__all__ = ["LazyPipeline"]
