"""A pipeline as lm-eval's model: equal to lm-eval's own where nothing is pruned, to a plain loop elsewhere."""

import json
import random
import subprocess
import sys
from functools import cache
from pathlib import Path

import lm_eval
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from typer.testing import CliRunner

from lazyllm import ConfigError, InputError, LazyConfig, LazyPipeline, PromptMarks
from lazyllm.ablation.lm_eval_tasks import family
from lazyllm.cli.main import app
from lazyllm.evaluation import harness_cli
from lazyllm.evaluation.continuations import score_replies
from lazyllm.evaluation.data import packaged_model, packaged_speech, quiet_loading
from lazyllm.evaluation.harness import LazyLM, marks_at_end
from lazyllm.evaluation.harness_tasks import HarnessItem, HarnessResult, evaluate
from lazyllm.models.loading import load_model
from lazyllm.prompts import EncodedPrompt
from tests.tiny import tiny_model, word_tokenizer

WORDS = ["?", ".", "who", "what", *(f"w{number}" for number in range(85))]
"""With the special ones, as many as the models have embeddings."""
DENSE = LazyConfig.preset("dense")
UNPRUNED = LazyConfig(schedule="Constant(1.0)")
PRUNED = {
    "last token": LazyConfig(schedule="Stages({1: 0.6, 2: 0.4})"),
    "late interaction": LazyConfig(
        scorer="LateInteraction(pool=5)",
        schedule="AttentionMass(share=0.5, start=1)",
        protect={"sinks": 2, "recent": 4},
    ),
    "few revived": LazyConfig(
        schedule="Constant(0.4)", cache="AuxCache(decode='select', max_revived=2, attend='cached')"
    ),
    "dropped": LazyConfig(schedule="Constant(0.4)", cache="DropCache()"),
    "evicted": LazyConfig(schedule="Constant(1.0)", cache="EvictingCache(budget=0.3, when='decode')"),
}


def make_tokenizer():
    tokenizer = word_tokenizer(WORDS)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    return tokenizer


TOKENIZER = make_tokenizer()


def pipe_of(config, family="llama"):
    return LazyPipeline.from_config(config, tiny_model(family), TOKENIZER)


def stock(**options):
    return HFLM(pretrained=tiny_model(), tokenizer=make_tokenizer(), **options)


def text_of(length, seed):
    chosen = random.Random(seed)
    return " ".join(chosen.choice(WORDS[4:64]) for _ in range(length))


def asking(length, seed):
    return f"{text_of(length, seed)}\n\nwho w{seed % 60} ?"


def scoring(*pairs):
    """Log-likelihood requests of (context, continuation)."""
    return [Instance("loglikelihood", {}, pair, number, ("task", number, 1)) for number, pair in enumerate(pairs)]


def rolling(*texts):
    return [
        Instance("loglikelihood_rolling", {}, (text,), number, ("task", number, 1)) for number, text in enumerate(texts)
    ]


def generating(*contexts, **options):
    options = {"until": [], "max_gen_toks": 6, "do_sample": False, **options}
    return [
        Instance("generate_until", {}, (text, options), number, ("task", number, 1))
        for number, text in enumerate(contexts)
    ]


PAIRS = [
    (asking(length, seed), f" {text_of(seed % 4 + 1, seed + 50)}") for seed, length in enumerate((30, 70, 12, 70, 41))
]
PAIRS += [(PAIRS[1][0], " w3"), (PAIRS[1][0], " w7 w8 w9"), (PAIRS[4][0] + " \n", "w5 w6"), ("", "w1 w2")]


# -- tasks of lm-eval itself ---------------------------------------------------------------------------


@pytest.fixture
def task(tmp_path):
    """Configurations of tasks whose data is a local file."""
    lines = [
        {
            "text": asking(40 + 9 * number, number),
            "choices": [text_of(n + 1, 100 + n) for n in range(3)],
            "label": number % 3,
        }
        for number in range(5)
    ]
    path = tmp_path / "items.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "fewshot_split": "test",
        "fewshot_config": {"sampler": "first_n"},
        "doc_to_text": "{{text}}",
    }
    kinds = {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "replies": {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[label]}}",
            "generation_kwargs": {"until": ["w7", "\n"], "max_gen_toks": 9, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
        "texts": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
    }
    return lambda kind: {"task": f"local_{kind}", **shared, **kinds[kind]}


@pytest.fixture(autouse=True)
def quick_results(monkeypatch):
    """lm-eval asks pip and git about the machine after every run, which takes seconds."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture
def only_ruler(monkeypatch):
    """lm-eval knows RULER's tasks alone; to look through all it has takes ten seconds."""
    everything = TaskManager.__init__

    def looking_at_ruler(self, **options):
        folder = Path(lm_eval.tasks.__file__).parent / "ruler"
        everything(self, **{**options, "include_path": folder, "include_defaults": False})

    monkeypatch.setattr(TaskManager, "__init__", looking_at_ruler)


def answers(model, task, **options):
    """What the model said to each request of each item, and the values of the item."""
    manager = TaskManager(include_defaults=False)
    output = lm_eval.simple_evaluate(model=model, tasks=[task], task_manager=manager, bootstrap_iters=0, **options)
    (samples,) = output["samples"].values()
    return [(sample["arguments"], sample["resps"], [sample[name] for name in sample["metrics"]]) for sample in samples]


def assert_same(got, expected, tolerance=1e-9):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one[0] == other[0]
        for mine, theirs in zip(one[1], other[1], strict=True):
            if isinstance(theirs[0], tuple):
                assert mine[0][0] == pytest.approx(theirs[0][0], abs=tolerance)
                assert mine[0][1] == theirs[0][1]
            elif isinstance(theirs[0], float):
                assert mine[0] == pytest.approx(theirs[0], abs=tolerance)
            else:
                assert mine == theirs
        assert [pytest.approx(value) for value in one[2]] == other[2]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_fewshot": 1},
        {"num_fewshot": 1, "apply_chat_template": True, "fewshot_as_multiturn": True},
        {"apply_chat_template": True, "system_instruction": "w1 w2", "fewshot_as_multiturn": False},
    ],
    ids=["plain", "few-shot", "few-shot chat", "chat with a system message"],
)
@pytest.mark.parametrize("kind", ["choices", "replies"])
def test_tasks_run_as_with_lm_evals_own_model(task, kind, options):
    expected = answers(stock(), task(kind), **options)
    for config, batch_size in ((DENSE, 1), (DENSE, 3), (UNPRUNED, 3)):
        assert_same(answers(LazyLM(pipe_of(config), batch_size=batch_size), task(kind), **options), expected)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_rolling_tasks_run_as_with_lm_evals_own_model(task, batch_size):
    got = answers(LazyLM(pipe_of(DENSE), batch_size=batch_size, max_length=24), task("texts"))
    assert_same(got, answers(stock(batch_size=batch_size, max_length=24), task("texts")))


# -- nothing pruned ------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [DENSE, UNPRUNED], ids=["dense", "keep 1.0"])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("max_length", [None, 33])
def test_log_likelihoods_are_those_of_lm_evals_own_model(config, batch_size, max_length):
    own = LazyLM(pipe_of(config), batch_size=batch_size, max_length=max_length).loglikelihood(scoring(*PAIRS))
    other = stock(batch_size=batch_size, max_length=max_length).loglikelihood(scoring(*PAIRS))
    assert [greedy for _, greedy in own] == [greedy for _, greedy in other]
    assert [score for score, _ in own] == pytest.approx([score for score, _ in other], abs=1e-9)


@pytest.mark.parametrize("config", [DENSE, UNPRUNED, *PRUNED.values()], ids=["dense", "keep 1.0", *PRUNED])
def test_what_greedy_decoding_says_is_known_as_that(config):
    pipe = pipe_of(config)
    context = pipe.encode(text_of(50, 1)).token_ids
    said = pipe.generate(context, max_new_tokens=5, do_sample=False).token_ids
    others = [[*said[:at], (said[at] + 1) % 96, *said[at + 1 :]] for at in range(len(said))]
    got = LazyLM(pipe)._loglikelihood_tokens([(None, context, reply) for reply in (said, *others)])
    assert [greedy for _, greedy in got] == [True, *[False] * len(others)]


@pytest.mark.parametrize("options", [{}, {"until": ["w7"]}, {"max_gen_toks": 200, "until": ["w1"]}], ids=str)
def test_texts_are_those_of_lm_evals_own_model(options):
    requests = [asking(length, seed) for seed, length in enumerate((90, 20, 55, 70))]
    for batch_size in (1, 4):
        own = LazyLM(pipe_of(UNPRUNED), batch_size=batch_size).generate_until(generating(*requests, **options))
        assert own == stock(batch_size=batch_size).generate_until(generating(*requests, **options))
        assert any(own)


# -- something pruned ----------------------------------------------------------------------------------


@torch.no_grad()
def in_a_plain_loop(pipe, marks, context, continuation):
    """Prefill, then one token after the other; the log-probability of each."""
    said = []
    with pipe.attached() as model:
        cache = pipe.new_cache(marks=[marks])
        step = torch.tensor([context])
        for token in continuation:
            chances = model(step, past_key_values=cache, logits_to_keep=1).logits[0, -1].log_softmax(-1)
            said.append((float(chances[token]), int(chances.argmax()) == token))
            step = torch.tensor([[token]])
    return sum(score for score, _ in said), all(greedy for _, greedy in said)


def by_hand(pipe, context, continuation):
    """The plain loop over the tokens lm-eval makes of a request."""
    if not context:
        return in_a_plain_loop(pipe, PromptMarks(), [TOKENIZER.eos_token_id], TOKENIZER(continuation).input_ids)
    stripped = context.rstrip()
    encoded = pipe.encode(stripped)
    tokens = TOKENIZER(context + continuation).input_ids[len(encoded.token_ids) :]
    return in_a_plain_loop(pipe, encoded.marks, encoded.token_ids, tokens)


@pytest.mark.parametrize("config", PRUNED.values(), ids=PRUNED)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_continuation_is_scored_as_if_it_were_generated(config, batch_size):
    pipe = pipe_of(config)
    own = LazyLM(pipe, batch_size=batch_size).loglikelihood(scoring(*PAIRS))
    expected = [by_hand(pipe, *pair) for pair in PAIRS]
    assert [score for score, _ in own] == pytest.approx([score for score, _ in expected], abs=1e-9)
    assert [greedy for _, greedy in own] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("config", PRUNED.values(), ids=PRUNED)
def test_no_policy_gets_the_unmodified_models_numbers(config):
    own, dense = (LazyLM(pipe_of(one)).loglikelihood(scoring(*PAIRS[:5])) for one in (config, DENSE))
    several = [
        (one, other)
        for (one, _), (other, _), (_, said) in zip(own, dense, PAIRS, strict=False)
        if len(said.split()) > 1
    ]
    assert all(abs(one - other) > 1e-3 for one, other in several)


@pytest.mark.parametrize("config", PRUNED.values(), ids=PRUNED)
def test_texts_are_those_of_the_pipeline(config):
    contexts = [asking(length, seed) for seed, length in enumerate((90, 20, 55, 70))]
    pipe = pipe_of(config)
    expected = [pipe.generate(context, max_new_tokens=6, do_sample=False).text for context in contexts]
    for batch_size in (1, 3):
        assert LazyLM(pipe, batch_size=batch_size).generate_until(generating(*contexts)) == expected


@cache
def one_by_one():
    return LazyLM(pipe_of(PRUNED["late interaction"])).loglikelihood(scoring(*PAIRS))


@given(order=st.permutations(range(len(PAIRS))), batch_size=st.integers(1, 9))
def test_neither_order_nor_batch_changes_a_result(order, batch_size):
    alone = one_by_one()
    together = LazyLM(pipe_of(PRUNED["late interaction"]), batch_size=batch_size).loglikelihood(
        scoring(*(PAIRS[index] for index in order))
    )
    assert [score for score, _ in together] == pytest.approx([alone[index][0] for index in order], abs=1e-9)


@pytest.mark.parametrize(
    ("config", "same"), [(UNPRUNED, True), (PRUNED["last token"], False)], ids=["keep 1.0", "pruned"]
)
def test_one_step_for_a_whole_continuation_would_be_another_history(config, same):
    pipe = pipe_of(config)
    encoded, reply = pipe.encode(asking(60, 1)), TOKENIZER("w1 w2 w3 w4 w5 w6").input_ids
    ((steps,),) = score_replies(pipe, [encoded], [[reply]])
    with torch.no_grad(), pipe.attached(missing="nan") as model:
        cache = pipe.new_cache(marks=[encoded.marks])
        first = model(torch.tensor([encoded.token_ids]), past_key_values=cache, logits_to_keep=1).logits
        rest = model(torch.tensor([reply[:-1]]), past_key_values=cache).logits
        chances = torch.cat([first, rest], 1)[0].log_softmax(-1)
    at_once = float(chances.gather(-1, torch.tensor(reply)[:, None]).sum())
    assert (at_once == pytest.approx(steps.log_probability, abs=1e-9)) is same


def test_a_context_is_computed_once_for_all_its_continuations():
    alone, several = LazyLM(pipe_of(PRUNED["last token"])), LazyLM(pipe_of(PRUNED["last token"]))
    alone.loglikelihood(scoring(PAIRS[1]))
    several.loglikelihood(scoring(PAIRS[1], PAIRS[5], PAIRS[6]))
    assert several.share.computed == alone.share.computed
    assert several.share.fraction == pytest.approx(0.25 + 0.25 + 0.5 * 0.6 / 2 + 0.25 * 0.4 - 0.15, abs=0.2)


# -- whole texts ---------------------------------------------------------------------------------------


def test_whole_texts_are_refused_under_pruning_and_told_what_to_do():
    with pytest.raises(InputError, match="rolling_block=N"):
        LazyLM(pipe_of(PRUNED["last token"])).loglikelihood_rolling(rolling(text_of(30, 1)))


@pytest.mark.parametrize("block", [1, 7, 200])
@pytest.mark.parametrize("config", [DENSE, UNPRUNED], ids=["dense", "keep 1.0"])
def test_blocks_of_a_text_add_up_to_the_text_where_nothing_is_pruned(config, block):
    texts = [text_of(length, length) for length in (5, 40, 23)]
    got = LazyLM(pipe_of(config), rolling_block=block, batch_size=2).loglikelihood_rolling(rolling(*texts))
    assert got == pytest.approx(stock().loglikelihood_rolling(rolling(*texts)), abs=1e-9)


def test_a_block_is_the_reply_to_everything_before_it():
    pipe, tokens = pipe_of(PRUNED["last token"]), TOKENIZER(text_of(40, 3)).input_ids
    before = [TOKENIZER.eos_token_id]
    expected = sum(
        in_a_plain_loop(pipe, PromptMarks(), before + tokens[:start], tokens[start : start + 16])[0]
        for start in range(0, 40, 16)
    )
    (got,) = LazyLM(pipe, rolling_block=16).loglikelihood_rolling(rolling(text_of(40, 3)))
    assert got == pytest.approx(expected, abs=1e-9)
    assert got != pytest.approx(stock().loglikelihood_rolling(rolling(text_of(40, 3)))[0], abs=1e-3)


def test_a_text_longer_than_the_model_keeps_the_nearest_tokens_before_a_block():
    pipe, tokens = pipe_of(PRUNED["last token"]), TOKENIZER(text_of(60, 3)).input_ids
    (got,) = LazyLM(pipe, rolling_block=20, max_length=32).loglikelihood_rolling(rolling(text_of(60, 3)))
    contexts = [[TOKENIZER.eos_token_id], tokens[7:20], tokens[27:40]]
    blocks = [tokens[:20], tokens[20:40], tokens[40:]]
    expected = [in_a_plain_loop(pipe, PromptMarks(), *pair)[0] for pair in zip(contexts, blocks, strict=True)]
    assert got != pytest.approx(0)
    assert got == pytest.approx(sum(expected), abs=1e-9)


# -- what is known of a prompt -------------------------------------------------------------------------


@given(data=st.data(), dropped=st.integers(0, 19), added=st.integers(0, 3))
def test_marks_follow_the_tokens_they_name(data, dropped, added):
    tokens = list(range(20))
    ranges = st.tuples(st.integers(0, 19), st.integers(1, 20)).filter(lambda one: one[0] < one[1])
    marks = PromptMarks((data.draw(ranges),), (data.draw(ranges),), True, {"line": (0, 5, 11)})
    ids = [99] * added + tokens if added else tokens[dropped:]
    moved = marks_at_end(EncodedPrompt(tokens, marks), ids)
    for before, after in ((marks.protected, moved.protected), (marks.query, moved.query)):
        named = {token for start, stop in before for token in tokens[start:stop]}
        assert {token for start, stop in after for token in ids[start:stop]} == named & set(ids)
    assert {ids[start] for start in moved.starts["line"]} >= {0, 5, 11} & set(ids)
    assert moved.asked


def test_marks_of_other_tokens_are_refused():
    with pytest.raises(InputError, match="do not end as"):
        marks_at_end(EncodedPrompt([1, 2, 3], PromptMarks()), [1, 2, 4])


def test_a_chat_is_read_as_a_chat():
    pipe = pipe_of(PRUNED["late interaction"])
    chat = [
        {"role": "system", "content": "w1 w2"},
        {"role": "user", "content": f"{text_of(300, 1)}\n\nwhat w5 .\n\nw9 w8"},
    ]
    own = LazyLM(pipe)
    ids, _ = own.tok_batch_encode([own.apply_chat_template(chat)])
    encoded = pipe.encode(chat)
    assert ids[0].tolist() == encoded.token_ids
    assert own._batch_marks[0].query == encoded.marks.query != pipe.encode(own.apply_chat_template(chat)).marks.query


# -- what cannot be ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pretrained=x,preset=recomended", "unknown preset 'recomended'. Did you mean 'recommended'"),
        ("pretrained=x,presett=dense", "unknown model argument 'presett'. Did you mean 'preset'"),
        ("preset=dense", "pretrained=PATH"),
        ("pretrained=/nowhere/at/all.gguf", "there is no GGUF file"),
        ("pretrained=/nowhere/at/all", "there is no folder '/nowhere/at/all'"),
        ("pretrained=x,dtype=float23", "unknown dtype 'float23'"),
    ],
)
def test_wrong_model_arguments_are_named(arguments, message):
    with pytest.raises((ConfigError, InputError)) as error:
        LazyLM.create_from_arg_string(arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "options", [{"batch_size": "auto"}, {"batch_size": 0}, {"max_length": -1}, {"rolling_block": 1.5}], ids=str
)
def test_wrong_numbers_are_named(options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"{name} is a whole number of 1 or more"):
        LazyLM(pipe_of(DENSE), **options)


def test_a_tokenizer_with_an_end_token_is_needed():
    with pytest.raises(InputError, match="eos_token"):
        LazyLM(LazyPipeline.from_config(DENSE, tiny_model(), word_tokenizer(WORDS)))


@pytest.mark.parametrize("config", [DENSE, PRUNED["dropped"]], ids=["dense", "pruned"])
def test_a_request_that_is_too_long_is_refused_where_it_must_not_be_cut(config):
    own = LazyLM(pipe_of(config), max_length=20, truncate=False)
    with pytest.raises(InputError, match="has 33 tokens where there is room for 20"):
        own.loglikelihood(scoring((text_of(30, 1), " w1 w2 w3 w4")))
    with pytest.raises(InputError, match="has 30 tokens where there is room for 14"):
        own.generate_until(generating(text_of(30, 1)))


# -- several configurations on the same items ----------------------------------------------------------


def test_items_of_all_cells_are_the_same(task):
    configs = {"dense": DENSE, "pruned": PRUNED["last token"]}
    heard = []
    results = evaluate(
        tiny_model(),
        TOKENIZER,
        configs,
        [task("choices"), task("replies")],
        limit=3,
        batch_size=2,
        on_result=heard.append,
    )
    assert heard == results
    assert [(one.cell, one.task) for one in results] == [
        (name, f"local_{kind}") for name in configs for kind in ("choices", "replies")
    ]
    by_name = {(one.cell, one.task): one for one in results}
    for kind in ("local_choices", "local_replies"):
        dense, pruned = by_name["dense", kind], by_name["pruned", kind]
        assert [one.doc_id for one in dense.items] == [0, 1, 2]
        assert [(one.doc_id, one.prompts, one.target) for one in dense.items] == [
            (one.doc_id, one.prompts, one.target) for one in pruned.items
        ]
        assert (dense.computed_fraction, pruned.computed_fraction < 0.8) == (1.0, True)
        for result in (dense, pruned):
            for metric, value in result.metrics.items():
                assert value == pytest.approx(sum(one.metrics[metric] for one in result.items) / 3)
        json.dumps(pruned.to_dict())
    choices = by_name["dense", "local_choices"]
    own = LazyLM(pipe_of(DENSE)).loglikelihood(
        scoring(*((choices.items[0].prompts[n], f" {text_of(n + 1, 100 + n)}") for n in range(3)))
    )
    assert [score for score, _ in choices.items[0].replies] == pytest.approx([score for score, _ in own], abs=1e-9)
    assert set(choices.metrics) == {"acc", "acc_norm"} == set(choices.errors)


def test_generation_is_changed_for_all_cells(task):
    (short,), (long,) = (
        evaluate(tiny_model(), TOKENIZER, {"dense": DENSE}, [task("replies")], limit=1, generation=generation)
        for generation in ({"max_gen_toks": 2, "until": []}, {"max_gen_toks": 7, "until": []})
    )
    (few,), (many,) = short.items[0].replies, long.items[0].replies
    assert many.startswith(few)
    assert len(few.split()) <= 2 < len(many.split()) <= 7


def test_a_task_that_does_not_exist_is_named(only_ruler):
    with pytest.raises(InputError, match=r"lm-eval has no task 'niah_singel_1'. Did you mean .*'niah_single_1'"):
        evaluate(tiny_model(), TOKENIZER, {"dense": DENSE}, ["niah_singel_1"])


def test_a_task_without_its_data_says_how_to_get_it(task, tmp_path):
    config = {**task("choices"), "dataset_kwargs": {"data_files": str(tmp_path / "gone.jsonl")}}
    with pytest.raises(
        InputError, match=r"the data of task 'local_choices' is not here: .*load the task once with a connection"
    ):
        evaluate(tiny_model(), TOKENIZER, {"dense": DENSE}, [config])


# -- the command line ----------------------------------------------------------------------------------


def test_lm_evals_own_command_runs_it(task, tmp_path, only_ruler):
    folder, yaml = tmp_path / "model", tmp_path / "choices.yaml"
    model = tiny_model()
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    yaml.write_text(json.dumps(task("choices")))
    arguments = ["run", "--model", "lazyllm", "--model_args", f"pretrained={folder},preset=paper,dtype=float64"]
    arguments += ["--tasks", str(yaml), "--limit", "2", "--output_path", str(tmp_path / "out.json"), "--log_samples"]
    before = list(sys.argv)
    result = CliRunner().invoke(app, ["lm-eval", *arguments])
    assert result.exit_code == 0, result.output
    assert "local_choices" in result.output
    assert sys.argv == before
    (written,) = tmp_path.glob("out_*.json")
    config = json.loads(written.read_text())["config"]
    assert config["lazyllm"] == LazyConfig.preset("paper").to_dict()
    assert config["prefill_computed_fraction"] < 1


def test_eval_compares_presets_on_tasks_of_lm_eval(task, tmp_path, only_ruler):
    folder, yaml = tmp_path / "model", tmp_path / "choices.yaml"
    tiny_model().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    yaml.write_text(json.dumps(task("choices")))
    arguments = ["eval", "--model", folder, "--dtype", "float64", "--preset", "paper", "--items", "3"]
    arguments += ["--tasks", f"lm-eval:{yaml}", "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, [str(part) for part in arguments])
    assert result.exit_code == 0, result.output
    assert "local_choices acc" in result.output
    assert "too few" in result.output
    written = json.loads((tmp_path / "out" / "lm-eval.json").read_text())
    assert [one["contender"] for one in written] == ["dense", "paper"]
    assert [len(one["items"]) for one in written] == [3, 3]
    assert written[1]["computed_fraction"] < 1 == written[0]["computed_fraction"]


def test_a_metric_that_the_first_item_lacks_is_compared_too():
    items = (HarnessItem(0, "", (), (), {"acc": 1.0}), HarnessItem(1, "", (), (), {"acc": 0.0, "exact": 1.0}))
    results = [HarnessResult(name, "made", {}, {}, items, 1.0, 0.0) for name in ("dense", "paper")]
    assert [(one.task, one.pairs, one.excluded) for one in family(results)] == [
        ("made acc", 2, 0),
        ("made exact", 1, 1),
    ]


def test_of_some_metrics_less_is_better(task):
    """As a task or lm-eval's registry says; of a log-likelihood, which becomes a perplexity, more is better."""
    wrong = {"metric": "exact_match", "higher_is_better": False, "aggregation": "mean"}
    tasks = [{**task("replies"), "metric_list": [wrong]}, task("choices")]
    scored = {**task("replies"), "task": "local_scored", "output_type": "loglikelihood"}
    tasks.append({**scored, "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}]})
    results = evaluate(tiny_model(), TOKENIZER, {"dense": DENSE}, tasks, limit=2)
    assert {one.task: one.lower_is_better for one in results} == {
        "local_replies": ("exact_match",),
        "local_choices": (),
        "local_scored": (),
    }
    assert all(value < 0 for one in results[-1].items for name, value in one.metrics.items() if name == "perplexity")


def test_what_has_more_of_a_bad_thing_is_inferior():
    def result(cell: str, errors: float) -> HarnessResult:
        items = tuple(HarnessItem(index, "", (), (), {"errors": errors, "acc": errors}) for index in range(40))
        return HarnessResult(cell, "made", {}, {}, items, 1.0, 0.0, lower_is_better=("errors",))

    found = family([result("dense", 0.0), result("more", 1.0)])
    assert [(one.task, one.decision) for one in found] == [("made errors", "inferior"), ("made acc", "non-inferior")]


def test_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr(harness_cli, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["lm-eval", "--help"])
    assert (result.exit_code, "lazyllm-torch[lm-eval]" in result.stderr) == (2, True)


def test_a_wrong_argument_is_one_line(only_ruler):
    arguments = ["--model", "lazyllm", "--model_args", "pretrained=x,preset=peper", "--tasks", "niah_single_1"]
    result = CliRunner().invoke(app, ["lm-eval", *arguments])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("lazyllm: unknown preset 'peper'")


def test_lazyllm_does_without_lm_eval_and_the_module_says_what_to_install():
    code = (
        "import sys, lazyllm, lazyllm.cli.main\n"
        "assert 'lm_eval' not in sys.modules\n"
        "sys.modules['lm_eval'] = None\n"
        "import lazyllm.evaluation.harness\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("ImportError: lazyllm.evaluation.harness needs lm-eval")
    assert done.stderr.rstrip().endswith('pip install "lazyllm-torch[lm-eval]"')


@pytest.mark.slow
def test_a_real_model_answers_as_under_lm_evals_own_and_prunes_with_the_recommended_preset():
    with quiet_loading():
        model, tokenizer = load_model(packaged_model(), dtype=torch.float32)
    needle = "The special magic number for the old lighthouse is 4815162."
    text = f"{packaged_speech('1963-Kennedy-1')[:2000]} {needle} {packaged_speech('1963-Kennedy-1')[2000:2900]}"
    context = f"{text}\n\nWhat is the special magic number for the old lighthouse? The number is"
    choices = scoring((context, " 4815162"), (context, " 1234567"))
    asked = generating(context, max_gen_toks=8)
    other = HFLM(pretrained=model, tokenizer=tokenizer)
    dense, lazy = (
        LazyLM(LazyPipeline.from_preset(name, model, tokenizer), batch_size=2) for name in ("dense", "recommended")
    )
    ((score, _),), ((expected, _),) = dense.loglikelihood(choices[:1]), other.loglikelihood(choices[:1])
    assert score == pytest.approx(expected, abs=1e-5)
    assert dense.generate_until(asked) == other.generate_until(asked)
    (right, _), (wrong, _) = lazy.loglikelihood(choices)
    assert right > wrong
    assert "4815162" in lazy.generate_until(asked)[0]
    assert lazy.share.fraction < 0.7
