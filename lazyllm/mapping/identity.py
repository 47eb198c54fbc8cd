"""What a reply depends on, in a few letters: one that is kept is used again only where all of it is the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel

import lazyllm
from lazyllm.errors import InputError
from lazyllm.evaluation.digest import digest
from lazyllm.models.fingerprint import fingerprint, reading_of, settings_of
from lazyllm.pipeline import LazyPipeline
from lazyllm.prompts import EncodedPrompt

LETTERS = 24
"""Of an id."""
VERSION = 1
"""Of what a reply is; a higher one computes everything anew."""


class Addresses:
    """Gives every prompt its id; one that comes several times has several.

    Args:
        pipe: model, tokenizer and policies.
        options: of the generation.

    Raises:
        InputError: when an option is no plain value, so that nobody could say whether it is the same again.
    """

    def __init__(self, pipe: LazyPipeline, options: Mapping[str, Any]) -> None:
        versions = (VERSION, lazyllm.__version__, torch.__version__, transformers.__version__)
        plain = {name: _plain(name, value) for name, value in options.items()}
        reading = [] if pipe.tokenizer is None else list(reading_of(pipe.tokenizer))
        self._setting = digest([versions, *_identity(pipe.model), *reading, *_readers(pipe), pipe.config, plain])
        self._seen: Counter[str] = Counter()

    def of(self, prompt: EncodedPrompt) -> str:
        """The id of the next prompt."""
        marks = prompt.marks
        asked = digest([prompt.token_ids, prompt.text, marks.protected, marks.query, marks.asked], letters=LETTERS)
        self._seen[asked] += 1
        return digest([self._setting, asked, self._seen[asked]], letters=LETTERS)


def _identity(model: PreTrainedModel) -> Iterator[Any]:
    """What tells a model from others; of quantised weights the name must, since their numbers are not looked at."""
    yield fingerprint(model)
    yield from settings_of(model)
    yield model.generation_config.to_dict()
    yield model.device.type
    if any(type(parameter.data) is not torch.Tensor for parameter in model.parameters()):
        yield model.name_or_path


def _readers(pipe: LazyPipeline) -> Iterator[str]:
    """Models that read the prompts for scorers."""
    for name, reader in pipe.readers.items():
        if name is not None:
            yield fingerprint(reader.model)


def _plain(name: str, value: Any) -> Any:
    """An option's value as plain data."""
    if isinstance(value, GenerationConfig):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(name, part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(name, part) for part in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise InputError(
        f"{name} is a {type(value).__name__}, and a file of replies could not tell whether it is the same next time; "
        "give plain values, or leave `out` away"
    )
