"""The paper's cache."""

from typing import Literal

from lazyllm.caches.policy import CachePolicy


class AuxCache(CachePolicy):
    """Keeps the frontier state of every pruned token, so that any later step can revive it.

    Source: Fu et al. 2024, LazyLLM, arXiv 2407.14057, section 3.3.

    Attributes:
        decode: "select" starts every decode step from the full context and prunes again (the paper);
            "reuse" prunes in prefill only: a decode step attends at each layer to what is stored there,
            and the next prefill, e.g. a follow-up question, may revive again.
    """

    decode: Literal["select", "reuse"] = "select"

    @property
    def selects_in_decode(self) -> bool:
        """True for `decode="select"`."""
        return self.decode == "select"
