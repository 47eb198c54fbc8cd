"""Records docs/figures/recording.svg: real lazyllm commands in a real terminal, with the packaged model.

    python docs/recording/record.py
    python docs/recording/record.py --render out/recording.cast     # draws a recording again, without running anything

Writes the recording as asciicast v2 beside it, for `asciinema play`. Pauses of more than a second are cut; all else
takes the time it took. Needs the packages pexpect and pyte, and a bash.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import pexpect
import typer
from animation import svg_of
from cast import Cast

from lazyllm.evaluation.data import packaged_model, packaged_speech

FIGURE = Path(__file__).parents[1] / "figures" / "recording.svg"
TITLE = "lazyllm generate compares a pruned run with a dense one; lazyllm chat asks a document twice"
WIDTH, HEIGHT = 96, 24
SPEECH, MODEL = "1985-Reagan-1", "SmolLM2-135M-Instruct.gguf"
QUESTION = "What is the name of the young woman who will graduate from West Point?"
SHELL = "\u276f "
"""What the shell writes when it waits."""
REPLIED = r"tokens[^\r]*\r\n[^\r]*> $"
"""How a turn of a chat ends: with what it has cost, and the next question's mark."""
KEY_SECONDS = 0.035
READ_SECONDS = 1.0
"""How long a reader gets for what a command has written."""
LONGEST_PAUSE = 1.0
COMMAND_SECONDS = 600


@dataclass(frozen=True)
class Line:
    """What is typed, and the pattern of what the terminal shows when it is done."""

    text: str
    until: str = SHELL


SESSION = (
    Line("wc -w question.txt"),
    Line("tail -n 1 question.txt"),
    Line(f"lazyllm generate --model {MODEL} --chat --prompt-file question.txt --max-new-tokens 24 --compare"),
    Line(f"lazyllm chat --model {MODEL} --document speech.txt --max-new-tokens 24", until="> $"),
    Line(QUESTION, until=REPLIED),
    Line("How much do taxpayers pay per passenger on Amtrak?", until=REPLIED),
    Line("/stats", until=r"MB[^\r]*\r\n[^\r]*> $"),
    Line("/quit"),
)


class Recorder:
    """Notes what comes, and when; a file for pexpect to write to."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.events: list[tuple[float, str]] = []
        self._clock, self._began = clock, clock()

    def write(self, text: str) -> None:
        """Notes a piece."""
        self.events.append((self._clock() - self._began, text))

    def flush(self) -> None:
        """Everything is written already."""


def main(
    out: Annotated[Path, typer.Option(help="The SVG.")] = FIGURE,
    cast: Annotated[Path, typer.Option(help="The recording.")] = Path("out/recording.cast"),
    render: Annotated[Path | None, typer.Option(help="Draw this recording instead of making one.")] = None,
) -> None:
    """Records, unless there is a recording, and draws it."""
    if render is None:
        cast.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory() as folder:
            prepare(Path(folder))
            recorded(Path(folder), SESSION).without_pauses(LONGEST_PAUSE).save(cast)
    out.write_text(svg_of(Cast.load(render or cast), TITLE), encoding="utf-8")
    print(f"{out}: {out.stat().st_size / 1000:.0f} kB")


def prepare(folder: Path) -> None:
    """The model and the texts under short names."""
    (folder / MODEL).symlink_to(packaged_model())
    speech = packaged_speech(SPEECH)
    (folder / "speech.txt").write_text(speech + "\n", encoding="utf-8")
    (folder / "question.txt").write_text(f"{speech}\n\n{QUESTION}\n", encoding="utf-8")


def recorded(folder: Path, session: Sequence[Line]) -> Cast:
    """What a terminal shows while a session is typed."""
    shell: Any = pexpect.spawn(
        "bash",
        ["--noprofile", "--norc"],
        cwd=str(folder),
        env=environment(),
        encoding="utf-8",
        dimensions=(HEIGHT, WIDTH),
        timeout=COMMAND_SECONDS,
    )
    shell.logfile_read = recorder = Recorder()
    shell.expect_exact(SHELL)
    for line in session:
        for key in line.text:
            shell.send(key)
            read(shell, KEY_SECONDS)
        shell.send("\r")
        shell.expect_exact("\r\n")
        shell.expect(line.until)
        read(shell, READ_SECONDS)
    shell.close()
    return Cast(WIDTH, HEIGHT, tuple(recorder.events))


def read(shell: Any, seconds: float) -> None:
    """Takes what comes within a time."""
    shell.expect_exact([pexpect.TIMEOUT], timeout=seconds)


def environment() -> dict[str, str]:
    """A plain terminal with the commands of this interpreter and the code of this checkout."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    kept = {name: value for name, value in os.environ.items() if name in ("HOME", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")}
    shell = {"PATH": path, "PS1": SHELL, "TERM": "xterm-256color", "LANG": "C.UTF-8"}
    return {**kept, **shell, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}


if __name__ == "__main__":
    typer.run(main)
