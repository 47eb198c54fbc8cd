"""What the routes of one app share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fastapi import Request

from lazyllm.serving.engine import Engine
from lazyllm.serving.http.metrics import Metrics
from lazyllm.serving.http.models import ModelNames
from lazyllm.serving.http.settings import ServerSettings


@dataclass
class Service:
    """An engine, and what a server has around it.

    Attributes:
        engine: runs the jobs.
        settings: what the server was told.
        names: what models are called.
        metrics: what is counted.
        started: when the server began, in seconds since 1970.
    """

    engine: Engine
    settings: ServerSettings
    names: ModelNames
    metrics: Metrics
    started: int = field(default_factory=lambda: int(time.time()))

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        return self.engine.words


def service_of(request: Request) -> Service:
    """What the app of a request has."""
    service: Service = request.app.state.service
    return service
