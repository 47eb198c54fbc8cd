"""What a decode step does besides the model's own work: counted, not timed."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from lazyllm import AuxCache, LastTokenAttention, LazyConfig, LazyPipeline, Stages
from tests.tiny import random_ids, tiny_model

PROMPT = 100
SETTINGS = {
    "dense": LazyConfig.preset("dense"),
    "pruned in prefill": LazyConfig(
        scorer=LastTokenAttention(), schedule=Stages({1: 0.5}), cache=AuxCache(decode="reuse")
    ),
    "recommended": LazyConfig.preset("recommended"),
}


class Operations(TorchDispatchMode):
    """Counts operations, but for views: these move nothing, and versions of torch reshape by more or fewer of them."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.counts[operation.overloadpacket.__name__] += operation is not torch.ops.aten.view.default
        return operation(*args, **(kwargs or {}))


def of_a_step(layers: int, config: LazyConfig | None) -> Counter[str]:
    """Operations of the second decode step; None = the unmodified model."""
    model, ids = tiny_model(layers=layers), random_ids(1, PROMPT)

    def run(lazy, cache) -> Counter[str]:
        with torch.no_grad():
            lazy(ids, past_key_values=cache, logits_to_keep=1)
            lazy(ids[:, :1], past_key_values=cache)
            with Operations() as operations:
                lazy(ids[:, :1], past_key_values=cache)
        return operations.counts

    if config is None:
        return run(model, DynamicCache(config=model.config))
    pipe = LazyPipeline.from_config(config, model)
    with pipe.attached() as lazy:
        return run(lazy, pipe.new_cache())


@pytest.mark.parametrize("name", SETTINGS)
def test_a_layer_of_a_decode_step_adds_a_handful_of_operations(name: str):
    """Two tensors written in place and read instead of joined, and a group's heads side by side; no host reads."""
    shallow, deep = (of_a_step(layers, SETTINGS[name]) for layers in (4, 8))
    stock = [of_a_step(layers, None) for layers in (4, 8)]
    per_layer = deep - shallow, stock[1] - stock[0]
    assert (per_layer[0].total() - per_layer[1].total()) / 4 == 3
    assert deep["_local_scalar_dense"] == shallow["_local_scalar_dense"]


@pytest.mark.parametrize(
    ("name", "operations", "reads"), [("dense", 76, 3), ("pruned in prefill", 94, 3), ("recommended", 98, 3)]
)
def test_a_decode_step_adds_few_operations_of_its_own(name: str, operations: int, reads: int):
    """A hundred small operations are a few hundred microseconds, once per token."""
    lazy, stock = of_a_step(4, SETTINGS[name]), of_a_step(4, None)
    assert lazy.total() - stock.total() - 4 * 3 <= operations
    assert lazy["_local_scalar_dense"] <= reads
