"""The reference."""

from typing import ClassVar

from lazyllm.caches.policy import CachePolicy


class DenseCache(CachePolicy):
    """Prunes nothing, whatever the schedule says: the unmodified model on the same machinery."""

    prunes: ClassVar[bool] = False
