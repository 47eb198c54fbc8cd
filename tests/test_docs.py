"""The documentation is run, followed and compared with the code."""

import inspect
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

import lazyllm
from lazyllm import CACHES, SCHEDULES, SCORERS, preset_names
from lazyllm.cli.main import app
from tests.tiny import word_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMED = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md")
MARKDOWN = [*PAGES, *sorted((ROOT / "docs" / "api").glob("*.md")), *(ROOT / name for name in NAMED)]
WORDS = (
    "the a of in and to who what where why did ? . report sales rise fall because of note page user assistant system"
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """Line number and text of every Python block."""
    text = page.read_text(encoding="utf-8")
    return [
        (text[: match.start(1)].count("\n") + 1, match.group(1))
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(WORDS.split())


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config).to(torch.float64).eval()


@pytest.fixture
def namespace(model, tokenizer, monkeypatch, tmp_path) -> dict:
    """What the snippets of one page share: a module `my_policies` in an empty folder; all models are a small one."""
    for user in ("pipeline", "models.loading"):
        monkeypatch.setattr(f"lazyllm.{user}.load_model", lambda path, **_: (model, tokenizer))
    monkeypatch.chdir(tmp_path)
    module = ModuleType("my_policies")
    monkeypatch.setitem(sys.modules, "my_policies", module)
    return vars(module)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_snippet_runs(page: Path, namespace: dict):
    for line, block in python_blocks(page):
        exec(compile("\n" * (line - 1) + block, str(page), "exec"), namespace)


def test_the_pages_have_snippets_to_run():
    assert sum(len(python_blocks(page)) for page in PAGES) >= 12
    assert python_blocks(ROOT / "README.md")


@pytest.mark.parametrize("name", [*SCORERS, *SCHEDULES, *CACHES, *preset_names()])
def test_every_policy_and_preset_has_a_row_in_the_readme(name: str):
    table = section(ROOT / "README.md", "Policies")
    rows = [line for line in table.splitlines() if line.startswith(f"| `{name}`")]
    assert len(rows) == 1, f"README.md, section Policies, needs one row that starts with | `{name}`"


def test_the_readme_names_no_policy_that_is_gone():
    named = re.findall(r"^\| `([\w-]+)`", section(ROOT / "README.md", "Policies"), re.MULTILINE)
    assert set(named) == {*SCORERS, *SCHEDULES, *CACHES, *preset_names()}


def test_the_layout_names_what_there_is():
    named = set(re.findall(r"\b[a-z]\w*(?:\.py|/)", section(ROOT / "README.md", "Layout")))
    tops = [ROOT / name for name in ("lazyllm", "docs", "tests", "studies", "examples", "benchmarks")]
    paths = [path for top in tops for path in (top, *top.rglob("*"))]
    known = {path.name + "/" * path.is_dir() for path in paths}
    assert not named - known, "gone"
    rooms = {path.name + "/" * path.is_dir() for path in (ROOT / "lazyllm").iterdir() if path.name[0] not in "_."}
    assert not rooms - {"py.typed"} - named, "not named"


def section(page: Path, title: str) -> str:
    """The text below the heading `## title`, up to the next one."""
    match = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert match, f"{page.name} has no section {title!r}"
    return match.group(1)


def test_the_page_of_policies_is_what_the_command_prints():
    page = (ROOT / "docs" / "policies.md").read_text(encoding="utf-8")
    printed = CliRunner().invoke(app, ["policies", "--markdown"])
    assert printed.exit_code == 0
    marks = "<!-- lazyllm policies --markdown -->\n", "<!-- end -->\n"
    assert page.split(marks[0])[1].split(marks[1])[0].strip() == printed.stdout.strip()


def test_every_exported_name_is_in_the_reference():
    pages = (ROOT / "docs" / "api").glob("*.md")
    named = {name for page in pages for name in re.findall(r"^::: lazyllm\.(\w+)$", page.read_text(), re.MULTILINE)}
    tables = {"CACHES", "SCHEDULES", "SCORERS"}  # described in words, on the page of what they hold
    assert named | tables >= set(lazyllm.__all__), f"name it under docs/api: {set(lazyllm.__all__) - named - tables}"


def test_every_preset_has_a_row_on_the_page_of_presets():
    page = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` .*\[\1\.yaml\]\(\.\./lazyllm/presets/\1\.yaml\) \|$", page, re.MULTILINE)
    assert sorted(rows) == preset_names()


def test_drawings_are_what_their_script_draws():
    script = runpy.run_path(str(ROOT / "docs" / "figures" / "make_diagrams.py"))
    for draw in script["DRAWINGS"]:
        drawn = (ROOT / "docs" / "figures" / f"{draw.__name__}.svg").read_text(encoding="utf-8")
        assert draw().svg == drawn, "run docs/figures/make_diagrams.py"


def test_versions_agree():
    newest = re.search(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest, "CHANGELOG.md names no version"
    assert newest.group(1) == lazyllm.__version__


@pytest.mark.parametrize("page", MARKDOWN, ids=name_of)
def test_relative_links_and_images_exist(page: Path):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r'\]\(([^)\s]+)\)|\b(?:src|srcset|href)="([^"\s]+)"', text):
        target = "".join(target)
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(linked), f"{page.name} links to {target}, but there is no such heading"


def anchors(page: Path) -> set[str]:
    """What a link may name on a page: its headings, in small letters and with hyphens."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_law_of_the_docs_has_its_test():
    tests = (ROOT / "tests" / "test_laws.py").read_text(encoding="utf-8")
    laws = set(re.findall(r"test_law_(\d)_", tests))
    described = set(re.findall(r"^## Law (\d)", (ROOT / "docs" / "laws.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert described == laws == set("12345678")


@pytest.mark.parametrize("name", lazyllm.__all__)
def test_every_exported_name_is_documented(name: str):
    exported = getattr(lazyllm, name)
    documented = exported if inspect.isclass(exported) or inspect.isroutine(exported) else type(exported)
    own = documented.__dict__.get("__doc__") if inspect.isclass(documented) else documented.__doc__
    assert (own or "").strip(), f"{name} has no docstring of its own"
