"""Studies from the command line, on a tiny model in a folder, and in trackers."""

import html
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from lazyllm import InputError, LazyConfig
from lazyllm.ablation import Study
from lazyllm.ablation.trackers import MLflow, TensorBoard, tracker_named
from lazyllm.cli.main import app
from tests.studies import load, short_items, small, tiny

STUDY = """
model: {model}
dtype: float64
tasks: {{records: 2}}
tokens: 300
config: {{scorer: SinkRecent, schedule: "Constant(0.5, start=1)"}}
axes:
  - {{field: protect.recent, values: [4, 16]}}
"""


@pytest.fixture(autouse=True)
def replies_are_short(monkeypatch):
    monkeypatch.setattr("lazyllm.ablation.plan.make_items", short_items)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for part in tiny():
        part.save_pretrained(folder)
    return folder


@pytest.fixture
def lazyllm(model, tmp_path, monkeypatch):
    """Runs `lazyllm ...` in an empty folder with a study in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "250")
    Path("window.yaml").write_text(STUDY.format(model=model))

    def run(*arguments, code: int = 0):
        result = CliRunner().invoke(app, [str(part) for part in arguments])
        assert result.exit_code == code, result.output
        return result

    return run


def test_a_study_is_one_file_and_one_command(lazyllm):
    dry = lazyllm("ablate", "window.yaml", "--dry-run").stdout
    assert [line.split()[-5:-3] for line in dry.splitlines() if "recent=" in line] == [["0", "2"]] * 2
    assert not Path("out").exists()
    shown = lazyllm("ablate", "window.yaml").stdout
    assert all(name in shown for name in ("stock", "protect.recent=4", "protect.recent=16", "change of loss"))
    assert len(Path("out/window/results.jsonl").read_text().splitlines()) == 6
    again = lazyllm("ablate", "window.yaml").stdout
    assert again == shown
    assert len(Path("out/window/results.jsonl").read_text().splitlines()) == 6
    assert lazyllm("study", "table", "out/window").stdout == shown
    dry = lazyllm("ablate", "window.yaml", "--dry-run").stdout
    assert [line.split()[-5:-3] for line in dry.splitlines() if "recent=" in line] == [["2", "0"]] * 2


def test_results_are_read_from_a_folder(lazyllm):
    lazyllm("ablate", "window.yaml", "--out", "here")
    state = lazyllm("study", "status", "here").stdout
    assert [line.split() for line in state.splitlines() if "recent=4" in line] == [
        ["records", "protect.recent=4", "2", "0", "0"]
    ]
    lazyllm("study", "export", "here", "--to", "results.json")
    assert len(json.loads(Path("results.json").read_text())["units"]) == 6
    refused = lazyllm("study", "export", "here", "--to", "results.doc", code=2)
    assert "unknown format 'doc'" in refused.stderr
    assert "holds no study" in lazyllm("study", "table", "nowhere", code=2).stderr


def test_an_evaluation_is_a_study(lazyllm, model):
    options = ["--tasks", "records,table", "--items", 1, "--tokens", 300, "--model", model, "--dtype", "float64"]
    shown = lazyllm("eval", "--preset", "random-drop,streamingllm", *options).stdout
    assert all(name in shown for name in ("stock", "random-drop", "streamingllm", "records", "table"))
    assert len(Path("out/eval/results.jsonl").read_text().splitlines()) == 2 * 3
    assert lazyllm("eval", "--preset", "random-drop,streamingllm", *options).stdout == shown


@pytest.mark.parametrize("out", [[], ["--out", "else where"]], ids=["out/NAME", "elsewhere"])
def test_the_command_on_a_page_goes_on_with_an_evaluation(lazyllm, model, out):
    options = ["--tasks", "records", "--items", 1, "--tokens", 300, "--model", model, "--dtype", "float64", *out]
    shown = lazyllm("eval", "--preset", "random-drop", *options).stdout
    folder = out[-1] if out else "out/eval"
    lazyllm("report", folder, "-o", "page.html")
    page = html.unescape(Path("page.html").read_text(encoding="utf-8"))
    (command,) = re.findall(r"lazyllm (ablate .*?)<", page)
    assert lazyllm(*shlex.split(command)).stdout == shown
    assert len(Path(folder, "results.jsonl").read_text().splitlines()) == 2


def test_configurations_of_one_name_are_refused(lazyllm, model):
    for folder in ("one", "other"):
        Path(folder).mkdir()
        LazyConfig.preset("random-drop").save(Path(folder, "mine.yaml"))
    LazyConfig.preset("random-drop").save(Path("one", "dense.yaml"))
    refused = lazyllm("eval", "--preset", "one/mine.yaml,other/mine.yaml", "--model", model, code=2)
    assert "two configurations are called 'mine', 'one/mine.yaml' and 'other/mine.yaml'" in refused.stderr
    options = ["--preset", "one/dense.yaml", "--model", model]
    assert "two configurations are called 'dense'" in lazyllm("eval", "--tasks", "lm-eval:a", *options, code=2).stderr


def test_a_preview_of_tasks_of_lm_eval_alone_shows_no_other(lazyllm, model):
    told = lazyllm("eval", "--tasks", "lm-eval:niah_single_1", "--model", model, "--dry-run")
    assert "not known before they run: niah_single_1" in told.stderr
    assert told.stdout == ""


def test_a_wrong_study_is_one_line(lazyllm):
    path = Path("wrong.yaml")
    path.write_text("tasks: {needel: 3}")
    result = lazyllm("ablate", path, code=2)
    assert result.stderr.startswith("lazyllm: ")
    assert "Did you mean 'needle'" in result.stderr
    assert "cannot read the study" in lazyllm("ablate", "none.yaml", code=2).stderr
    assert "unknown device" in lazyllm("ablate", "window.yaml", "--dry-run", "--device", "h1000", code=2).stderr
    assert "unknown tracker 'wandb'" in lazyllm("ablate", "window.yaml", "--track", "wandb", code=2).stderr


def test_cells_that_are_the_same_are_said(lazyllm):
    text = Path("window.yaml").read_text() + "cells: [{name: twin, protect.recent: 16}]\n"
    Path("window.yaml").write_text(text)
    assert "'twin' is the same as 'protect.recent=16'" in lazyllm("ablate", "window.yaml").stderr


PAGE = (Path(__file__).parents[1] / "docs" / "ablation.md").read_text(encoding="utf-8")
FILES = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_files_of_the_page_are_studies(monkeypatch):
    assert len(FILES) >= 4
    assert [len(Study.from_text(text).all_cells()) for text in FILES] == [3, 20, 4, 5, 6]
    documented = re.findall(
        r"^\| `(\w+)`(?:, `(\w+)`, `(\w+)`)?", PAGE.split("## What a file may say")[1], re.MULTILINE
    )
    names = {name for row in documented for name in row if name in Study.model_fields}
    assert names == set(Study.model_fields)


def test_the_first_ablation_of_the_page_runs(lazyllm, model):
    small_one = {"model": str(model), "dtype": "float64", "tokens": 300}
    study = {**yaml.safe_load(FILES[0]), **small_one}
    Path("protection.yaml").write_text(yaml.safe_dump(study))
    for line in re.findall(r"^lazyllm (?:ablate|study) .*", PAGE, re.MULTILINE):
        lazyllm(*line.split()[1:])
    assert len(Path("results.csv").read_text().splitlines()) == 1 + 32


def test_mlflow_gets_a_run_per_cell(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = str(tmp_path / "mlruns")
    study = small(axes=[{"field": "protect.recent", "values": [4, 16]}])
    for _ in range(2):
        study.run(tmp_path / "out", load=load, callbacks=[MLflow(uri)])
    client = mlflow.MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name("study").experiment_id])
    by_name = {run.data.tags["mlflow.runName"]: run for run in runs}
    assert len(runs) == 3
    assert by_name["protect.recent=4"].data.params["protect.recent"] == "4"
    assert by_name["stock"].data.metrics["records/loss"] > 0


def test_tensorboard_gets_a_folder_per_cell(tmp_path):
    study = small(axes=[{"field": "protect.recent", "values": [4]}])
    study.run(tmp_path / "out", load=load, callbacks=[TensorBoard(tmp_path / "runs")])
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"stock", "protect.recent=4"}
    assert all(list(path.glob("events*")) for path in (tmp_path / "runs").iterdir())


def test_an_unknown_tracker_is_refused():
    with pytest.raises(InputError, match=r"'mlflw'.*Did you mean 'mlflow'"):
        tracker_named("mlflw:here")


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[1].glob("studies/*.yaml")), ids=lambda path: path.stem)
def test_the_studies_that_come_with_the_project_can_be_run(path):
    study = Study.load(path)
    assert study.name == path.stem
    assert study.figures
    assert len(study.all_cells()) > 1
    assert study.notices() == []
