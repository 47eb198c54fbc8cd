"""What lazyllm imports is what it asks for: the core by its own dependencies, the rest by the extra that has it."""

import ast
import json
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from lazyllm.errors import InputError, MissingExtra
from lazyllm.extras import needed
from tests.environments import ROOT, claimed, claimed_by, environment, extras, succeeded

ROOMS = {
    "lazyllm.__main__": "cli",
    "lazyllm.cli": "cli",
    "lazyllm.ablation.commands": "cli",
    "lazyllm.ablation.progress": "cli",
    "lazyllm.ablation.lm_eval_tasks": "lm-eval",
    "lazyllm.evaluation.harness": "lm-eval",
    "lazyllm.evaluation.harness_tasks": "lm-eval",
    "lazyllm.serving.http": "serve",
    "lazyllm.serving.replicas": "ray",
    "lazyllm.tuning": "tune",
}
"""Modules that an extra is needed to import; all others need the core alone."""

COMPANIONS = {
    "markupsafe": "jinja2",
    "pydantic-core": "pydantic",
    "starlette": "fastapi",
    "tqdm": "lm-eval",
    "typing-extensions": "pydantic",
}
"""Distributions whose objects another one's interface takes or gives, and which that one therefore asks for."""

FEATURES = {
    "from lazyllm.cli.main import main": "cli",
    "from lazyllm import ProgressBar; ProgressBar()": "cli",
    "from lazyllm.evaluation.plots import new_figure; new_figure((1, 1))": "plots",
    "from lazyllm.pages.drawing import page_style; page_style().__enter__()": "plots",
    "from lazyllm.models.loading import load_model; load_model('nowhere', gguf_file='a.gguf')": "gguf",
    "from lazyllm.evaluation.export import write_dequantised as write; write(Path('a'), Path('b'), 'F16')": "gguf",
    "from lazyllm.models.loading import load_model; load_model('nowhere', weights='int4')": "quantized",
    "from lazyllm.models.loading import load_model; load_model('adapters')": "adapters",
    "from lazyllm.ablation import Study; Study(tasks={'records': 1}).run()": "eval",
    "from lazyllm.evaluation.statistics import mean_effect; mean_effect([0, 1])": "eval",
    "from lazyllm.evaluation.harness_cli import run_lm_eval; run_lm_eval([])": "lm-eval",
    "import lazyllm.evaluation.harness": "lm-eval",
    "import lazyllm.tuning.study": "tune",
    "from lazyllm.ablation.cluster import RayCrew; RayCrew('run', 'local')": "ray",
    "import lazyllm.serving.http": "serve",
    "import lazyllm.serving.replicas": "ray",
    "from lazyllm.ablation.trackers import tracker_named; tracker_named('mlflow')": "track",
    "from lazyllm.ablation.trackers import tracker_named; tracker_named('tensorboard')": "track",
}
"""What somebody may try, and the extra that it needs."""

TRY = """
import json, sys
from pathlib import Path
said = {}
for statement in json.loads(Path(sys.argv[1]).read_text()):
    try:
        exec(statement, {"Path": Path})
    except (Exception, SystemExit) as error:
        said[statement] = f"{type(error).__name__}: {error}"
print(json.dumps(said))
"""


@cache
def modules() -> dict[str, Path]:
    """Every module by name."""
    return {_module(path): path for path in sorted((ROOT / "lazyllm").rglob("*.py"))}


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str | None:
    """The extra that a module needs: its own, or that of the nearest package around it."""
    while module:
        if module in ROOMS:
            return ROOMS[module]
        module = module.rpartition(".")[0]
    return None


def inside(extra: str | None) -> list[str]:
    return [module for module in modules() if room(module) == extra]


def run_all(statements: list[str], folder: Path, *extras: str, without: tuple[str, ...] = ()) -> dict[str, str]:
    """What statements that failed said, in a process that sees lazyllm, the core's dependencies and some extras'."""
    made = environment(folder / "env", *extras, without=without)
    (made.site / "lazyllm").symlink_to(ROOT / "lazyllm")
    (folder / "statements.json").write_text(json.dumps(statements), encoding="utf-8")
    return json.loads(succeeded(made.run("python", "-c", TRY, "statements.json", cwd=folder)).splitlines()[-1])


def imports(modules: list[str]) -> list[str]:
    return [f"import {module}" for module in modules]


@pytest.fixture(scope="module")
def core(tmp_path_factory) -> dict[str, str]:
    """What failed without any extra: what transformers brings for its own command is not taken for granted."""
    folder = tmp_path_factory.mktemp("core")
    (folder / "adapters").mkdir()
    (folder / "adapters" / "adapter_config.json").write_text("{}", encoding="utf-8")
    return run_all([*imports(inside(None)), *FEATURES], folder, without=("typer", "rich"))


# -- what is imported ----------------------------------------------------------------------------------


def test_the_core_is_imported_with_the_core_dependencies_alone(core: dict[str, str]):
    assert len(inside(None)) > 100
    assert {statement: said for statement, said in core.items() if statement not in FEATURES} == {}


@pytest.mark.parametrize("extra", sorted({extra for extra in ROOMS.values() if inside(extra)}))
def test_a_room_is_imported_with_the_extra_it_belongs_to(extra: str, tmp_path: Path):
    assert run_all(imports(inside(extra)), tmp_path, extra) == {}


def test_every_import_is_of_something_that_is_asked_for():
    """At the top of a module of the core or the module's extra, in a function of any extra."""
    providers = {top: set(map(canonicalize_name, names)) for top, names in metadata.packages_distributions().items()}
    offenders = [
        f"{module}, line {line}: {top}"
        for module, path in modules().items()
        for line, top, at_top in _imports(path)
        if not providers.get(top, {top}) & _allowed(room(module) if at_top else "all")
    ]
    assert offenders == []


@cache
def _allowed(extra: str | None) -> frozenset[str]:
    """What a module may import, by distribution."""
    names = {canonicalize_name(requirement.name) for requirement in claimed(*[extra] if extra else [])}
    return frozenset(names | {companion for companion, host in COMPANIONS.items() if host in names})


def _imports(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Line, top-level package and whether it is imported with the module, of everything from elsewhere."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    later = set(_run_later(tree))
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"lazyllm"}:
            yield node.lineno, top, node not in later


def _run_later(tree: ast.AST) -> Iterator[ast.AST]:
    """Everything in functions, and what only type checkers read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from ast.walk(node)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for statement in node.body:
                yield from ast.walk(statement)


# -- what is missing -----------------------------------------------------------------------------------


def test_every_feature_names_the_extra_it_needs(core: dict[str, str]):
    for statement, extra in FEATURES.items():
        message = core.get(statement, "nothing: it works without an extra")
        assert message.endswith(f'pip install "lazyllm-torch[{extra}]"'), f"{statement}\nsaid {message}"


def test_every_extra_has_a_feature():
    assert {*FEATURES.values(), "parquet"} == extras()


def test_a_missing_package_is_named_with_its_extra_and_is_an_import_error():
    with pytest.raises(MissingExtra, match=r"^tea needs nowhere_to_be, .*\"lazyllm-torch\[pot\]\"$") as caught:
        needed("nowhere_to_be.found", what="tea", extra="pot")
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value, InputError)
    assert caught.value.name == "nowhere_to_be"


def test_a_hint_names_an_extra_that_brings_the_package():
    """Of every call of `needed`, as it stands in the code."""
    providers = metadata.packages_distributions()
    calls = [call for path in modules().values() for call in _calls_of_needed(path)]
    assert len(calls) > 12
    for module, extra in calls:
        names = {canonicalize_name(requirement.name) for requirement in claimed_by(extra)}
        assert names & set(map(canonicalize_name, providers[module.partition(".")[0]])), (module, extra)


def _calls_of_needed(path: Path) -> Iterator[tuple[str, str]]:
    """The package and the extra of each call that says them in full."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "needed":
            words = {word.arg: word.value for word in node.keywords}
            name, extra = node.args[0], words["extra"]
            if isinstance(name, ast.Constant) and isinstance(extra, ast.Constant):
                yield name.value, extra.value


def test_the_extra_all_has_every_other_one():
    def names(extra: str) -> set[str]:
        return {canonicalize_name(requirement.name) for requirement in claimed_by(extra)}

    for extra in extras():
        assert names(extra) <= names("all"), extra
    assert names("all") <= names("dev")
