"""Many prompts: in order, whatever the batch; kept in a file; once each, also when killed in between."""

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from lazyllm import AuxCache, InputError, LazyPipeline, Protect, Stages, WindowAttention
from lazyllm.cli.main import app
from lazyllm.mapping import Reply
from lazyllm.mapping.replies import look_into
from lazyllm.mapping.run import Task, packed
from lazyllm.models.names import CACHE_NAMES
from lazyllm.prompts import EncodedPrompt
from tests.histories import CACHES, policies
from tests.tiny import VOCABULARY, random_ids, tiny_model, word_tokenizer

GREEDY = {"do_sample": False, "eos_token_id": -1, "max_new_tokens": 4}
PRUNING = {"scorer": WindowAttention(window=4), "schedule": Stages({1: 0.6, 3: 0.3}), "cache": AuxCache()}
LENGTHS = [9, 30, 4, 12, 30, 17, 3]
PROMPTS = [random_ids(1, length, seed)[0].tolist() for seed, length in enumerate(LENGTHS)]


@pytest.fixture
def pipe() -> LazyPipeline:
    """On a model of its own: what other tests leave in a generation config would make other replies of its replies."""
    return LazyPipeline(tiny_model.__wrapped__(), **PRUNING)


@pytest.fixture
def batches(monkeypatch) -> list[list[int]]:
    """The lengths of the prompts of every batch that runs."""
    seen: list[list[int]] = []
    reply = LazyPipeline.reply

    def noted(self, prompts, options, **more):
        seen.append([len(prompt.token_ids) for prompt in prompts])
        return reply(self, prompts, options, **more)

    monkeypatch.setattr(LazyPipeline, "reply", noted)
    return seen


def told(replies) -> list[tuple]:
    """What a reply says, whatever its place."""
    return [(reply.index, reply.text, reply.token_ids, reply.prompt_tokens) for reply in replies]


# -- batches -----------------------------------------------------------------------------------------


@given(policies(), CACHES, st.integers(1, 200), st.lists(st.integers(1, 24), min_size=1, max_size=6))
def test_with_greedy_decoding_the_batch_does_not_matter(chosen, cache, batch_tokens, lengths):
    pipe = LazyPipeline(tiny_model(), cache=cache, **chosen)
    prompts = [random_ids(1, length, seed)[0].tolist() for seed, length in enumerate(lengths)]
    replies = list(pipe.map(prompts, batch_tokens=batch_tokens, **GREEDY))
    assert [reply.index for reply in replies] == list(range(len(prompts)))
    for prompt, reply in zip(prompts, replies, strict=True):
        alone = pipe.generate(prompt, **GREEDY)
        assert list(reply.token_ids) == alone.token_ids
        assert reply.computed_fraction == alone.stats.computed_fraction


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 100))
def test_batches_hold_every_prompt_once_and_no_more_tokens_than_they_may(lengths, batch_tokens):
    tasks = [Task(index, "", EncodedPrompt([0] * length, None)) for index, length in enumerate(lengths)]
    batches = packed(tasks, batch_tokens)
    assert sorted(task.index for batch in batches for task in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(t.tokens for t in batch) <= batch_tokens for batch in batches)
    firsts = [min(task.index for task in batch) for batch in batches]
    assert firsts == sorted(firsts)


def test_prompts_of_like_length_share_a_batch(pipe, batches):
    list(pipe.map(PROMPTS, batch_tokens=60, **GREEDY))
    assert batches == [[3, 4, 9, 12], [30, 30], [17]] or batches == [[3, 4, 9, 12], [17, 30], [30]]
    assert sum(map(len, batches)) == len(PROMPTS)


def test_beams_count_as_rows_and_candidates_run_alone(pipe, batches):
    list(pipe.map(PROMPTS, batch_tokens=60, num_beams=3, **GREEDY))
    assert all(len(batch) * max(batch) * 3 <= 60 or len(batch) == 1 for batch in batches)
    batches.clear()
    list(pipe.map(PROMPTS, prompt_lookup_num_tokens=3, **GREEDY))
    assert batches == [[length] for length in LENGTHS]


def test_prompts_are_read_as_they_are_needed(pipe, batches):
    def endless():
        for number in range(10**9):
            read.append(number)
            yield PROMPTS[number % len(PROMPTS)]

    read: list[int] = []
    replies = pipe.map(endless(), batch_tokens=60, **GREEDY)
    assert not read
    assert len(list(islice(replies, 3))) == 3
    assert len(read) < 100


def test_the_first_reply_comes_before_the_last_batch(pipe, batches):
    replies = pipe.map([PROMPTS[2], *PROMPTS], batch_tokens=30, **GREEDY)
    next(replies)
    assert len(batches) == 1


def test_every_prompt_may_have_its_own_query(tmp_path):
    words = [f"w{number}" for number in range(VOCABULARY - 6)]
    pipe = LazyPipeline(tiny_model(), word_tokenizer(words), **PRUNING)
    prompts = [" ".join(words[:20]), " ".join(words[20:50])]
    queries = ["w3 w4", None]
    replies = pipe.map(prompts, query=queries, **GREEDY)
    for reply, prompt, query in zip(replies, prompts, queries, strict=True):
        assert reply.text == pipe.generate(prompt, query=query, **GREEDY).text
    with pytest.raises(InputError, match="more prompts than the 1 queries"):
        list(pipe.map(prompts, query=["w3"], **GREEDY))


# -- prompts that cannot be answered -----------------------------------------------------------------


@pytest.mark.parametrize("bad", [[], [5] * 257], ids=["empty", "too long"])
def test_a_prompt_that_cannot_be_answered_ends_nothing(pipe, bad, tmp_path):
    prompts = [*PROMPTS[:2], bad, *PROMPTS[2:]]
    out = tmp_path / "replies.jsonl"
    replies = list(pipe.map(prompts, errors="return", batch_tokens=3000, out=out, **GREEDY))
    (failed,) = [reply for reply in replies if reply.error is not None]
    assert failed.index == 2
    assert "empty" in failed.error or "positions for 256" in failed.error
    good = [reply for reply in replies if reply.error is None]
    expected = [reply.token_ids for reply in pipe.map(PROMPTS, **GREEDY)]
    assert [reply.token_ids for reply in good] == expected
    assert set(look_into(out).replies) == {reply.id for reply in good}, "it is tried again the next time"


def test_or_it_is_raised_when_its_turn_comes(pipe):
    replies = pipe.map([*PROMPTS[:2], [5] * 257, *PROMPTS[2:]], **GREEDY)
    assert [next(replies).index, next(replies).index] == [0, 1]
    with pytest.raises(InputError, match="257 tokens, the model has positions for 256"):
        next(replies)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"errors": "ignore"}, "unknown value of errors 'ignore'"),
        ({"batch_tokens": 0}, "at least 1, got 0"),
        ({"num_return_sequences": 2, "do_sample": True}, "one reply to each prompt"),
        *[({name: 3}, "a cache of its own") for name in CACHE_NAMES],
        ({"streamer": 3}, "side by side"),
        ({"use_cache": False}, "use_cache=False"),
    ],
    ids=str,
)
def test_what_can_be_seen_at_once_is_refused_at_once(pipe, options, reason):
    with pytest.raises(InputError, match=reason):
        pipe.map(PROMPTS, **options)


def test_one_text_is_no_list_of_prompts(pipe):
    with pytest.raises(InputError, match="many prompts, got one text: 'hello'"):
        pipe.map("hello")


def test_progress_is_shown_when_asked_for(pipe, capsys):
    list(pipe.map(PROMPTS, **GREEDY))
    assert capsys.readouterr() == ("", "")
    list(pipe.map(PROMPTS, progress=True, **GREEDY))
    out, err = capsys.readouterr()
    assert out == ""
    assert "7/7" in err


# -- the file ----------------------------------------------------------------------------------------


def test_what_stands_in_the_file_is_not_computed_again(pipe, batches, tmp_path):
    out = tmp_path / "replies.jsonl"
    first = list(pipe.map(PROMPTS[:4], out=out, **GREEDY))
    batches.clear()
    second = list(pipe.map(reversed(PROMPTS), out=out, **GREEDY))
    assert sorted(length for batch in batches for length in batch) == sorted(LENGTHS[4:])
    assert told(second) == told(LazyPipeline(tiny_model(), **PRUNING).map(reversed(PROMPTS), **GREEDY))
    assert {reply.id for reply in first} < {reply.id for reply in second}
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["id"] for line in lines} == {reply.id for reply in second}
    assert len(lines) == len(PROMPTS)


def test_a_prompt_that_comes_twice_is_answered_twice(pipe, tmp_path):
    out = tmp_path / "replies.jsonl"
    replies = list(pipe.map([PROMPTS[0]] * 3, out=out, **{**GREEDY, "do_sample": True}))
    assert len({reply.id for reply in replies}) == 3
    assert told(pipe.map([PROMPTS[0]] * 3, out=out, **{**GREEDY, "do_sample": True})) == told(replies)


@pytest.mark.parametrize(
    "change",
    [
        {"options": {"max_new_tokens": 3}},
        {"options": {"repetition_penalty": 1.5}},
        {"options": {"generation_config": GenerationConfig(max_new_tokens=3)}},
        {"policies": {"schedule": Stages({1: 0.5})}},
        {"policies": {"protect": Protect(recent=3)}},
        {"model": {"seed": 1}},
        {"model": {"family": "qwen3"}},
        {"query": 3},
    ],
    ids=str,
)
def test_whatever_a_reply_depends_on_is_computed_anew(pipe, batches, tmp_path, change):
    out = tmp_path / "replies.jsonl"
    list(pipe.map(PROMPTS[:2], out=out, **GREEDY))
    batches.clear()
    other = LazyPipeline(tiny_model(**change.get("model", {})), **{**PRUNING, **change.get("policies", {})})
    list(other.map(PROMPTS[:2], out=out, query=change.get("query"), **{**GREEDY, **change.get("options", {})}))
    assert sum(map(len, batches)) == 2
    assert len(look_into(out).replies) == 4


def test_a_last_line_that_was_cut_off_is_taken_away(pipe, batches, tmp_path):
    out = tmp_path / "replies.jsonl"
    whole = list(pipe.map(PROMPTS, out=out, batch_tokens=1, **GREEDY))
    content = out.read_bytes()
    out.write_bytes(content[:-20])
    batches.clear()
    with pytest.warns(UserWarning, match="the last line was cut off"):
        assert list(pipe.map(PROMPTS, out=out, **GREEDY)) == whole
    assert batches == [[LENGTHS[-1]]]
    assert out.read_bytes() == content


def test_a_line_that_was_changed_is_not_believed(pipe, batches, tmp_path):
    out = tmp_path / "replies.jsonl"
    whole = list(pipe.map(PROMPTS, out=out, batch_tokens=1, **GREEDY))
    lines = out.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"index": 1', b'"index": 5')
    out.write_bytes(b"".join(lines))
    batches.clear()
    with pytest.warns(UserWarning, match="line 2 is damaged"):
        assert list(pipe.map(PROMPTS, out=out, **GREEDY)) == whole
    assert batches == [[LENGTHS[1]]]


@pytest.mark.parametrize("content", ["{}\n", "some text", '[{"id": 3}]\n'])
def test_a_file_of_something_else_stays_as_it_is(pipe, tmp_path, content):
    out = tmp_path / "mine.jsonl"
    out.write_text(content)
    with pytest.raises(InputError, match="no file of replies"):
        list(pipe.map(PROMPTS, out=out, **GREEDY))
    assert out.read_text() == content


def test_a_file_that_another_one_writes_to_is_refused(pipe, tmp_path):
    out = tmp_path / "replies.jsonl"
    first = pipe.map(PROMPTS, out=out, batch_tokens=1, **GREEDY)
    next(first)
    with pytest.raises(InputError, match="another process writes"):
        next(pipe.map(PROMPTS, out=out, **GREEDY))
    first.close()
    assert len(list(pipe.map(PROMPTS, out=out, **GREEDY))) == len(PROMPTS)


def test_a_file_that_cannot_be_made_is_refused(pipe, tmp_path):
    with pytest.raises(InputError, match="cannot write"):
        next(pipe.map(PROMPTS, out=tmp_path / "nowhere" / "replies.jsonl", **GREEDY))


def test_with_a_file_options_are_plain_values(pipe, tmp_path):
    with pytest.raises(InputError, match="prefix_allowed_tokens_fn is a function"):
        pipe.map(PROMPTS, out=tmp_path / "replies.jsonl", prefix_allowed_tokens_fn=lambda row, ids: [5])


@given(st.builds(Reply, id=st.text(), index=st.integers(0), text=st.text(), error=st.none() | st.text()))
def test_a_reply_is_read_back_as_it_was(reply):
    assert Reply.read(reply.line()) == reply


# -- kills -------------------------------------------------------------------------------------------


def test_a_map_that_is_killed_goes_on_where_it_was(pipe, batches, tmp_path):
    """Killed in the middle of its third line, then, before a byte of it, at the third one from there."""
    expected = list(pipe.map(PROMPTS, out=tmp_path / "whole.jsonl", batch_tokens=1, **GREEDY))
    out = tmp_path / "replies.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed_map", str(out)],
        cwd=Path(__file__).parents[1], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    batches.clear()
    assert list(pipe.map(PROMPTS, out=out, batch_tokens=1, **GREEDY)) == expected
    assert batches == [[length] for length in LENGTHS[4:]]
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


# -- the command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=66, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    word_tokenizer(f"w{number}" for number in range(60)).save_pretrained(path)
    return path


def test_the_command_answers_a_file_and_goes_on_from_it(folder, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "replies.jsonl"
    entries = [{"prompt": "w1 w2 w3 w4 w5 w6", "query": "w2 w3"}, {"prompt": "w9 " * 80}, {"prompt": "w7 w8"}]
    prompts.write_text("\n".join(map(json.dumps, entries)))
    command = ["map", "--model", folder, "--prompts", prompts, "--out", out, "--max-new-tokens", 3, "--preset", "paper"]
    result = CliRunner().invoke(app, [*map(str, command)])
    assert result.exit_code == 1
    assert "line 2: the prompt has 80 tokens" in result.stderr
    assert "2 of 3 prompts answered" in result.stderr
    replies = [Reply.read(line) for line in out.read_bytes().splitlines()]
    pipe = LazyPipeline.from_pretrained(folder, preset="paper")
    good = {reply.index: reply.text for reply in replies if reply.error is None}
    assert good == {
        0: pipe.generate(entries[0]["prompt"], query="w2 w3", max_new_tokens=3, do_sample=False).text,
        2: pipe.generate(entries[2]["prompt"], max_new_tokens=3, do_sample=False).text,
    }
    out.write_bytes(out.read_bytes() + b'{"id": "half')
    again = CliRunner().invoke(app, [*map(str, command), "--strict"])
    assert again.exit_code == 2
    assert "positions for 64" in again.stderr
