"""What the installed transformers calls things that have been renamed."""

from __future__ import annotations

from transformers.generation.utils import ALL_CACHE_NAMES

CACHE: str = ALL_CACHE_NAMES[0]
"""The argument for a cache, of models and of their layers: `cache` from 5.24 on, `past_key_values` before."""
CACHES = ("past_key_values", CACHE)
"""What a caller may name it; transformers takes the old name for the new one until 5.40."""
