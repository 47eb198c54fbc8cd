"""A test kit for policies of your own: what lazyllm expects of them, checked on tiny random models.

It needs no checkpoint, no download and no test runner. A rule that is broken raises `ContractViolation`, an
`AssertionError` that names the rule (one of `RULES`), the policy and the value.
"""

from lazyllm.testing.caches import check_cache
from lazyllm.testing.rules import RULES, ContractViolation
from lazyllm.testing.schedules import check_schedule
from lazyllm.testing.scorers import check_scorer

__all__ = ["RULES", "ContractViolation", "check_cache", "check_schedule", "check_scorer"]
