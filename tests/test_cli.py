"""The command line, on a tiny model in a folder; nothing is downloaded."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from lazyllm import CACHES, SCHEDULES, SCORERS, Constant, InputError, LazyConfig, LazyPipeline, preset_names
from lazyllm.cli.main import app
from lazyllm.evaluation import data
from lazyllm.policies import Keep, Phase
from tests.tiny import word_tokenizer

WORDS = [f"w{index}" for index in range(60)]
PROMPT = " ".join(WORDS[3 * index % 60] for index in range(40))
PRUNING = ["--preset", "paper", "--scorer", "WindowAttention(window=4)", "--schedule", "Stages({1: 0.6, 3: 0.3})"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model with a word tokenizer, saved as one would find it on disk."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=66, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.float64)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    model.save_pretrained(path)
    word_tokenizer(WORDS).save_pretrained(path)
    return path


@pytest.fixture
def lazyllm(folder: Path, monkeypatch):
    """Runs `lazyllm COMMAND ...`; generate runs on the tiny model."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "200")

    def run(command: str, *arguments: object, stdin: str | bytes | None = None):
        model = ["--model", str(folder), "--max-new-tokens", "6"] if command == "generate" else []
        return CliRunner().invoke(app, [command, *model, *map(str, arguments)], input=stdin)

    return run


def expected(folder: Path, prompt, **policies) -> str:
    pipe = LazyPipeline.from_pretrained(folder, **policies)
    return pipe.generate(prompt, max_new_tokens=6, do_sample=False).text


def refused(result, *parts: str) -> None:
    """One line on stderr that holds `parts`, exit code 2, nothing on stdout, no traceback."""
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    line = lines[-1]
    assert line.startswith("lazyllm: ")
    assert all("Loading weights" in before or not before for before in lines[:-1])
    for part in parts:
        assert part in line


def test_generate_prints_the_pipelines_text_and_nothing_else_on_stdout(lazyllm, folder):
    result = lazyllm("generate", "--prompt", PROMPT, *PRUNING)
    text = expected(folder, PROMPT, scorer="WindowAttention(window=4)", schedule="Stages({1: 0.6, 3: 0.3})")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == text + "\n"
    assert "40 prompt tokens, 6 new" in result.stderr
    assert "computed 100.0%" not in result.stderr


def test_the_prompt_may_come_from_a_file_or_from_stdin(lazyllm, folder, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    text = expected(folder, PROMPT, **LazyConfig.preset("recommended").to_dict()) + "\n"
    assert lazyllm("generate", "--prompt-file", file).stdout == text
    assert lazyllm("generate", "--prompt-file", "-", stdin=PROMPT).stdout == text
    assert lazyllm("generate", stdin=PROMPT).stdout == text


def test_chat_wraps_the_prompt_as_a_user_message(lazyllm, folder):
    result = lazyllm("generate", "--prompt", PROMPT, "--chat", "--preset", "dense")
    assert "44 prompt tokens" in result.stderr
    message = [{"role": "user", "content": PROMPT}]
    assert result.stdout == expected(folder, message, **LazyConfig.preset("dense").to_dict()) + "\n"


def test_weights_and_dtype_reach_the_model(lazyllm, folder):
    def reply(**options) -> str:
        return expected(folder, PROMPT, preset="recommended", dtype="bfloat16", **options) + "\n"

    result = lazyllm("generate", "--prompt", PROMPT, "--dtype", "bfloat16", "--weights", "int4")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == reply(weights="int4") != reply()


def test_options_override_the_preset_one_by_one(lazyllm, tmp_path):
    def computed(*options) -> float:
        file = tmp_path / "stats.json"
        result = lazyllm("generate", "--prompt", PROMPT, "--stats-json", file, *options)
        assert result.exit_code == 0, result.stderr
        return json.loads(file.read_text())["prefill_computed_fraction"]

    assert computed("--preset", "dense") == 1
    assert computed("--preset", "paper") == pytest.approx((40 + 28 + 19 + 13) / 160)
    assert computed("--preset", "paper", "--cache", "DenseCache") == 1
    assert computed("--preset", "paper", "--schedule", "Stages({1: 0.5})") == pytest.approx((40 + 3 * 20) / 160)
    assert computed("--preset", "paper", "--sinks", "15", "--recent", "5") == pytest.approx((40 + 28 + 20 + 20) / 160)


def test_what_no_option_names_is_the_presets(lazyllm, tmp_path, monkeypatch):
    """Not only the policies: how layers are run, too."""
    made = []

    def note(config, *_, **__):
        made.append(config)
        raise InputError("seen enough")

    monkeypatch.setattr("lazyllm.cli.main.LazyPipeline.from_config", note)
    path = LazyConfig(chunk=7).save(tmp_path / "own.yaml")
    for options in ([], ["--compile"]):
        lazyllm("generate", "--preset", path, "--scorer", "Random", "--prompt", PROMPT, *options)
    assert [(config.chunk, config.compile) for config in made] == [(7, False), (7, True)]


def test_a_configuration_file_is_a_preset(lazyllm, folder, tmp_path):
    config = LazyConfig(scorer="SinkRecent(sinks=2)", schedule="Constant(keep=0.4, start=1)")
    path = config.save(tmp_path / "own.json")
    assert (
        lazyllm("generate", "--prompt", PROMPT, "--preset", path).stdout
        == expected(folder, PROMPT, **config.to_dict()) + "\n"
    )


def test_compare_runs_the_dense_model_beside_it(lazyllm, folder):
    result = lazyllm("generate", "--prompt", PROMPT, "--compare", *PRUNING)
    assert result.exit_code == 0, result.stderr
    lazy, dense = (line for line in result.stdout.splitlines() if "lazy" in line or "dense" in line)
    assert expected(folder, PROMPT, scorer="WindowAttention(window=4)", schedule="Stages({1: 0.6, 3: 0.3})") in lazy
    assert expected(folder, PROMPT, **LazyConfig.preset("dense").to_dict()) in dense
    assert "100.0%" in dense
    assert "100.0%" not in lazy


def test_stats_plot_and_traces_are_written(lazyllm, tmp_path):
    files = {name: tmp_path / name for name in ("stats.json", "plot.png", "trace.json", "trace.npz")}
    for trace in ("trace.json", "trace.npz"):
        outputs = ["--stats-json", files["stats.json"], "--plot", files["plot.png"], "--trace", files[trace]]
        result = lazyllm("generate", "--prompt", PROMPT, *PRUNING, *outputs)
        assert result.exit_code == 0, result.stderr
    assert json.loads(files["stats.json"].read_text())["prompt_tokens"] == 40
    assert files["plot.png"].read_bytes().startswith(b"\x89PNG")
    records = json.loads(files["trace.json"].read_text())["records"]
    assert [len(record["computed"]) for record in records[:4]] == [40, 24, 24, 12]
    assert np.load(files["trace.npz"])["step0/layer3/row0/computed"].tolist() == records[3]["computed"]


def test_a_long_prefill_shows_its_progress_on_stderr_only(lazyllm):
    long = " ".join(WORDS[index % 60] for index in range(512))
    result = lazyllm("generate", "--prompt", long, "--max-new-tokens", 1)
    assert result.exit_code == 0, result.stderr
    assert "prefill of 512 tokens" in result.stderr
    assert "prefill" not in result.stdout


def test_sampling_is_seeded(lazyllm):
    def reply(*options) -> str:
        return lazyllm("generate", "--prompt", PROMPT, *options).stdout

    hot = ["--sample", "--temperature", "5", "--seed"]
    assert reply(*hot, "1") == reply(*hot, "1") != reply(*hot, "2")


def test_policies_lists_everything_that_is_registered(lazyllm):
    out = lazyllm("policies").stdout
    for registry in (SCORERS, SCHEDULES, CACHES):
        for name, policy in registry.items():
            assert name in out
            for field in policy.model_fields:
                assert field in out
    for name in preset_names():
        assert name in out
    assert "window=32" in out
    assert "stages (required)" in out
    assert "2404.14469" in out


def one_each(line: str) -> list[str]:
    """What may enter each layer of a table's line, "3" or "0-8"."""
    _, layers, keep, _ = (cell.strip() for cell in line.split("│"))
    first, _, last = layers.partition("-")
    return [keep] * (int(last or first) - int(first) + 1)


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("layers", [10, 32])
def test_inspect_config_shows_the_yaml_the_ratios_and_the_work(lazyllm, name: str, layers: int):
    out = lazyllm("inspect-config", name, "--layers", layers).stdout
    config = LazyConfig.preset(name)
    assert LazyConfig.from_text(out.split("\n\n")[0]) == config
    shown = [keep for line in out.splitlines() if line.startswith("│") for keep in one_each(line)]
    cuts = config.schedule.cuts(layers, Phase(is_prefill=True, context_tokens=4096))
    cuts = {-1: Keep(1.0), **cuts}
    keeps = [cuts[max(cut for cut in cuts if cut <= layer)] for layer in range(layers)]
    assert shown == [str(keep) for keep in keeps]
    assert f"{sum(keep.fraction(4096) for keep in keeps) / layers:.1%} of dense" in out


def test_inspect_config_knows_that_a_dense_cache_prunes_nothing(lazyllm, tmp_path):
    path = LazyConfig(schedule="Stages({1: 0.5})", cache="DenseCache").save(tmp_path / "own.yaml")
    assert "100.0% of dense" in lazyllm("inspect-config", path, "--layers", 4).stdout


@pytest.mark.parametrize(("tokens", "work"), [(99, ": 100.0% of dense"), (100, ": at most 62.5% of dense")])
def test_inspect_config_shows_what_a_prompt_of_a_length_gets(lazyllm, tmp_path, tokens: int, work: str):
    mass = {"name": "AttentionMass", "share": 0.25, "ceiling": 0.5}
    config = LazyConfig(schedule={"name": "FullBelow", "length": 100, "schedule": mass})
    path = config.save(tmp_path / "own.yaml")
    out = lazyllm("inspect-config", path, "--layers", 4, "--context-tokens", tokens).stdout
    assert work in out
    assert ("0.25 of the score, 0 to 0.5 of the context" in out) == (tokens == 100)


@pytest.mark.parametrize(
    ("tokens", "work"), [(512, ": 100.0% of dense"), (2048, ": 62.5% of dense"), (4096, ": 43.8%")]
)
def test_inspect_config_takes_a_budget_by_the_length(lazyllm, tmp_path, tokens: int, work: str):
    wider = {"name": "Constant", "keep": 0.9, "start": 3}  # behind the budget it lets no more enter than the budget did
    budget = {"name": "TokenBudget", "tokens": {1: 1024}}
    config = LazyConfig(schedule={"name": "Funnel", "schedules": [budget, wider] if tokens > 1024 else [budget]})
    out = lazyllm(
        "inspect-config", config.save(tmp_path / "own.yaml"), "--layers", 4, "--context-tokens", tokens
    ).stdout
    assert work in out
    assert "1,024 tokens" in out


@pytest.mark.parametrize(("options", "work"), [([], ": 87.5% of dense"), (["--asked"], ": 62.5% of dense")])
def test_inspect_config_shows_what_a_prompt_that_asks_gets(lazyllm, tmp_path, options: list[str], work: str):
    schedule = {"name": "ByQuestion", "asked": "Constant(0.5)", "unasked": "Constant(0.5, start=3)"}
    path = LazyConfig(schedule=schedule).save(tmp_path / "own.yaml")
    assert work in lazyllm("inspect-config", path, "--layers", 4, *options).stdout


BINARY = b"\x89PNG\r\n\x1a\n\xff\xfe"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--prompt", ""], ["prompt is empty"]),
        (["--prompt", " \n"], ["prompt is empty", r"' \n'"]),
        (["--prompt", "a", "--prompt-file", "b"], ["not both"]),
        (["--prompt-file", "no/such.txt"], ["'no/such.txt'", "No such file"]),
        (["--prompt", PROMPT, "--preset", "papier"], ["'papier'", "Did you mean 'paper'?"]),
        (["--prompt", PROMPT, "--preset", "no.yaml"], ["'no.yaml'"]),
        (["--prompt", PROMPT, "--scorer", "WindowAtention"], ["Did you mean 'WindowAttention'?"]),
        (["--prompt", PROMPT, "--scorer", "WindowAttention(windw=3, pool=2)"], ["'windw'", "pool"]),
        (["--prompt", PROMPT, "--scorer", "WindowAttention(window=3"], ["'WindowAttention(window=3'"]),
        (["--prompt", PROMPT, "--schedule", "Stages({1: 1.5})"], ["1.5"]),
        (["--prompt", PROMPT, "--schedule", "Stages({7: 0.5})"], ["layer 7", "0 to 3"]),
        (["--prompt", PROMPT, "--preset", "paper", "--schedule", "Constant(keep=0.5, start=0)"], ["before layer 0"]),
        (["--prompt", PROMPT, "--cache", "AuxCache(decode='x')"], ["'x'"]),
        (["--prompt", PROMPT, "--sinks", "-1"], ["sinks", "-1"]),
        (["--prompt", PROMPT, "--dtype", "float31"], ["'float31'", "Did you mean 'float32'?"]),
        (["--prompt", PROMPT, "--weights", "int3"], ["'int3'", "Known: int4, int8"]),
        (["--prompt", PROMPT, "--weights", "int4"], ["int4", "float64"]),
        (["--prompt", PROMPT, "--gguf-file", "no.gguf"], ["'no.gguf'"]),
        (["--prompt", PROMPT, "--temperature", "0.5"], ["--sample"]),
        (["--prompt", PROMPT, "--sample", "--temperature", "0"], ["above 0", "0.0"]),
        (["--prompt", PROMPT, "--trace", "trace.txt"], [".json or .npz", "'trace.txt'"]),
        (["--prompt", PROMPT, "--stats-json", "no/such/stats.json"], ["'no/such/stats.json'"]),
        (["--prompt", "w1 " * 513], ["513 tokens", "512"]),
    ],
    ids=lambda value: " ".join(value[-2:])[-40:],
)  # fmt: skip
def test_generate_refuses_in_one_line(lazyllm, arguments, parts):
    refused(lazyllm("generate", *arguments), *parts)


@pytest.mark.parametrize(("data", "part"), [(BINARY, "0x89 at offset 0"), (b"abc\0def", "offset 3"), (b"", "empty")])
def test_a_prompt_that_is_no_text_is_refused(lazyllm, tmp_path, data: bytes, part: str):
    file = tmp_path / "prompt.bin"
    file.write_bytes(data)
    refused(lazyllm("generate", "--prompt-file", file), part, str(file))
    refused(lazyllm("generate", stdin=data), part, "stdin")


@pytest.mark.parametrize(("name", "kind"), [("nothing-here", "folder"), ("nothing.gguf", "GGUF file")])
def test_a_model_that_is_not_there_is_refused(lazyllm, tmp_path, name: str, kind: str):
    refused(lazyllm("generate", "--model", tmp_path / name, "--prompt", PROMPT), f"there is no {kind}", name)


def test_a_model_that_comes_as_a_package_has_a_name(lazyllm, monkeypatch, tmp_path):
    monkeypatch.setattr(data, "packaged_model", lambda: tmp_path / "packaged.gguf")
    refused(lazyllm("generate", "--model", "packaged", "--prompt", PROMPT), str(tmp_path / "packaged.gguf"))


def test_a_plot_that_cannot_be_written_is_refused_after_the_reply(lazyllm, tmp_path):
    result = lazyllm("generate", "--prompt", PROMPT, "--plot", tmp_path / "plot.nonsense")
    assert result.exit_code == 2
    assert "nonsense" in result.stderr.splitlines()[-1]


def test_inspect_config_refuses_in_one_line(lazyllm, tmp_path):
    refused(lazyllm("inspect-config", "papier"), "'papier'")
    refused(
        lazyllm("inspect-config", LazyConfig(schedule="Stages({9: 0.7})").save(tmp_path / "own.yaml"), "--layers", 4),
        "layer 9",
    )


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_extra_the_command_says_what_to_install(package: str):
    code = f"import sys; sys.modules[{package!r}] = None; import lazyllm; import lazyllm.cli.main"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].endswith('pip install "lazyllm-torch[cli]"')
    assert package in done.stderr
    assert "Traceback" not in done.stderr


def test_python_m_lazyllm_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "lazyllm", "inspect-config", "nope"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("lazyllm: unknown preset 'nope'")


def test_policies_in_the_current_folder_are_found_and_hide_nothing(tmp_path):
    (tmp_path / "my_policies.py").write_text("from lazyllm import Uniform\nclass Mine(Uniform): pass\n")
    (tmp_path / "torch.py").write_text("raise SystemExit('found before what is installed')\n")
    (tmp_path / "mine.yaml").write_text("scorer: {name: 'my_policies:Mine'}\n")
    command = [str(Path(sys.executable).with_name("lazyllm")), "inspect-config", "mine.yaml", "--layers", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "my_policies:Mine" in done.stdout


def test_a_pipeline_from_a_preset_takes_other_policies_one_by_one(folder):
    pipe = LazyPipeline.from_pretrained(folder, preset="recommended", schedule="Constant(0.5)")
    recommended = LazyConfig.preset("recommended")
    assert pipe.config == recommended.model_copy(update={"schedule": Constant(0.5)})


# -- pages -------------------------------------------------------------------------------------------


def test_inspect_writes_a_page_and_prints_its_path(lazyllm, folder, tmp_path):
    page = tmp_path / "page.html"
    result = lazyllm(
        "inspect",
        "--model",
        folder,
        "--prompt",
        PROMPT,
        *PRUNING,
        "--query",
        "w3 w6",
        "--max-new-tokens",
        3,
        "-o",
        page,
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == str(page)
    assert "40 prompt tokens" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--prompt", PROMPT, "-o", "nowhere/page.html"], "there is no folder 'nowhere'"),
        (["--prompt", PROMPT, "--query", "absent"], "'absent' does not occur in the prompt"),
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", PROMPT, "--preset", "papre"], "Did you mean 'paper'?"),
    ],
)
def test_inspect_refuses_what_it_cannot_show(lazyllm, folder, arguments, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(lazyllm("inspect", "--model", folder, *arguments), reason)
