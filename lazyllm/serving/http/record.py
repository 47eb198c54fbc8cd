"""What is noted about a request while it is answered, for the log and the metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fastapi import Request

from lazyllm.serving.http.errors import as_api_error
from lazyllm.serving.jobs import Usage


@dataclass
class Record:
    """A request; nothing of what it says.

    Attributes:
        request_id: what the client and the log call it.
        status: of the answer, once it was sent.
        code: of the error it ended with, also where the status said otherwise before.
        error: that error, where the server is at fault.
        usages: what its jobs have cost, and how many replies each had.
        began: when it came in, by `time.perf_counter`.
    """

    request_id: str
    status: int | None = None
    code: str | None = None
    error: BaseException | None = None
    usages: list[tuple[Usage, int]] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Since it came in."""
        return time.perf_counter() - self.began

    @property
    def costs(self) -> list[Usage]:
        """What its jobs have cost."""
        return [usage for usage, _ in self.usages]

    def failed(self, error: BaseException) -> None:
        """Notes an error."""
        refused = as_api_error(error)
        self.code = refused.code
        if refused.status_code == 500:
            self.error = error


def record_of(request: Request) -> Record:
    """The record of a request."""
    record: Record = request.scope["state"]["record"]
    return record
