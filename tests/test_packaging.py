"""What is built from the tree is what people get: what is in it, and its use where nothing else is."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from packaging.metadata import Metadata

import lazyllm
from lazyllm import preset_names
from tests.environments import ROOT, Environment, build, environment, project, succeeded

USE = """
import json, torch
from transformers import LlamaConfig, LlamaForCausalLM
import lazyllm
from lazyllm.pages.render import asset
from lazyllm.costs import Device

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, eos_token_id=None,
)).eval()
pipe = lazyllm.LazyPipeline.from_preset("paper", model)
result = pipe.generate(list(range(3, 63)) * 2, max_new_tokens=4, do_sample=False)
print(json.dumps({
    "file": lazyllm.__file__, "version": lazyllm.__version__, "presets": lazyllm.preset_names(),
    "tokens": len(result.token_ids), "computed": result.stats.computed_fraction, "styles": len(asset("common.css")),
}))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the checkout, without what git ignores: building writes beside what it builds."""
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    names = [".git", *(name.strip("/") for name in ignored)]
    copy = tmp_path_factory.mktemp("copy") / "tree"
    return Path(shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*names)))


@pytest.fixture(scope="module")
def files(tree: Path) -> set[str]:
    """What the copy held before anything was built."""
    return {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def dist(tree: Path, files: set[str]) -> Path:
    """A folder with both distributions."""
    out = tree.parent / "dist"
    build(tree, out)
    return out


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory) -> Environment:
    """The wheel where nothing is but what it asks for, with the extra of the command line."""
    made = environment(tmp_path_factory.mktemp("installed") / "env", "cli")
    options = ["--no-deps", "--no-index", "--no-compile", "--quiet"]
    command = [sys.executable, "-m", "pip", "--python", str(made.folder), "install", *options, str(wheel)]
    succeeded(subprocess.run(command, capture_output=True, text=True, check=False))
    return made


# -- what is in it -------------------------------------------------------------------------------------


def test_the_sdist_is_the_tree(dist: Path, files: set[str]):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    written = {name for name in names if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert sorted(files - names) == [], "what MANIFEST.in leaves out"
    assert sorted(names - written - files) == [], "what does not come from the tree"


def test_the_wheel_is_the_package_and_nothing_else(wheel: Path, files: set[str]):
    names = set(ZipFile(wheel).namelist())
    about = {name for name in names if ".dist-info/" in name}
    assert names - about == {name for name in files if name.startswith("lazyllm/")}
    assert {Path(name).name for name in about} >= {"LICENSE", "METADATA", "entry_points.txt"}


def test_the_metadata_says_what_the_project_file_does(wheel: Path):
    with ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        said = Metadata.from_email(archive.read(name), validate=True)
    assert (said.name, str(said.version)) == (project()["name"], lazyllm.__version__)
    assert said.license_expression == "Apache-2.0"
    assert set(said.provides_extra or ()) == set(project()["optional-dependencies"])
    assert said.description_content_type == "text/markdown"


# -- its use -------------------------------------------------------------------------------------------


def test_it_asks_for_all_that_its_dependencies_need(installed: Environment):
    command = [sys.executable, "-m", "pip", "--python", str(installed.folder), "check"]
    succeeded(subprocess.run(command, capture_output=True, text=True, check=False))


def test_it_generates_far_from_the_checkout(installed: Environment, tmp_path: Path):
    said = json.loads(succeeded(installed.run("python", "-c", USE, cwd=tmp_path)).splitlines()[-1])
    assert Path(said["file"]).is_relative_to(installed.folder)
    assert said["version"] == lazyllm.__version__
    assert said["presets"] == preset_names()
    assert said["tokens"] == 4
    assert said["computed"] < 1
    assert said["styles"] > 0


def test_its_command_says_what_it_can(installed: Environment, tmp_path: Path):
    shown = succeeded(installed.run("lazyllm", "--help", cwd=tmp_path, COLUMNS="120", NO_COLOR="1"))
    for command in ("generate", "chat", "map", "ablate", "predict"):
        assert re.search(rf"^\W+{command}\b", shown, re.MULTILINE), shown


# -- what goes with a release ----------------------------------------------------------------------------


def test_the_citation_is_of_this_version_and_names_the_paper():
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert said["cff-version"] == "1.2.0"
    assert said["title"] == "lazyllm"
    assert str(said["version"]) == lazyllm.__version__
    assert said["license"] == project()["license"]
    assert [reference["url"].rpartition("/")[2] for reference in said["references"]] == ["2407.14057"]


def test_the_changelog_has_the_shape_it_says():
    """Unreleased first, then versions that fall; within each the kinds of change in one order, none twice or empty."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    kinds = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
    parts = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    titles = [re.fullmatch(r"\[(.+?)\](?: - \d{4}-\d\d-\d\d)?", part.splitlines()[0]) for part in parts]
    assert all(titles), [part.splitlines()[0] for part in parts]
    first, *versions = [title[1] for title in titles if title]
    assert first == "Unreleased"
    numbers = [tuple(map(int, version.split("."))) for version in versions]
    assert numbers == sorted(set(numbers), reverse=True)
    for part in parts:
        sections = re.findall(r"^### (\w+)\n+(?=- )", part, re.MULTILINE)
        assert len(sections) == part.count("### "), f"an empty section in {part.splitlines()[0]}"
        assert sections == [kind for kind in kinds if kind in sections]
