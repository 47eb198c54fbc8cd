"""Pipelines by the names that jobs ask for them by."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from lazyllm.errors import InputError, unknown
from lazyllm.pipeline import LazyPipeline
from lazyllm.policies.query import Query
from lazyllm.prompts import EncodedPrompt, Prompt


class NamedPipelines:
    """What an engine, and the face of one, know of their policies.

    Args:
        pipelines: by name; the first is the default.
    """

    def __init__(self, pipelines: Mapping[str, LazyPipeline]) -> None:
        self._pipelines = dict(pipelines)
        self._encoding = threading.Lock()

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of the pipelines, the default first."""
        return tuple(self._pipelines)

    @property
    def _default(self) -> str:
        return self.policies[0]

    def pipeline(self, policy: str | None = None) -> LazyPipeline:
        """The pipeline of a name.

        Raises:
            InputError: when there is none of that name.
        """
        name = self._default if policy is None else policy
        if name not in self._pipelines:
            raise InputError(unknown("policy", name, self._pipelines))
        return self._pipelines[name]

    def policy_of(self, pipe: LazyPipeline) -> str:
        """The name of one of the pipelines."""
        return next(name for name, one in self._pipelines.items() if one is pipe)

    def encode(self, prompt: Prompt, *, policy: str | None = None, query: Query | None = None) -> EncodedPrompt:
        """A prompt as a job needs it; may be called by any thread.

        Raises:
            InputError: when it cannot be used.
        """
        pipe = self.pipeline(policy)
        with self._encoding:  # tokenizers are not made for several threads
            return pipe.encode(prompt, query=query)
