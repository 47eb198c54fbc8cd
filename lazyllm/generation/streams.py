"""Replies as they come."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from lazyllm.callbacks import Callback, LayerEnd
from lazyllm.errors import InputError
from lazyllm.generation.result import GenerationResult
from lazyllm.runtime import end_helper_threads


class TextStream:
    """Pieces of a reply as they come, and its result once they have all come.

    Leaving the loop early and calling `close()` ends the generation: after the running step, with the reply so far as
    its result, or between two layers while the prompt is still being computed; then there is no result.
    """

    def __init__(self, tokenizer: Any, generate: Callable[..., Any], options: Mapping[str, Any]) -> None:
        self._pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._stop = _StopSwitch()
        self._outcome: GenerationResult | BaseException | None = None
        added = {
            "streamer": self._pieces,
            "stopping_criteria": StoppingCriteriaList([*(options.get("stopping_criteria") or ()), self._stop]),
            "callbacks": [*options.get("callbacks", ()), _EarlyStop(self._stop)],
        }
        end_helper_threads()  # those of the new thread are all that compute
        self._thread = threading.Thread(target=self._run, args=(generate, {**options, **added}), daemon=True)
        self._thread.start()

    def _run(self, generate: Callable[..., Any], options: dict[str, Any]) -> None:
        try:
            self._outcome = cast(GenerationResult, generate(**options))
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
        """Ends the generation, after the running step or layer, and waits for it."""
        self._stop.pulled = True
        self._thread.join()

    @property
    def result(self) -> GenerationResult:
        """The whole reply; waits for it, and raises what the generation raised.

        Raises:
            InputError: when the stream was closed before there was a token.
        """
        self._thread.join()
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome


class _StopSwitch(StoppingCriteria):
    """Ends a generation from outside.

    Attributes:
        pulled: whether to end it.
        begun: whether the reply has a token.
    """

    pulled = begun = False

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        self.begun = True
        return torch.full((input_ids.shape[0],), self.pulled, device=input_ids.device, dtype=torch.bool)


class _EarlyStop(Callback):
    """Ends a generation that has no token yet between two layers, once the switch is pulled."""

    def __init__(self, switch: _StopSwitch) -> None:
        self._switch = switch

    def on_layer_end(self, event: LayerEnd) -> None:
        """Looks at the switch."""
        if self._switch.pulled and not self._switch.begun:
            raise InputError("the stream was closed before the reply had a token; there is no result")
