"""Runs the commands that examples/README.md shows, and the notebook, and writes what they print where it is shown.

    python docs/recording/samples.py
    python docs/recording/samples.py --only own_scorer --only tour

For a machine with nothing else on it, since times are printed.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import nbformat
import typer
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
LIST = ROOT / "examples" / "README.md"
NOTEBOOK = ROOT / "examples" / "tour.ipynb"
SHOWN = re.compile(r"```bash\n(python examples/(\w+)\.py[^\n]*)\n```\n(?:\n```text\n.*?```\n)?", re.DOTALL)
"""A command and the name of its example, with what it printed where that is known."""
CELL_SECONDS = 600


def main(only: Annotated[list[str] | None, typer.Option(help="Names of examples; all without it.")] = None) -> None:
    """Runs what is asked for."""
    for command, name in SHOWN.findall(LIST.read_text(encoding="utf-8")):
        if not only or name in only:
            print(command, flush=True)
            show(command, printed_by(command))
    if not only or NOTEBOOK.stem in only:
        print(NOTEBOOK.name, flush=True)
        execute(NOTEBOOK)


def printed_by(command: str) -> str:
    """What a command prints, without space at the ends of lines."""
    _, *arguments = shlex.split(command)
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return "\n".join(line.rstrip() for line in done.stdout.splitlines()).strip() + "\n"


def show(command: str, printed: str) -> None:
    """Writes what a command printed below it."""
    text = LIST.read_text(encoding="utf-8")
    start, stop = next(found.span() for found in SHOWN.finditer(text) if found[1] == command)
    block = f"```bash\n{command}\n```\n\n```text\n{printed}```\n"
    LIST.write_text(text[:start] + block + text[stop:], encoding="utf-8")


def execute(path: Path) -> None:
    """Runs all cells of a notebook, and keeps what they print and draw, but for warnings of the machine it runs on."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=CELL_SECONDS, record_timing=False, resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, path)


if __name__ == "__main__":
    typer.run(main)
