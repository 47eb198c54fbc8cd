"""Every example runs on the packaged model, on little text, and prints what is true. Slow, run in CI."""

import base64
import importlib.util
import json
import re
import runpy
import sys
from functools import cache
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from lazyllm.evaluation.data import packaged_speech, quiet_loading
from lazyllm.models.loading import load_model
from tests.openai_stub import openai_stub

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
NOTEBOOK = EXAMPLES / "tour.ipynb"
WITHOUT_OPTIONS = {"demo"}

WEST_POINT = "What is the name of the young woman who will graduate from West Point?"
AMTRAK = "How much do taxpayers pay per passenger on Amtrak?"


@cache
def load_once(*args, **options):
    with quiet_loading():
        return load_model(*args, **options)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs an example as the command line would, in an empty folder, and gives what it prints; one load serves all."""
    monkeypatch.chdir(tmp_path)
    for user in ("pipeline", "ablation.models"):
        monkeypatch.setattr(
            f"lazyllm.{user}.load_model", lambda path, **options: load_once(str(path), **loading(options))
        )

    def run(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        printed = capsys.readouterr()
        assert end.value.code in (0, None), printed.err
        return printed.out

    return run


def loading(options: dict) -> dict:
    """What of the options matters: names of dtypes, and nothing that is not given."""
    named = {name: str(value).removeprefix("torch.") for name, value in options.items() if value is not None}
    assert named == {"dtype": "float32"}
    return named


def part_of_speech(passage: str, characters: int) -> str:
    """The part of an address around a passage."""
    text = packaged_speech("1985-Reagan-1")
    place = text.index(passage)
    return text[max(0, place - characters // 2) : place + characters // 2]


def numbers(pattern: str, text: str) -> list[float]:
    return [float(found.replace(",", "")) for found in re.findall(pattern, text)]


# -- scripts -----------------------------------------------------------------------------------------


def test_questions_about_a_folder(run, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, passage in {"woman.txt": "West Point", "train.md": "Amtrak"}.items():
        (folder / name).write_text(part_of_speech(passage, 3000), encoding="utf-8")
    (folder / "blank.txt").write_text("\n", encoding="utf-8")
    asked = ("--question", WEST_POINT, "--question", AMTRAK, "--max-new-tokens", 16)
    printed = run("folder_questions", folder, *asked, "--save", "kept")
    assert re.search(r"Loaded 2 texts, 1,\d{3} tokens, in .* s: 1 of 30 layers", printed)
    assert "Jean Nguyen" in printed
    shares = numbers(r"so far (\d+)% of a dense", printed)
    assert 4 < shares[0] < shares[1] < 80, "the second question takes more, and still not everything"
    again = run("folder_questions", "--saved", "kept", *asked)
    assert "Loaded" not in again
    assert re.findall(r"^> .*\n.*", again, re.MULTILINE) == re.findall(r"^> .*\n.*", printed, re.MULTILINE)


def test_a_repository_completes_its_file(run, tmp_path):
    for name in ("red", "green", "blue"):
        lines = [f"def paint_{name}(wall, coats):", f'    """Paints a wall {name}."""', "    for coat in range(coats):"]
        lines += [f'        wall.cover("{name}", thickness=0.35)', "    return wall.dry(hours=12)", ""]
        (tmp_path / f"{name}.py").write_text("\n".join(lines * 4), encoding="utf-8")
    printed = run("repository_completion", tmp_path, "--file", "red.py", "--line", 16, "--lines", 2)
    tokens = numbers(r": ([\d,]+) tokens, first token", printed)
    right = numbers(r"(\d) of 2 lines right", printed)
    computed = numbers(r"(\d+)% computed", printed)
    assert tokens[0] < tokens[1] == tokens[2]
    assert right == [2, 2, 2]
    assert computed[:2] == [100, 100]
    assert computed[2] < 90


def test_summaries_go_on_where_they_stopped(run, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, passage in enumerate(("West Point", "Amtrak", "space shuttle")):
        (folder / f"{number}.txt").write_text(part_of_speech(passage, 2600), encoding="utf-8")
    options = ("--out", "kept.jsonl", "--max-new-tokens", 8)
    assert "2 summaries in kept.jsonl: 2 made" in run("batch_summaries", folder, "--texts", 2, *options)
    printed = run("batch_summaries", folder, *options)
    assert re.search(r"3 summaries in kept.jsonl: 1 made in .* s, 2 were there already", printed)
    texts = [json.loads(line)["text"].strip() for line in Path("kept.jsonl").read_text().splitlines()]
    assert len(texts) == 3
    assert all(text.splitlines()[0] in printed for text in texts)


def test_passages_wait_for_the_second_question(run):
    printed = run("rag_passages", "--passages", 12, "--max-new-tokens", 12)
    ways = dict(zip(("dense", "static", "dynamic"), re.split(r"\n\w+, \w+Cache\(.*\)\n", printed)[1:], strict=True))
    revived = {name: numbers(r", ([\d,]+) layer-tokens revived", text) for name, text in ways.items()}
    assert revived["dense"] == revived["static"] == [0, 0]
    assert revived["dynamic"][1] > 1000
    bars = {name: re.findall(r"^  ([#.]{20})  ([#.]{20})", text, re.MULTILINE) for name, text in ways.items()}
    assert all(first == second for first, second in bars["static"]), "what static pruning left out stays where it is"
    assert any(first.count("#") < second.count("#") for first, second in bars["dynamic"])


def test_a_conversation_turns_back(run, tmp_path):
    document = tmp_path / "speech.txt"
    document.write_text(part_of_speech("Amtrak", 3000) + part_of_speech("West Point", 3000), encoding="utf-8")
    printed = run("conversation", "--document", document, "--max-new-tokens", 12)
    reused = numbers(r"; ([\d,]+) of [\d,]+ tokens were there", printed)
    revived = numbers(r"there, ([\d,]+) layer-tokens revived", printed)
    assert reused[0] == 0
    assert reused[1] > 1000, "the second turn goes on from the first"
    assert revived[1] > 1000, "the second question takes up what the first one skipped"
    assert "still has 2 turns" in printed
    *_, original, loaded = re.findall(r"^> .*\n((?:.+\n)+?)  first token", printed, re.MULTILINE)
    assert original == loaded


def test_a_scorer_of_ones_own(run):
    printed = run("own_scorer", "--items", 2, "--tokens", 600)
    assert "SharedPairs keeps the rules" in printed
    kept = {name: numbers(r"(\d\.\d+)", row) for name, row in re.findall(r"^(\w+) {2,}(.*)$", printed, re.MULTILINE)}
    assert kept.keys() >= {"SharedPairs", "LateInteraction", "LastTokenAttention", "Random"}
    assert kept["SharedPairs"][1] > 0.9 > kept["Random"][1], "at keep 0.3"


def test_an_ablation_goes_on_where_it_stopped(run):
    options = ("--items", 1, "--tokens", 600, "--out", "study")
    first, second = run("ablation", *options), run("ablation", *options)
    assert "7 configurations, 0 units known, 7 to run ......." in first
    assert "7 configurations, 7 units known, 0 to run" in second
    computed = [numbers(r"(\d+)%", row) for row in first.splitlines() if "keep=0." in row and "%" in row]
    assert [shares[0] for shares in computed] == sorted((shares[0] for shares in computed[:3]), reverse=True) * 2
    assert Path("study/curves.png").stat().st_size > 5000
    assert first.split("\n\n", 1)[1] == second.split("\n\n", 1)[1], "the same units give the same table"


def test_langchain_names_policies_and_reads_costs(run):
    with openai_stub() as (url, asked):
        printed = run("langchain_client", "--base-url", url, "--follow-up", "And then?")
    assert [one["lazyllm"]["policy"] for one in asked] == ["recommended", "dense", "recommended"]
    assert all(one["messages"][0]["content"].endswith(one["lazyllm"]["query"]) for one in asked)
    assert [bool(one.get("stream")) for one in asked] == [False, False, True]
    assert "dense: 5,000 prompt tokens, first token after 0.50 s, 12% of the prompt computed" in printed
    assert printed.endswith("> And then?\nasked with recommended\n")


def test_the_demo(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "demo", demo)
    spec.loader.exec_module(demo)
    monkeypatch.setattr(demo, "packaged_speech", lambda name: part_of_speech("West Point", 3600))
    monkeypatch.setattr(demo, "load_model", lambda path, **options: load_once(str(path), **loading(options)))
    monkeypatch.setattr(demo, "ROUNDS", 1)
    demo.main()
    assert "recommended gave that answer." in " ".join(capsys.readouterr().out.split())
    runs = json.loads(Path("out/demo-stats.json").read_text())["runs"]
    assert runs["recommended"]["stats"]["computed_fraction"] < runs["paper"]["stats"]["computed_fraction"] < 1
    assert Path("out/demo-kept.png").exists()


@pytest.mark.parametrize("name", sorted({*SCRIPTS} - WITHOUT_OPTIONS))
def test_help_tells_every_option(run, name: str):
    printed = run(name, "--help")
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert printed.count("--") > source.count("typer.Option(") > 2


# -- the notebook ------------------------------------------------------------------------------------

SMALL = """
DOCUMENT = packaged_speech("1985-Reagan-1")[-5000:]
QUESTION = "What is the name of the young woman who will graduate from West Point?"
ANSWER = "Jean Nguyen"
REPLY_TOKENS = 20
LENGTHS = [256, 768]
"""


def test_the_notebook_runs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    names = re.findall(r"^(\w+) =", parameters.source, re.MULTILINE)
    assert names == re.findall(r"^(\w+) =", SMALL, re.MULTILINE), "the cell has other parameters than the test sets"
    parameters.source = SMALL
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    said = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "Jean Nguyen" in said


def test_the_notebook_is_stored_whole_and_small():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    in_order, cleared = list(range(1, len(counts) + 1)), [None] * len(counts)
    assert counts in (in_order, cleared), "run all cells, or clear all outputs, then save"
    assert NOTEBOOK.stat().st_size < 300_000


# -- the list ----------------------------------------------------------------------------------------


def test_the_list_names_every_example():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[([\w.]+)\]\(([\w.]+)\)", text, re.MULTILINE)
    assert sorted(name for name, _ in listed) == sorted([*(f"{name}.py" for name in SCRIPTS), NOTEBOOK.name])
    assert all(name == target for name, target in listed)


def test_commands_in_the_list_have_options_that_exist():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for name, options in re.findall(r"python examples/(\w+)\.py(.*)", text):
        source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        for option in re.findall(r"--([\w-]+)", options):
            assert re.search(rf'\b{option.replace("-", "_")}: Annotated|"--{option}"', source), (
                f"{name} has no --{option}"
            )
