"""Terminal recordings in the format of asciinema, version 2: a header, and what was written when."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cast:
    """A recording.

    Attributes:
        width, height: of the terminal, in characters.
        events: seconds since the start, and what was written then, in order.
    """

    width: int
    height: int
    events: tuple[tuple[float, str], ...]

    @property
    def seconds(self) -> float:
        """When the last event is."""
        return self.events[-1][0] if self.events else 0.0

    def without_pauses(self, longest: float) -> Cast:
        """The same with pauses of at most so many seconds."""
        events, now, before = [], 0.0, 0.0
        for seconds, text in self.events:
            now += min(longest, seconds - before)
            before = seconds
            events.append((round(now, 3), text))
        return Cast(self.width, self.height, tuple(events))

    def save(self, path: Path) -> Path:
        """Writes it as asciicast v2."""
        header = {"version": 2, "width": self.width, "height": self.height, "env": {"TERM": "xterm-256color"}}
        lines = [header, *([round(seconds, 3), "o", text] for seconds, text in self.events)]
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: Path) -> Cast:
        """Reads asciicast v2; what was typed is left out, as the terminal echoes it.

        Raises:
            ValueError: for another version.
        """
        header, *lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        if header.get("version") != 2:
            raise ValueError(f"{path} is no asciicast of version 2, but {header.get('version')!r}")
        events = tuple((float(seconds), text) for seconds, kind, text in lines if kind == "o")
        return cls(header["width"], header["height"], events)
