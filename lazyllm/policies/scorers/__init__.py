"""Token-importance scorers. A new one is a file here and a line in `SCORERS`."""

from lazyllm.policies.base import Registry, Scorer
from lazyllm.policies.scorers.last_token import LastTokenAttention
from lazyllm.policies.scorers.random import Random
from lazyllm.policies.scorers.sink_recent import SinkRecent
from lazyllm.policies.scorers.window import WindowAttention

SCORERS: Registry[Scorer] = Registry(
    "scorer",
    Scorer,
    [
        LastTokenAttention,
        WindowAttention,
        Random,
        SinkRecent,
    ],
)

__all__ = ["SCORERS", "LastTokenAttention", "Random", "SinkRecent", "WindowAttention"]
