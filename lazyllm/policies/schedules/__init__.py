"""Layer keep-ratio schedules. A new one is a file here and a line in `SCHEDULES`."""

from lazyllm.policies.base import Registry, Schedule
from lazyllm.policies.schedules.constant import Constant
from lazyllm.policies.schedules.linear import Linear
from lazyllm.policies.schedules.stages import Stages

SCHEDULES: Registry[Schedule] = Registry(
    "schedule",
    Schedule,
    [
        Constant,
        Stages,
        Linear,
    ],
)

__all__ = ["SCHEDULES", "Constant", "Linear", "Stages"]
