"""A pipeline as a model of lm-eval, the evaluation harness of EleutherAI.

Importing this module registers the model under the name `lazyllm`.
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoTokenizer

from lazyllm.caches import DenseCache
from lazyllm.caches.row import PromptMarks
from lazyllm.callbacks import PrefillShare
from lazyllm.config import LazyConfig
from lazyllm.errors import ConfigError, InputError, LazyLLMError, unknown
from lazyllm.evaluation.continuations import score_replies
from lazyllm.extras import installed_by
from lazyllm.models.loading import dtype_named, load_model
from lazyllm.models.names import CACHE
from lazyllm.pipeline import LazyPipeline
from lazyllm.policies.query import TokenRange
from lazyllm.prompts import EncodedPrompt, encode, encode_chat_text

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import simple_parse_args_string
    from tqdm import tqdm
except ImportError as missing:
    raise ImportError(
        f"{__name__} needs lm-eval, which is not installed or incomplete ({missing}): {installed_by('lm-eval')}"
    ) from missing

MODEL_NAME = "lazyllm"

POLICIES = ("scorer", "schedule", "cache", "protect")
LOADING = ("pretrained", "tokenizer", "gguf_file", "dtype", "weights", "device", "preset", *POLICIES)
"""Arguments that say which model, and which pipeline."""
INHERITED = (
    "add_bos_token", "prefix_token_id", "softmax_dtype", "think_end_token", "enable_thinking", "chat_template_args",
)  # fmt: skip
"""Arguments that mean what they mean to lm-eval's own Hugging Face model."""
OWN = ("batch_size", "max_length", "truncate", "rolling_block")

Scored = tuple[tuple[str, str] | None, list[int], list[int]]
"""A log-likelihood request: its texts (None in a rolling one), the tokens of its context and of its continuation."""
Item = TypeVar("Item")


@register_model(MODEL_NAME)
class LazyLM(HFLM):
    """lm-eval's Hugging Face model, run by a pipeline.

    A request's context is a prompt, pruned as `pipe.generate` would. A continuation to score is fed token by token, as
    if it were the reply: it is never pruned while `Protect.generated` holds, and each of its tokens has the logits that
    generation would have had there. With nothing to prune (`DenseCache`) the whole request is one forward pass.

    Args:
        pipe: the pipeline; it needs a tokenizer with an end token.
        batch_size: prompts in a batch.
        max_length: longest request in tokens; None = what the model has positions for.
        truncate: whether longer ones lose their beginning, as lm-eval does it; otherwise they are an error.
        rolling_block: how the log-likelihood of a text as a whole is taken: so many tokens at a time are scored as the
            reply to everything before them. None = in one forward pass, which a pipeline that prunes refuses.
        options: `add_bos_token`, `prefix_token_id`, `softmax_dtype`, `think_end_token`, `enable_thinking` and
            `chat_template_args`, as in lm-eval's `HFLM`.

    Raises:
        ConfigError: for an argument that does not exist or cannot be.
        InputError: for a pipeline without a tokenizer, or a tokenizer without an end token.
    """

    def __init__(
        self,
        pipe: LazyPipeline,
        *,
        batch_size: int | str = 1,
        max_length: int | None = None,
        truncate: bool = True,
        rolling_block: int | None = None,
        **options: Any,
    ) -> None:
        _check_names(options, (*OWN, *INHERITED))
        if pipe.tokenizer is None or pipe.tokenizer.eos_token_id is None:
            raise InputError("lm-eval needs a tokenizer with an end token; give the pipeline one, with eos_token set")
        self.pipe, self.truncate = pipe, truncate
        self.rolling_block = None if rolling_block is None else _positive("rolling_block", rolling_block)
        self.share = PrefillShare()
        self._chats: dict[str, Sequence[Mapping[str, str]]] = {}
        self._batch_marks: list[PromptMarks] = []
        super().__init__(
            pretrained=pipe.model,
            tokenizer=copy.deepcopy(pipe.tokenizer),  # lm-eval may set its pad token
            backend="causal",
            batch_size=_positive("batch_size", batch_size),
            max_length=None if max_length is None else _positive("max_length", max_length),
            **options,
        )

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> LazyLM:
        """From `pretrained=PATH,preset=recommended,...`, as lm-eval's command line has it."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> LazyLM:
        """From arguments by name.

        Raises:
            ConfigError: for one that does not exist, or a preset that does not.
            InputError: when the model cannot be loaded.
        """
        given = {**arg_dict, **{name: value for name, value in (additional_config or {}).items() if value is not None}}
        _check_names(given, (*LOADING, *OWN, *INHERITED))
        loading = {name: given.pop(name) for name in LOADING if name in given}
        return cls(_load_pipeline(**loading), **given)

    @property
    def is_exact(self) -> bool:
        """Whether nothing is ever pruned, evicted or stored in fewer bits."""
        return self.pipe.config.cache == DenseCache()

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside the results: the pipeline's configuration is part of it."""
        own = {"lazyllm": self.pipe.config.to_dict(), "prefill_computed_fraction": self.share.fraction}
        return {**super().get_model_info(), **own}

    # -- generation ----------------------------------------------------------------------------------

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as text; who said what in it is remembered for when that text comes back as a prompt."""
        text = str(super().apply_chat_template(chat_history, add_generation_prompt))
        self._chats[text] = chat_history
        return text

    def tok_batch_encode(
        self,
        strings: Sequence[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Token ids and mask [b, t] of a batch that is to be generated from."""
        ids, mask = super().tok_batch_encode(list(strings), padding_side)
        if left_truncate_len is not None and ids.shape[1] > left_truncate_len:
            self._check_truncates(ids.shape[1], left_truncate_len)
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        rows = zip(strings, ids, mask.bool(), strict=True)
        self._batch_marks = [self._marks(text, text, row[real].tolist()) for text, row, real in rows]
        return ids, mask

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """Generates from the batch that was encoded last."""
        cache = self.pipe.new_cache(marks=self._batch_marks)
        with self.pipe.attached(callbacks=[self.share]):
            return super()._model_generate(context, max_length, stop, **{CACHE: cache}, **options)

    # -- log-likelihoods -----------------------------------------------------------------------------

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts.

        Raises:
            InputError: when the pipeline prunes and no `rolling_block` was given.
        """
        if self.rolling_block is not None:
            return [self._roll(request.args[0], self.rolling_block) for request in _shown(requests, disable_tqdm)]
        if not self.is_exact:
            raise InputError(
                "the log-likelihood of a text as a whole has no prompt that could be pruned. Give rolling_block=N: N "
                "tokens at a time are then scored as the reply to everything before them, which is the prompt. Or take "
                "the preset 'dense'"
            )
        return list(super().loglikelihood_rolling(requests, disable_tqdm))

    def _roll(self, text: str, block: int) -> float:
        tokens, start = self.tok_encode(text), [self.prefix_token_id]
        requests: list[Scored] = []
        for first in range(0, len(tokens), block):
            scored = tokens[first : first + block]
            before = (start + tokens[:first])[-(self.max_length + 1 - len(scored)) :]
            requests.append((None, before, scored))
        total = sum(score for score, _ in self._loglikelihood_tokens(requests, disable_tqdm=True))
        self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return total

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Logits [b, t, v] of whole requests; the stack refuses it where one of them was pruned."""
        with torch.no_grad(), self.pipe.attached(callbacks=[self.share]) as model:
            logits: Tensor = model(inps, **{CACHE: self.pipe.new_cache()}).logits
        return logits

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        for _, context, continuation in requests:
            if len(context) + len(continuation) > self.max_length + 1:
                self._check_truncates(len(context) + len(continuation) - 1, self.max_length)
        if self.is_exact:
            return list(super()._loglikelihood_tokens(requests, disable_tqdm, override_bs))
        answers: list[Any] = [None] * len(requests)
        batches = list(_batches(self._by_context(requests), self.batch_size))
        for batch in _shown(batches, disable_tqdm):
            self._score(requests, batch, answers)
        return answers

    def _by_context(self, requests: Sequence[Scored]) -> list[tuple[list[int], list[int]]]:
        """Contexts, longest first, each with the numbers of the requests it belongs to."""
        found: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (_, context, continuation) in enumerate(requests):
            found[tuple(context[-(self.max_length + 1 - len(continuation)) :])].append(number)
        return [(list(context), numbers) for context, numbers in sorted(found.items(), key=lambda one: -len(one[0]))]

    def _score(
        self, requests: Sequence[Scored], batch: Sequence[tuple[list[int], list[int]]], answers: list[Any]
    ) -> None:
        """Puts the answers to a batch of contexts where they belong."""
        prompts = [EncodedPrompt(ids, self._context_marks(requests[numbers[0]][0], ids)) for ids, numbers in batch]
        replies = [[requests[number][2] for number in numbers] for _, numbers in batch]
        scores = score_replies(self.pipe, prompts, replies, dtype=self.softmax_dtype, callbacks=[self.share])
        for (_, numbers), several in zip(batch, scores, strict=True):
            for number, score in zip(numbers, several, strict=True):
                answers[number] = (score.log_probability, score.is_greedy)
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], answers[number])

    # -- prompts -------------------------------------------------------------------------------------

    def _context_marks(self, texts: tuple[str, str] | None, ids: list[int]) -> PromptMarks:
        """What is known about a context to score from; lm-eval gives the space behind it to the continuation."""
        if texts is None or not texts[0]:
            return PromptMarks()
        return self._marks(texts[0], texts[0].rstrip(), ids)

    def _marks(self, given: str, text: str, ids: list[int]) -> PromptMarks:
        """What is known about the prompt `given`, whose `text` became `ids`."""
        config, chat = self.pipe.config, self._chats.get(given)
        protect, query = config.protect, config.scorer.reads_query
        if chat is None:
            return marks_at_end(encode(text, self.tokenizer, protect, query), ids)
        return marks_at_end(encode_chat_text(text, chat, self.tokenizer, protect, query), ids)

    def _check_truncates(self, tokens: int, most: int) -> None:
        """Refuses a request that is too long, where it is not to lose its beginning."""
        if not self.truncate:
            raise InputError(
                f"a request has {tokens:,} tokens where there is room for {most:,}; truncate=True drops its beginning"
            )


def marks_at_end(encoded: EncodedPrompt, ids: Sequence[int]) -> PromptMarks:
    """The marks of a prompt for `ids` that end as it does, but begin earlier or later.

    Raises:
        InputError: when they end otherwise.
    """
    shift, marks = len(ids) - len(encoded.token_ids), encoded.marks
    if list(ids[max(0, shift) :]) != encoded.token_ids[max(0, -shift) :]:
        raise InputError("lm-eval's tokens of a prompt do not end as the tokenizer's own; give it another tokenizer")
    if shift == 0:
        return marks
    starts = {unit: tuple(sorted({max(0, first + shift) for first in firsts})) for unit, firsts in marks.starts.items()}
    return PromptMarks(_moved(marks.protected, shift), _moved(marks.query, shift), marks.asked, starts)


def _moved(ranges: Iterable[TokenRange], shift: int) -> tuple[TokenRange, ...]:
    """Token ranges moved by `shift`, without what comes to lie before the first token."""
    return tuple((max(0, start + shift), stop + shift) for start, stop in ranges if stop + shift > 0)


def _load_pipeline(
    pretrained: str | Path | None = None,
    tokenizer: str | Path | None = None,
    gguf_file: str | None = None,
    dtype: str = "auto",
    weights: str | None = None,
    device: str | None = None,
    preset: str = "recommended",
    **policies: Any,
) -> LazyPipeline:
    """The pipeline that model arguments describe; the policies are read before the model is."""
    if pretrained is None:
        raise ConfigError("the model arguments name no model; give pretrained=PATH, a hub id, folder or .gguf file")
    recipe = LazyPipeline(**{**dict(LazyConfig.preset(preset)), **policies})
    kind = dtype if dtype == "auto" else dtype_named(str(dtype).removeprefix("torch."))
    try:
        model, own = load_model(pretrained, gguf_file=gguf_file, dtype=kind, weights=weights)
        other = None if tokenizer is None else AutoTokenizer.from_pretrained(str(tokenizer))
        if device is not None:
            model.to(_device(device))
    except LazyLLMError:
        raise
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, AssertionError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"cannot load the model {str(pretrained)!r}: {reason}") from None
    return recipe.bind(model, other or own)


def _device(name: str) -> torch.device:
    """The device; the CPU where there is no CUDA, since lm-eval's command line asks for it unless told otherwise."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        logging.getLogger(__name__).warning("there is no CUDA here, so the model runs on the CPU")
        return torch.device("cpu")
    return device


def _check_names(given: Iterable[str], known: Sequence[str]) -> None:
    if strange := [name for name in given if name not in known]:
        raise ConfigError(unknown("model argument", strange[0], known))


def _positive(name: str, value: object) -> int:
    """A whole number above zero, as itself or as text."""
    if isinstance(value, bool) or not str(value).isdecimal() or int(str(value)) < 1:
        raise ConfigError(f"{name} is a whole number of 1 or more, not {value!r}")
    return int(str(value))


def _batches(values: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _shown(values: Sequence[Item], disable: bool) -> Iterable[Item]:
    """The values, with lm-eval's kind of progress bar."""
    bar: Iterable[Item] = tqdm(values, desc="Running lazyllm requests", disable=disable)
    return bar
