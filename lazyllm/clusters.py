"""Connecting to a Ray cluster."""

from __future__ import annotations

import logging
import socket
from typing import Any

from lazyllm.errors import InputError
from lazyllm.extras import needed

PATIENCE_SECONDS = 10
"""How long to wait for a cluster to answer."""


def connected(address: str, *, what: str, **options: Any) -> Any:
    """The module `ray`, connected to a cluster; as it is where it is connected already.

    Args:
        address: of the cluster, or "local" to start one.
        what: needs it.
        options: of `ray.init`.

    Raises:
        InputError: when Ray is not installed, or there is no such cluster.
    """
    ray = needed("ray", what=what, extra="ray")
    if not ray.is_initialized():
        try:
            _knock(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise InputError(f"there is no Ray cluster at {address!r}: {first_line(error)}") from None
    return ray


def _knock(address: str) -> None:
    """Sees whether anybody is there, since Ray itself would wait for minutes.

    Raises:
        OSError: when nobody is.
    """
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        socket.create_connection((host, int(port)), timeout=PATIENCE_SECONDS).close()


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or what it is called."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def last_line(error: BaseException) -> str:
    """The last line of what an error says: of a traceback, what was raised."""
    return next(reversed(str(error).strip().splitlines()), type(error).__name__)
