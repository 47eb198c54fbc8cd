"""Other engines beside lazyllm: workers that fail in every way, converted weights, the table and the figure."""

import importlib
import json
import random
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import quantize

from lazyllm import EngineError, InputError
from lazyllm.evaluation import bench, engines
from lazyllm.evaluation.bench import Timing, Workload
from lazyllm.evaluation.export import write_checkpoint, write_dequantised
from lazyllm.evaluation.plots import plot_engines
from lazyllm.evaluation.workers import FailedRun, Worker, WorkerRun
from lazyllm.models.loading import load_model

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
FAKE = """
    import os
    import sys

    sys.path.insert(0, sys.argv[1])
    from protocol import serve

    asked = []


    def reply(request):
        asked.append(request)
        print("a library prints this")
        if len(asked) == int(sys.argv[2]):
            print("out of memory", file=sys.stderr, flush=True)
            os._exit(3)
        if request["new_tokens"] > 4:
            raise ValueError("no more than 4 tokens")
        steps = [request.get("step", 0.5)] * (request["new_tokens"] - 1)
        return {"ttft_seconds": 2, "step_seconds": steps, "token_ids": request["token_ids"][:1], "kept_tokens": 3}


    def load():
        print("a library prints this too")
        return reply, {"fake": "1.0"}


    serve(load)
"""
PROMPT = [5, 6, 7, 8, 9, 10]
ENVIRONMENT = {"layers": 2, "device": "processor", "threads": 2, "torch": "1.0"}


class Fixed(bench.TimedRun):
    """Takes one second to the first token and a quarter for each of the others."""

    def run(self, work):
        self.replies = [work.prompts[0][: work.new_tokens]]
        return timing(1.0, 0.25, work.new_tokens)


def asking(new_tokens):
    return Workload([PROMPT], new_tokens)


def timing(first, step, new_tokens=3):
    return Timing(first, (step,) * (new_tokens - 1))


@pytest.fixture
def start(tmp_path):
    """Starts workers from a script, and ends them."""
    workers = []

    def make(source=FAKE, *, dies_at=0, **options):
        script = tmp_path / "worker.py"
        script.write_text(textwrap.dedent(source))
        command = [sys.executable, str(script), str(BENCHMARKS / "workers"), str(dies_at)]
        workers.append(Worker("fake", command, log=tmp_path / "logs" / "fake.log", **options))
        workers[-1].start()
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


@pytest.fixture
def others(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("others")


def entrant(timed, engine, run):
    return engines.Entrant(timed, engine, run, "float32")


def test_a_worker_answers_and_what_its_libraries_print_does_not_disturb(start):
    worker = start()
    run = WorkerRun("fake", worker, request={"step": 0.25})
    assert worker.about == {"fake": "1.0"}
    assert run.run(asking(3)) == Timing(2.0, (0.25, 0.25))
    assert run.replies == [PROMPT[:1]]
    assert run.kept_fraction == 3 / len(PROMPT)
    assert run.run(asking(1)) == Timing(2.0)


def test_a_worker_takes_no_batch(start):
    with pytest.raises(InputError, match="fake replies to one prompt at a time, not to 2"):
        WorkerRun("fake", start()).run(Workload([PROMPT, PROMPT], 1))


def test_an_error_is_told_and_the_worker_goes_on(start):
    run = WorkerRun("fake", start())
    with pytest.raises(EngineError, match="fake: ValueError: no more than 4 tokens"):
        run.run(asking(5))
    assert run.run(asking(4)) == Timing(2.0, (0.5, 0.5, 0.5))


def test_a_dead_worker_leaves_its_code_and_last_words(start):
    run = WorkerRun("fake", start(dies_at=2))
    run.run(asking(2))
    for _ in range(2):
        with pytest.raises(EngineError, match=r"fake ended with exit code 3; it last said: .*out of memory"):
            run.run(asking(2))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise SystemExit('no such model')", "exit code 1; it last said: no such model"),
        (FAKE.replace("return reply,", "raise OSError('no such model')  #"), "did not load: OSError: no such model"),
        ("print('hello')", r"answered b?'hello\\n', which is no JSON object"),
        ("print('[1]')", "which is no JSON object"),
    ],
)
def test_a_worker_that_does_not_load_says_why(start, source, message):
    with pytest.raises(EngineError, match=message):
        start(source)


def test_a_worker_that_hangs_or_is_absent_is_given_up(start, tmp_path):
    with pytest.raises(EngineError, match=r"did not answer within 0\.2 seconds"):
        start("import time; time.sleep(60)", patience_seconds=0.2)
    with pytest.raises(EngineError, match="absent did not start"):
        Worker("absent", [str(tmp_path / "nothing")], log=tmp_path / "log").start()


def test_an_answer_that_is_no_timing_is_shown(start):
    run = WorkerRun("fake", start(FAKE.replace('"ttft_seconds": 2', '"ttft": 2')))
    with pytest.raises(EngineError, match=r"no timing.*'ttft': 2"):
        run.run(asking(2))


def test_a_run_whose_engine_fails_drops_out_and_the_others_go_on(start):
    field = [Fixed("stock", is_stock=True), WorkerRun("dying", start(dies_at=2)), Fixed("lazy", is_stock=False)]
    errors = {}
    timings = bench.run_rounds(
        field, asking(2), 3, random.Random(0), on_error=lambda one, error: errors.update({one.name: error})
    )
    assert {name: len(runs) for name, runs in timings.items()} == {"stock": 3, "lazy": 3}
    assert errors.keys() == {"dying"}
    with pytest.raises(EngineError):
        bench.run_rounds(field, asking(2), 3, random.Random(0))


@pytest.fixture
def report():
    lines = []
    absent = EngineError("pip | could not install it")
    for length in (4, 6):
        stock, lazy = Fixed("a", is_stock=True), Fixed("b", is_stock=False)
        slow = Fixed("c", is_stock=True)
        stock.replies, lazy.replies, slow.replies = [[1, 2, 3]], [[1, 2, 4]], [[1]]
        lazy.kept_fraction = 0.2
        lazy.stats = [SimpleNamespace(prompt_tokens=length, prefill_computed_fraction=0.25)]
        entrants = [
            entrant(slow, "transformers", "eager"),
            entrant(stock, "transformers", "sdpa"),
            entrant(lazy, "lazyllm", "recommended"),
            entrant(FailedRun("d", absent), "kvpress", "KNorm"),
        ]
        timings = {
            "a": [timing(2.0, 0.1), timing(4.0, 0.1), timing(6.0, 0.1)],
            "b": [timing(1.0, 0.2)] * 3,
            "c": [Timing(8.0)] * 3,
        }
        lines += engines.line_up(entrants, timings, {"d": absent}, length, 3)
    return engines.EngineReport("tiny", 3, "python others.py --rounds 3", ENVIRONMENT, lines)


def test_lines_compare_with_the_fastest_unmodified_run(report):
    slow, stock, lazy, failed = report.lines[:4]
    assert [line.is_baseline for line in report.lines[:4]] == [False, True, False, False]
    assert (slow.ttft_speedup, stock.ttft_speedup, lazy.ttft_speedup) == (0.5, 1, 4)
    assert (slow.decode_speedup, lazy.decode_speedup) == (None, 0.5)
    assert (slow.same_tokens, stock.same_tokens, lazy.same_tokens) == (1, 3, 2)
    assert (lazy.computed_fraction, lazy.kept_fraction) == (0.25, 0.2)
    assert failed.ttft_seconds is None
    assert "could not install" in failed.error


def test_without_an_unmodified_run_there_are_times_and_no_speedups():
    lazy = entrant(Fixed("b", is_stock=False), "lazyllm", "recommended")
    (line,) = engines.line_up([lazy], {"b": [timing(1.0, 0.2)]}, {}, 4, 3)
    assert (line.ttft_seconds.median, line.ttft_speedup, line.same_tokens) == (1, None, None)


def test_the_table_is_markdown_and_says_how_it_was_taken(report):
    section = engines.section(report)
    text = section.markdown()
    for said in (
        "tiny",
        "2 threads",
        "3 interleaved rounds",
        "python others.py --rounds 3",
        "torch 1.0",
        "4 to 6 tokens",
    ):
        assert said in text
    rows = [row for row in text.splitlines() if row.startswith("|")]
    assert len(rows) == 2 + len(report.lines)
    assert {row.count("|") for row in rows} == {len(section.columns) + 1}
    assert [row.startswith("| **4** | **transformers** | **sdpa** |") for row in rows].index(True) == 3
    assert "4.00 (2.00 - 6.00)" in rows[3]
    assert "| 1.00 (1.00 - 1.00) | 4.00x | 200 (200 - 200) | 5.0 | 0.50x | 25% | 20% | 2 of 3 |" in rows[4]
    assert "| failed |" in rows[5]
    assert text.count("could not install it") == 1


def test_results_are_written_as_json_table_and_figure(report, others, tmp_path):
    saved, page, figure = others.save(report, tmp_path / "new", tmp_path / "docs" / "table.md")
    loaded = json.loads(saved.read_text())
    assert loaded["lines"][2]["ttft_seconds"]["median"] == 1
    assert loaded["command"] == report.command
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert page.read_text() == engines.section(report).markdown()


def test_a_figure_is_drawn_when_everything_failed(report, tmp_path):
    failed = [line for line in report.lines if line.error]
    only = engines.EngineReport("tiny", 3, "", ENVIRONMENT, failed)
    assert plot_engines(only, tmp_path / "failed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("only", "without", "message"),
    [("lama.cpp", "", "Did you mean 'llama.cpp'"), ("kvpress", "vllm", "unknown value 'vllm'")],
)
def test_an_unknown_engine_is_named(others, only, without, message):
    with pytest.raises(InputError, match=message):
        others.chosen(only, without)


def test_engines_are_chosen_and_left_out(others):
    assert others.chosen("kvpress,lazyllm", "") == ["lazyllm", "kvpress"]
    assert others.chosen(",".join(others.ENGINES), "kvpress") == ["transformers", "lazyllm", "llama.cpp"]
    with pytest.raises(InputError, match="no engine is left"):
        others.chosen("kvpress", "kvpress")


LAYERS, WIDTH, INNER, HEADS, WORDS = 2, 64, 128, 2, 96


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    """A Llama of two layers with Q4_1 matrices and a tokenizer."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf"
    noise = np.random.default_rng(0)
    writer = GGUFWriter(path, arch="llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_file_type(3)
    writer.add_vocab_size(WORDS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["w", "0", *(f"w{index}" for index in range(WORDS - 2))])
    writer.add_token_types([1] * WORDS)
    writer.add_token_merges(["w 0"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (WORDS, WIDTH), "output": (WORDS, WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        square = {f"blk.{layer}.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
        norms = {f"blk.{layer}.{name}_norm": (WIDTH,) for name in ("attn", "ffn")}
        inner = {f"blk.{layer}.ffn_{name}": (INNER, WIDTH) for name in ("gate", "up")}
        shapes |= square | norms | inner | {f"blk.{layer}.ffn_down": (WIDTH, INNER)}
    for name, shape in shapes.items():
        values = noise.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            kind = GGMLQuantizationType.Q4_1
            writer.add_tensor(f"{name}.weight", quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_model_is_loaded_with_every_kind_of_weights_that_was_asked_for(others, tiny_gguf, monkeypatch):
    plans = []
    monkeypatch.setattr(others, "compare_engines", lambda plan, _: plans.append(plan))
    others.main(model=str(tiny_gguf), dtypes="float32,int4/bfloat16", only="transformers,lazyllm")
    networks, _ = others.load(plans[0])
    kinds = {name: (network.dtype, type(network.lm_head.weight).__name__) for name, network in networks.items()}
    assert kinds == {
        "float32": (torch.float32, "Parameter"),
        "int4/bfloat16": (torch.bfloat16, "Int4OpaqueTensor"),
    }
    entrants = others.field(plans[0], networks, {}, asking(1))
    assert {entry.dtype for entry in entrants} == kinds.keys()
    assert len({entry.timed.name for entry in entrants}) == len(entrants)


def weights(path):
    return load_model(path, dtype="float32")[0].state_dict()


def test_a_dequantised_file_holds_the_weights_that_lazyllm_loads(tiny_gguf, tmp_path):
    plain = weights(write_dequantised(tiny_gguf, tmp_path / "new" / "tiny-F32.gguf", "F32"))
    packed = weights(tiny_gguf)
    assert plain.keys() == packed.keys()
    assert all((plain[name] == packed[name]).all() for name in packed)
    assert not list(tmp_path.rglob("*.unfinished"))


def test_a_dequantised_file_keeps_the_metadata_and_says_its_type(tiny_gguf, tmp_path):
    before = GGUFReader(tiny_gguf)
    for kind, number in (("F32", 0), ("F16", 1)):
        after = GGUFReader(write_dequantised(tiny_gguf, tmp_path / f"tiny-{kind}.gguf", kind))
        names = {name for name in before.fields if not name.startswith("GGUF.")}
        assert names == {name for name in after.fields if not name.startswith("GGUF.")}
        for name in names - {"general.file_type"}:
            assert before.fields[name].contents() == after.fields[name].contents(), name
            assert before.fields[name].types == after.fields[name].types, name
        assert after.fields["general.file_type"].contents() == number
        assert {tensor.tensor_type.name for tensor in after.tensors if len(tensor.shape) > 1} == {kind}
        assert {tensor.tensor_type.name for tensor in after.tensors if len(tensor.shape) == 1} == {"F32"}


def test_a_checkpoint_folder_holds_the_same_weights_and_is_not_marked_as_quantised(tiny_gguf, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = write_checkpoint(tiny_gguf, tmp_path / "checkpoint")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    plain, packed = AutoModelForCausalLM.from_pretrained(folder).state_dict(), weights(tiny_gguf)
    assert all((plain[name] == packed[name]).all() for name in packed)


def test_what_cannot_be_converted_is_refused(tiny_gguf, tmp_path):
    with pytest.raises(InputError, match=r"unknown file type 'Q8_0'.*F16, F32"):
        write_dequantised(tiny_gguf, tmp_path / "a.gguf", "Q8_0")
    with pytest.raises(InputError, match="there is no GGUF file"):
        write_dequantised(tmp_path / "nothing.gguf", tmp_path / "a.gguf", "F32")


def test_all_ways_to_attend_with_one_query_give_the_same(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    one_query = importlib.import_module("one_query")
    query, keys, values = (torch.randn(1, heads, tokens, 8) for heads, tokens in ((6, 1), (2, 30), (2, 30)))
    outputs = [way(query, keys, values) for way in one_query.WAYS.values()]
    for output in outputs:
        torch.testing.assert_close(output, outputs[0])
    one_query.main(keys="5,30", dtypes="float32", layers=2, rounds=1, out=tmp_path)
    table = (tmp_path / "one_query.md").read_text()
    assert all(table.count(name) == 2 for name in one_query.WAYS)
