"""Models by what a study calls them, loaded one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lazyllm.ablation.cells import ModelRef
from lazyllm.errors import InputError
from lazyllm.evaluation.data import model_source, quiet_loading
from lazyllm.evaluation.digest import digest
from lazyllm.models.fingerprint import fingerprint, reading_of, settings_of
from lazyllm.models.loading import dtype_named, load_model
from lazyllm.pipeline import LazyPipeline

WARM_UP_TOKENS = 8

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
    reading = () if tokenizer is None else reading_of(tokenizer)
    return fingerprint(model), digest([*settings_of(model), *reading])


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
    with quiet_loading():
        model, tokenizer = load_model(model_source(ref.model), dtype=dtype_named(ref.dtype), weights=ref.weights)
    return model.to(ref.device), tokenizer


def _warm_up(loaded: Loaded) -> None:
    """The first run of a process pays for things no later one does."""
    dense = LazyPipeline.from_preset("dense", loaded.model, loaded.tokenizer)
    dense.generate([0] * WARM_UP_TOKENS, max_new_tokens=2, do_sample=False)
