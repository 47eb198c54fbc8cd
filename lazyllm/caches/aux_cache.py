"""The paper's cache."""

from typing import Annotated, Literal

from pydantic import Field

from lazyllm.caches.policy import CachePolicy


class AuxCache(CachePolicy):
    """Keeps the frontier state of every pruned token, so that any later step can revive it.

    Source: Fu et al. 2024, LazyLLM, arXiv 2407.14057, section 3.3.

    Attributes:
        decode: "select" lets decode steps start from the full context and prune again (the paper);
            "reuse" prunes in prefill only: a decode step attends at each layer to what is stored there,
            and the next prefill, e.g. a follow-up question, may revive again.
        max_revived: how many older tokens a decode step may revive, the best ones; None = any number
            (the paper). With a number, tokens are revived only at layers where the schedule cuts.
        revive_every: only every so many decode steps select; those between attend to what is stored.
    """

    decode: Literal["select", "reuse"] = "select"
    max_revived: Annotated[int, Field(ge=0)] | None = None
    revive_every: Annotated[int, Field(ge=1)] = 1

    @property
    def most_revived(self) -> int | None:
        """`max_revived`."""
        return self.max_revived

    def selects_in_decode(self, generated: int) -> bool:
        """With `decode="select"`, at every `revive_every`-th token."""
        return self.decode == "select" and generated % self.revive_every == 0
