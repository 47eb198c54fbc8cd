"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from lazyllm.errors import InputError


@dataclass(frozen=True)
class ServerSettings:
    """What a server calls its model, whom it lets in, and how much it takes from one client.

    Attributes:
        name: what the model is called.
        keys: any of them lets a client in; () = everybody may come in.
        hosts: names a client may call the server by; () = any. Keeps pages of other origins from a server on loopback.
        cors_origins: origins of pages in browsers that may ask.
        max_body_bytes: most bytes of a request.
        request_seconds: most time for a request, from its first byte to the last of the reply.
        lag_events: most events of a stream that wait for its reader.

    Raises:
        InputError: for a number that is not above 0, or an empty key.
    """

    name: str
    keys: tuple[str, ...] = field(default=(), repr=False)
    hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 16 * 2**20
    request_seconds: float = 600.0
    lag_events: int = 1024

    def __post_init__(self) -> None:
        """Checks what cannot be."""
        if not all(self.keys):
            raise InputError("a key cannot be empty")
        for name in ("max_body_bytes", "request_seconds", "lag_events"):
            if not (value := getattr(self, name)) > 0:
                raise InputError(f"{name} is a number above 0, not {value}")
