"""What can be seen to be wrong with a request before the engine is asked."""

from __future__ import annotations

from collections.abc import Iterable

from lazyllm.serving.http.errors import ApiError
from lazyllm.serving.http.service import Service
from lazyllm.serving.jobs import Sampling


def check_sampling(service: Service, sampling: Sampling, replies: int) -> None:
    """Refuses tokens the model does not know, and more replies to a prompt than are made at once.

    Raises:
        ApiError: with the number.
    """
    check_tokens(service, sampling.logit_bias, param="logit_bias")
    most = service.engine.limits.running
    if replies > most:
        raise ApiError(400, f"n is a number from 1 to {most} here, not {replies}", param="n", code="invalid_value")


def check_tokens(service: Service, tokens: Iterable[int], *, param: str) -> None:
    """Refuses ids of tokens that the model does not know.

    Raises:
        ApiError: with the first of them.
    """
    known = service.vocabulary
    unknown = next((token for token in tokens if not 0 <= token < known), None)
    if unknown is not None:
        raise ApiError(400, f"tokens have ids from 0 to {known - 1}, not {unknown}", param=param, code="unknown_token")


def policy_of_document(service: Service, name: str) -> str:
    """The policy a document was loaded with.

    Raises:
        DocumentGone: when it is not loaded, or no more.
    """
    return service.engine.policy_of(service.engine.document(name).pipe)
