"""docs/stability.md says which names are public and which versions files have, as the code does."""

import re
from typing import get_args

from lazyllm.ablation import plan, units
from lazyllm.caches import saved
from lazyllm.contexts.conversation_file import SavedConversation
from lazyllm.mapping import identity
from lazyllm.policies.schedules import tuned
from lazyllm.tuning import study
from tests.environments import ROOT

PAGE = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
FORMATS = {
    "saved caches, and documents and conversations in them": saved.VERSION,
    "what a conversation says beside its cache": get_args(SavedConversation.model_fields["version"].annotation)[0],
    "tuned schedules": tuned.VERSION,
    "the journal of a search for them": study.VERSION,
    "the plan of a study": plan.VERSION,
    "results of a study": units.MEASUREMENT,
    "replies of `lazyllm map`": identity.VERSION,
}


def rows(title: str) -> list[list[str]]:
    """Cells of the rows of the table below a heading, its head left out."""
    section = re.split(r"^## ", PAGE.partition(f"## {title}\n")[2], flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("| ") or line.startswith("|-")]
    assert lines, title
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def public() -> list[str]:
    """Modules that the page names; `package.*` is all of a package."""
    cells = [row[0] for title in ("What is stable", "What is provisional") for row in rows(title)]
    return [name for cell in cells for name in re.findall(r"`([\w.*]+)`", cell)]


def test_formats_have_the_versions_of_the_page():
    assert {what: int(version) for what, version in rows("Files")} == FORMATS


def test_what_the_documentation_imports_is_public():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.py")]
    modules = {
        (module, page.name)
        for page in pages
        for module in re.findall(r"^\s*from (lazyllm[\w.]*) import", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(modules) > 20
    names = public()
    packages = tuple(f"{name.removesuffix('.*')}." for name in names if name.endswith(".*"))
    assert [
        found for found in sorted(modules) if found[0] not in names and not f"{found[0]}.".startswith(packages)
    ] == []


def test_what_the_page_calls_public_exists():
    for name in public():
        path = ROOT.joinpath(*name.removesuffix(".*").split("."))
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), name
