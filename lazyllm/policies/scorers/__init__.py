"""Token-importance scorers. A new one is a file here and a line in `SCORERS`."""

from lazyllm.policies.base import Registry, Scorer
from lazyllm.policies.scorers.accumulated import AccumulatedAttention
from lazyllm.policies.scorers.blockwise import Blockwise
from lazyllm.policies.scorers.combined import Combined
from lazyllm.policies.scorers.draft_model import DraftModel
from lazyllm.policies.scorers.key_norm import KeyNorm
from lazyllm.policies.scorers.last_token import LastTokenAttention
from lazyllm.policies.scorers.late_interaction import LateInteraction
from lazyllm.policies.scorers.lexical_overlap import LexicalOverlap
from lazyllm.policies.scorers.multi_layer import MultiLayerAttention
from lazyllm.policies.scorers.next_layer import NextLayerAttention
from lazyllm.policies.scorers.oracle import Oracle
from lazyllm.policies.scorers.pooled import Pooled
from lazyllm.policies.scorers.random import Random
from lazyllm.policies.scorers.self_information import SelfInformation
from lazyllm.policies.scorers.sink_recent import SinkRecent
from lazyllm.policies.scorers.two_hop import TwoHop
from lazyllm.policies.scorers.uniform import Uniform
from lazyllm.policies.scorers.update_norm import UpdateNorm
from lazyllm.policies.scorers.value_weighted import ValueWeightedAttention
from lazyllm.policies.scorers.window import WindowAttention

SCORERS: Registry[Scorer] = Registry(
    "scorer",
    Scorer,
    [
        LastTokenAttention,
        WindowAttention,
        AccumulatedAttention,
        MultiLayerAttention,
        NextLayerAttention,
        ValueWeightedAttention,
        KeyNorm,
        UpdateNorm,
        LateInteraction,
        LexicalOverlap,
        TwoHop,
        Pooled,
        Blockwise,
        Combined,
        SelfInformation,
        DraftModel,
        Oracle,
        Random,
        Uniform,
        SinkRecent,
    ],
)

__all__ = [
    "SCORERS",
    "AccumulatedAttention",
    "Blockwise",
    "Combined",
    "DraftModel",
    "KeyNorm",
    "LastTokenAttention",
    "LateInteraction",
    "LexicalOverlap",
    "MultiLayerAttention",
    "NextLayerAttention",
    "Oracle",
    "Pooled",
    "Random",
    "SelfInformation",
    "SinkRecent",
    "TwoHop",
    "Uniform",
    "UpdateNorm",
    "ValueWeightedAttention",
    "WindowAttention",
]
