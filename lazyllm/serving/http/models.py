"""What models are called: the model's name for the default policy, `NAME:policy` for any of them."""

from __future__ import annotations

from collections.abc import Sequence

from lazyllm.errors import unknown
from lazyllm.serving.http.errors import ApiError, Json


class ModelNames:
    """Names of models, each of which stands for a policy.

    Args:
        name: of the model itself.
        policies: the first is the default.
    """

    def __init__(self, name: str, policies: Sequence[str]) -> None:
        self.default = policies[0]
        self._names = {policy: name if policy == self.default else f"{name}:{policy}" for policy in policies}
        self._policies = {f"{name}:{policy}": policy for policy in policies} | {name: self.default}

    def name(self, policy: str) -> str:
        """The name that stands for a policy."""
        return self._names[policy]

    def policy(self, model: str, policy: str | None = None) -> str:
        """The policy that a request names, by its model or beside it.

        Raises:
            ApiError: when there is none of that name, or it names two.
        """
        meant = self.of_model(model)
        if policy is None:
            return meant
        self.check(policy)
        if meant not in (policy, self.default):
            raise ApiError(400, f"the model {model!r} has another policy than {policy!r}", param="lazyllm.policy")
        return policy

    def of_model(self, model: str) -> str:
        """The policy that a model's name stands for.

        Raises:
            ApiError: when there is no such model.
        """
        if model not in self._policies:
            known = unknown("model", model, self._names.values())
            raise ApiError(404, known, param="model", code="model_not_found")
        return self._policies[model]

    def check(self, policy: str, param: str = "lazyllm.policy") -> None:
        """Refuses a policy there is none of.

        Raises:
            ApiError: when there is none of that name.
        """
        if policy not in self._names:
            known = unknown("policy", policy, self._names)
            raise ApiError(400, known, param=param, code="policy_not_found")

    def listed(self, created: int) -> list[Json]:
        """One entry for each policy."""
        return [
            {"id": name, "object": "model", "created": created, "owned_by": "lazyllm", "lazyllm": {"policy": policy}}
            for policy, name in self._names.items()
        ]
