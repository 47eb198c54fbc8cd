"""Environments made of links: interpreters that see some of the installed distributions and nothing else."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FOR_DEVELOPERS = {"dev", "docs", "examples"}
"""Extras that nothing in the package needs."""


@cache
def project() -> dict[str, Any]:
    """What pyproject.toml says about the project."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def extras() -> set[str]:
    """Those that some use of the package needs."""
    return project()["optional-dependencies"].keys() - FOR_DEVELOPERS - {"all"}


def claimed(*names: str) -> Iterator[Requirement]:
    """What the core asks for by name, and what these extras do."""
    yield from map(Requirement, project()["dependencies"])
    for name in names:
        yield from claimed_by(name)


def claimed_by(extra: str) -> Iterator[Requirement]:
    """What an extra asks for by name, itself or through another extra."""
    for requirement in map(Requirement, project()["optional-dependencies"][extra]):
        if requirement.name == project()["name"]:
            for other in sorted(requirement.extras):
                yield from claimed_by(other)
        else:
            yield requirement


def closure(wanted: Iterable[Requirement]) -> set[str]:
    """Names of the distributions that are wanted, or needed by one that is, as they are installed here."""
    open_, seen = list(wanted), set[tuple[str, str]]()
    while open_:
        requirement = open_.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} - {extra for known, extra in seen if known == name}:
            seen.add((name, extra))
            for needed in map(Requirement, metadata.requires(name) or ()):
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    open_.append(needed)
    return {name for name, _ in seen}


@dataclass(frozen=True)
class Environment:
    """A virtual environment without pip, and where its distributions lie."""

    folder: Path

    @property
    def site(self) -> Path:
        """Where its packages lie."""
        return Path(sysconfig.get_path("purelib", "venv", {"base": str(self.folder)}))

    def run(self, *command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs a program of the environment in a folder, with no other search path."""
        given = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(
            [self.folder / "bin" / command[0], *command[1:]],
            cwd=cwd,
            env={**given, "HF_HUB_OFFLINE": "1", **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    def link(self, names: Iterable[str]) -> None:
        """Adds installed distributions."""
        for name in names:
            distribution = metadata.distribution(name)
            parts = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
            assert parts, f"{name} does not say which files are its own"
            for part in parts:
                if not (link := self.site / part).exists():  # a namespace that several fill
                    link.symlink_to(Path(str(distribution.locate_file(part))))


def environment(folder: Path, *extras: str, without: Iterable[str] = ()) -> Environment:
    """The core's distributions and those of some extras, the project itself left out."""
    venv.create(folder, symlinks=True)
    made = Environment(folder)
    made.link(closure(claimed(*extras)) - set(without))
    return made


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    """What a program printed that did what it should."""
    assert done.returncode == 0, f"{done.args} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(tree: Path, out: Path) -> None:
    """Builds the sdist of a tree, and from it the wheel."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(tree)]
    succeeded(subprocess.run(command, cwd=tree.parent, capture_output=True, text=True, check=False))
