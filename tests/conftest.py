"""Fixtures and profiles of the whole suite."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import tiny

settings.register_profile("dev", max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "ci", max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(autouse=True, scope="session")
def eager_softmax_keeps_float64() -> Iterator[None]:
    """transformers' eager attention takes its softmax in float32, which would hide errors below 1e-7.

    In this suite it keeps float64, for the stock model, the lazy one and the replay alike.
    """
    original = torch.nn.functional.softmax

    def softmax(values, dim=None, dtype=None, **options):
        keep = dtype is not None and values.dtype == torch.float64
        return original(values, dim=dim, dtype=None if keep else dtype, **options)

    torch.nn.functional.softmax = softmax
    yield
    torch.nn.functional.softmax = original


@pytest.fixture(autouse=True)
def models_are_left_as_found() -> Iterator[None]:
    """Law 7, after every test: layers, attention implementation and hooks are what they were."""
    yield
    for model in tiny.MADE:
        decoder = model.get_decoder()
        assert not any(hasattr(layer, "selector") for layer in decoder.layers), "a LazyStack was left in a model"
        assert decoder.config._attn_implementation in ("sdpa", "eager"), "the attention implementation was left changed"
        hooked = (model, decoder, decoder.rotary_emb)
        assert not any(module._forward_pre_hooks for module in hooked), "a forward hook was left on a model"
