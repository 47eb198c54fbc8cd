"""Static pruning."""

from typing import ClassVar

from lazyllm.caches.policy import CachePolicy


class DropCache(CachePolicy):
    """Forgets a pruned token for good: static pruning.

    K/V it already has at earlier layers stay and are attended there; it never goes deeper.
    Source: the static-pruning baseline of Fu et al. 2024, arXiv 2407.14057, Table 1.
    """

    revives: ClassVar[bool] = False
