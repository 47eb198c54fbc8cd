"""The Dockerfile, which nothing here can build: what it says is looked at."""

import re
from functools import cache

from tests.environments import ROOT, project

PINNED = re.compile(r"3\.\d+\.\d+-slim-[a-z]+")


@cache
def instructions() -> list[tuple[str, str]]:
    """Name and text of every instruction, a continued one in one line."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines if line)]


def final() -> list[tuple[str, str]]:
    """The instructions of the last stage."""
    (*_, last) = (index for index, (name, _) in enumerate(instructions()) if name == "FROM")
    return instructions()[last + 1 :]


def only(name: str) -> str:
    """What the one instruction of that name in the last stage says."""
    (found,) = (rest for other, rest in final() if other == name)
    return found


def defaults() -> dict[str, str]:
    return {name: value for name, _, value in (rest.partition("=") for kind, rest in instructions() if kind == "ARG")}


def test_every_stage_starts_from_the_same_pinned_base():
    bases = [rest.partition(" ")[0] for name, rest in instructions() if name == "FROM"]
    assert set(bases) == {"python:${PYTHON}"}
    assert len(bases) == 2
    assert PINNED.fullmatch(defaults()["PYTHON"])
    version = ".".join(defaults()["PYTHON"].split(".")[:2])
    assert f"Programming Language :: Python :: {version}" in project()["classifiers"]


def test_the_last_stage_takes_nothing_but_what_was_built():
    copies = [rest.split() for name, rest in final() if name in ("COPY", "ADD")]
    assert copies == [["--from=build", "/opt/lazyllm", "/opt/lazyllm"]]


def test_the_build_sees_what_it_needs_and_nothing_else():
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert lines[1] == "*", "everything is left out but what is named"
    named = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert named == {"lazyllm", "pyproject.toml", "constraints.txt", project()["readme"], *project()["license-files"]}
    assert all((ROOT / name).exists() for name in named)


def test_the_server_runs_as_nobody_in_particular():
    names = [name for name, _ in final()]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", only("USER"))
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert all(name != "RUN" for name in names[names.index("USER") :])


def test_its_health_is_asked_where_it_listens():
    command = re.findall(r'"([^"]+)"', only("ENTRYPOINT"))
    port = command[command.index("--port") + 1]
    assert command[:4] == ["lazyllm", "serve", "--model", "/model"]
    assert only("VOLUME") == '["/model"]'
    assert only("EXPOSE") == port
    assert f"http://127.0.0.1:{port}/health" in only("HEALTHCHECK")


def test_no_secret_is_in_the_image():
    assert not [rest for name, rest in instructions() if name in ("ENV", "ARG") and re.search(r"KEY|TOKEN|PASSW", rest)]


def test_torch_has_one_version_everywhere():
    places = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "noxfile.py", "constraints.txt")}
    for name, text in places.items():
        assert re.findall(r"\btorch==[\d.]+\b", text) == [defaults()["TORCH"]], name
