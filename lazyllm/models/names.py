"""What the installed transformers calls the argument that was renamed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.generation.utils import ALL_CACHE_NAMES

CACHE: str = ALL_CACHE_NAMES[0]
"""The argument for a cache, of models and of their layers: `cache` from 5.24 on, `past_key_values` before."""
CACHE_NAMES = tuple(dict.fromkeys((CACHE, "past_key_values")))
"""What a caller may call it; transformers takes the earlier name for the later one until 5.40."""


def cache_in(get: Callable[[str], Any]) -> Any:
    """The cache among what `get` says of arguments, by either name; None where there is none."""
    return next((cache for cache in map(get, CACHE_NAMES) if cache is not None), None)
