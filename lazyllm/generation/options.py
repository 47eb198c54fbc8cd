"""Options of transformers' `generate`: what a pipeline must know of them, and those that it refuses, by name.

Everything else is handed on as it is: sampling, beams, logits processors, stopping criteria, streamers, assisted
decoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lazyllm.errors import InputError


class Refusal(NamedTuple):
    """An option that cannot be: its name, the values that are as good as none, and why others are refused."""

    name: str
    harmless: tuple[Any, ...]
    why: str


_OWN = "the pipeline makes it of the prompt"
_HUB = "transformers has it no more, and would load its code from a hub"
_PACKED = (
    "layers see the tokens that are left of all rows behind each other, not [batch, tokens]; "
    "a callback of the pipeline sees who was computed where"
)
_ITSELF = "it runs the pipeline's own model beside the generation, without the pipeline's cache"

REFUSED = (
    Refusal("inputs", (None,), _OWN),
    Refusal("input_ids", (None,), _OWN),
    Refusal("inputs_embeds", (None,), "a prompt is text, chat messages or token ids"),
    Refusal("attention_mask", (None,), _OWN),
    Refusal("logits_to_keep", (None, 1), "only the last token of a prompt has logits for certain"),
    Refusal("use_cache", (None, True), "what was computed and what was left out stands in the cache"),
    Refusal("cache_implementation", (None,), "the pipeline's cache policy says what is kept; choose it by `cache`"),
    Refusal("penalty_alpha", (None, 0), f"contrastive search: {_HUB}"),
    Refusal("dola_layers", (None,), f"DoLa: {_HUB}"),
    Refusal("num_beam_groups", (None, 1), f"diverse beam search: {_HUB}"),
    Refusal("constraints", (None,), f"constrained beam search: {_HUB}; take prefix_allowed_tokens_fn"),
    Refusal(
        "force_words_ids",
        (None,),
        f"constrained beam search: {_HUB}; take prefix_allowed_tokens_fn, sequence_bias or a logits processor",
    ),
    Refusal("guidance_scale", (None, 1), _ITSELF),
    Refusal("token_healing", (None, False), f"it changes the prompt behind what is known about it, and {_ITSELF}"),
    Refusal("assistant_early_exit", (None,), f"{_ITSELF}; take prompt_lookup_num_tokens or an assistant_model"),
    Refusal("use_mtp", (None, False), "its heads read hidden states of every token, and pruned ones have none"),
    Refusal("speculation_type", (None,), "it reads hidden states of every token, and pruned ones have none"),
    Refusal("output_hidden_states", (None, False), _PACKED),
    Refusal("output_attentions", (None, False), _PACKED),
)
"""What would fail with another reason, or would quietly do something else."""

OVERRIDDEN: dict[str, Any] = {"use_cache": True, "cache_implementation": None}
"""What a model's own generation config may say, and is not followed in."""


class Options:
    """Options of one generation.

    Args:
        given: those the caller gave, `generation_config` among them.
        model: its generation config says the rest.
    """

    def __init__(self, given: Mapping[str, Any], model: PreTrainedModel) -> None:
        self._given, self._model = given, model

    def get(self, name: str) -> Any:
        """What holds of an option; None when nobody says anything."""
        asked = self._asked(name)
        if asked is not None or name in self._given:
            return asked
        return getattr(self._model.generation_config, name, None)

    def _asked(self, name: str) -> Any:
        """What the caller says of an option."""
        return self._given.get(name, getattr(self._given.get("generation_config"), name, None))

    @property
    def copies(self) -> int:
        """How many rows each prompt has: beams, or replies."""
        return max(self.get("num_beams") or 1, self.get("num_return_sequences") or 1)

    @property
    def is_assisted(self) -> bool:
        """Whether candidates are checked several at a time."""
        return any(self.get(name) is not None for name in ("assistant_model", "prompt_lookup_num_tokens"))

    @property
    def end_token_ids(self) -> list[int]:
        """Ids that end a reply."""
        ends = self.get("eos_token_id")
        return [] if ends is None else [int(end) for end in torch.as_tensor(ends).flatten()]

    @property
    def pad_token_id(self) -> int:
        """What stands before shorter prompts, and behind shorter replies."""
        pad = self.get("pad_token_id")
        return next((token for token in [pad, *self.end_token_ids] if token is not None), 0)

    @property
    def padding(self) -> int | None:
        """What may stand behind a reply that has no end token, since other criteria stopped it; None = nothing."""
        stopped = self.get("stop_strings") is not None or self.get("stopping_criteria")
        return self.pad_token_id if stopped else None

    def check(self, prompts: int) -> None:
        """Refuses what cannot be, for so many prompts.

        Raises:
            InputError: with the option, its value and the reason.
        """
        for name, harmless, why in REFUSED:
            value = self._asked(name) if name in OVERRIDDEN else self.get(name)
            if not any(value is good or (type(value) in (int, float, str) and value == good) for good in harmless):
                raise InputError(f"generate cannot take {name}={_shown(value)}: {why}")
        self._check_custom()
        self._check_assisted(prompts)

    def _check_custom(self) -> None:
        if isinstance(custom := self.get("custom_generate"), str):
            raise InputError(
                f"generate cannot take custom_generate={custom!r}: that code would be loaded and run in place of it; "
                "import it yourself and give a callable"
            )

    def _check_assisted(self, prompts: int) -> None:
        if not self.is_assisted:
            return
        assistant = self.get("assistant_model")
        if assistant is not None and assistant.get_decoder() is self._model.get_decoder():
            raise InputError(f"generate cannot take the pipeline's own model as assistant_model: {_ITSELF}")
        if prompts * self.copies > 1:
            raise InputError(
                f"assisted decoding takes one prompt, one beam and one reply at a time, got {prompts} prompts "
                f"with {self.copies} rows each"
            )

    def for_model(self, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
        """The options as the model's `generate` needs them: with a tokenizer where it asks for one.

        Raises:
            InputError: when it asks for one and there is none.
        """
        config = self._model.generation_config
        own = {name: value for name, value in OVERRIDDEN.items() if getattr(config, name, None) not in (None, value)}
        readers = [name for name in ("stop_strings", "assistant_tokenizer") if self.get(name) is not None]
        if readers and self.get("tokenizer") is None:
            if tokenizer is None:
                raise InputError(f"{readers[0]} needs a tokenizer; give the pipeline one")
            own["tokenizer"] = tokenizer
        return {**self._given, **own}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def reply_tokens(tokens: list[int], ends: list[int], padding: int | None) -> list[int]:
    """A reply without what stands behind it: up to and with its first end token, else without padding at the end."""
    stop = next((index + 1 for index, token in enumerate(tokens) if token in ends), None)
    if stop is None:
        stop = len(tokens)
        while stop and tokens[stop - 1] == padding:
            stop -= 1
    return tokens[:stop]
