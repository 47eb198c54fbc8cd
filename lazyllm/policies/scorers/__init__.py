"""Token-importance scorers. A new one is a file here and a line in `SCORERS`."""

from lazyllm.policies.base import Registry, Scorer
from lazyllm.policies.scorers.blockwise import Blockwise
from lazyllm.policies.scorers.combined import Combined
from lazyllm.policies.scorers.last_token import LastTokenAttention
from lazyllm.policies.scorers.late_interaction import LateInteraction
from lazyllm.policies.scorers.lexical_overlap import LexicalOverlap
from lazyllm.policies.scorers.pooled import Pooled
from lazyllm.policies.scorers.random import Random
from lazyllm.policies.scorers.sink_recent import SinkRecent
from lazyllm.policies.scorers.two_hop import TwoHop
from lazyllm.policies.scorers.window import WindowAttention

SCORERS: Registry[Scorer] = Registry(
    "scorer",
    Scorer,
    [
        LastTokenAttention,
        WindowAttention,
        LateInteraction,
        LexicalOverlap,
        TwoHop,
        Pooled,
        Blockwise,
        Combined,
        Random,
        SinkRecent,
    ],
)

__all__ = [
    "SCORERS",
    "Blockwise",
    "Combined",
    "LastTokenAttention",
    "LateInteraction",
    "LexicalOverlap",
    "Pooled",
    "Random",
    "SinkRecent",
    "TwoHop",
    "WindowAttention",
]
