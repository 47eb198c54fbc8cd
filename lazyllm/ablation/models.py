"""Models by what a study calls them, loaded one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lazyllm.ablation.cells import ModelRef
from lazyllm.errors import InputError
from lazyllm.evaluation.data import packaged_model, quiet_loading
from lazyllm.evaluation.digest import digest
from lazyllm.models.fingerprint import fingerprint
from lazyllm.models.loading import dtype_named, load_model
from lazyllm.pipeline import LazyPipeline

PACKAGED = "packaged"
"""What a study calls the model that comes as a Python package."""
WARM_UP_TOKENS = 8
NO_SETTINGS = ("_name_or_path", "transformers_version")
"""What a model's configuration says that changes no result."""

Load = Callable[[ModelRef], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


@dataclass(frozen=True)
class Loaded:
    """A model, its tokenizer, and what identifies it."""

    ref: ModelRef
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def identity(self) -> tuple[Any, ...]:
        """What tells it from other models; the weights of a quantised one do not, so that its name must."""
        named = self.ref.model if self.ref.weights else ""
        own = identity_of(self.model, self.tokenizer)
        return *own, self.ref.dtype, self.ref.weights, self.ref.device, named


def identity_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, str]:
    """What stands for a model's weights, and for all else that its results depend on."""
    reading = () if tokenizer is None else _reading(tokenizer)
    return fingerprint(model), digest([*_settings(model), *reading])


def _settings(model: PreTrainedModel) -> Iterator[Any]:
    """What a model computes with besides its weights: positions, windows, its attention kernel, its end tokens."""
    config = model.config.to_dict()
    yield {name: value for name, value in config.items() if name not in NO_SETTINGS}
    yield model.config._attn_implementation
    yield getattr(model.generation_config, "eos_token_id", None)


def _reading(tokenizer: PreTrainedTokenizerBase) -> Iterator[Any]:
    """What a tokenizer makes of a text."""
    yield tokenizer.chat_template
    backend = getattr(tokenizer, "backend_tokenizer", None)
    yield tokenizer.get_vocab() if backend is None else backend.to_str()


class Shelf:
    """Holds the model that was asked for last, so that no two are in memory at once."""

    def __init__(self, load: Load | None = None) -> None:
        self._load = load or load_ref
        self._held: Loaded | None = None

    def get(self, ref: ModelRef) -> Loaded:
        """The model, loaded and warm.

        Raises:
            InputError: when it cannot be loaded.
        """
        if self._held is None or self._held.ref != ref:
            self.clear()
            self._held = Loaded(ref, *self._loaded(ref))
            _warm_up(self._held)
        return self._held

    def clear(self) -> None:
        """Lets go of the model."""
        self._held = None

    def _loaded(self, ref: ModelRef) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        try:
            return self._load(ref)
        except InputError:
            raise
        except Exception as error:  # whatever a checkpoint, a quantiser or a device comes up with
            reason = next(iter(str(error).strip().splitlines()), "")
            raise InputError(f"cannot load the model {ref.model!r}: {reason or type(error).__name__}") from error


def load_ref(ref: ModelRef) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads what a study names.

    Raises:
        InputError: when there is no such file, or the model cannot have these weights.
    """
    source = str(packaged_model()) if ref.model == PACKAGED else ref.model
    with quiet_loading():
        model, tokenizer = load_model(source, dtype=dtype_named(ref.dtype), weights=ref.weights)
    return model.to(ref.device), tokenizer


def _warm_up(loaded: Loaded) -> None:
    """The first run of a process pays for things no later one does."""
    dense = LazyPipeline.from_preset("dense", loaded.model, loaded.tokenizer)
    dense.generate([0] * WARM_UP_TOKENS, max_new_tokens=2, do_sample=False)
