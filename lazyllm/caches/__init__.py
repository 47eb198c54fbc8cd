"""Caches: what happens to a pruned token. A new policy is a file here and a line in `CACHES`."""

from lazyllm.caches.aux_cache import AuxCache
from lazyllm.caches.budget_cache import BudgetCache
from lazyllm.caches.dense_cache import DenseCache
from lazyllm.caches.drop_cache import DropCache
from lazyllm.caches.evicting_cache import EvictingCache
from lazyllm.caches.lazy_cache import LayerView, LazyCache
from lazyllm.caches.offloaded_aux import OffloadedAux
from lazyllm.caches.policy import CachePolicy
from lazyllm.caches.quantized_aux import QuantizedAux
from lazyllm.caches.quantized_kv import QuantizedKV
from lazyllm.policies.base import Registry

CACHES: Registry[CachePolicy] = Registry(
    "cache",
    CachePolicy,
    [
        AuxCache,
        OffloadedAux,
        QuantizedAux,
        QuantizedKV,
        BudgetCache,
        DropCache,
        EvictingCache,
        DenseCache,
    ],
)

__all__ = [
    "CACHES",
    "AuxCache",
    "BudgetCache",
    "CachePolicy",
    "DenseCache",
    "DropCache",
    "EvictingCache",
    "LayerView",
    "LazyCache",
    "OffloadedAux",
    "QuantizedAux",
    "QuantizedKV",
]
