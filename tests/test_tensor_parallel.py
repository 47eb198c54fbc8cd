"""Tensor parallelism: two processes that share a model keep the tokens that one process keeps, and say what it says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.shared_model import CASES, FAMILIES, reply, run
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """By process, what it did."""
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        tiny_model(family).save_pretrained(folder / family)
    one_key_head = AutoConfig.for_model(**{**tiny_model().config.to_dict(), "num_key_value_heads": 1})
    AutoModelForCausalLM.from_config(one_key_head).save_pretrained(folder / "one key head")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.shared_model", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"answers-{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_both_processes_keep_the_tokens_that_one_keeps(answers, case: str):
    family, policies = CASES[case]
    alone = run(tiny_model(family), policies)
    for shared in answers:
        assert shared[case]["kept"] == alone["kept"]
        torch.testing.assert_close(shared[case]["logits"], alone["logits"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_something_is_pruned_or_evicted_in_every_case(answers, case: str):
    last = [len(visible) for visible, _ in answers[0][case]["kept"][0][-1]]
    assert max(last) < 24, "of a prompt of 24 tokens"


def test_each_process_holds_its_share_of_keys_and_values(answers):
    alone = run(tiny_model("llama"), CASES["last token"][1])["kv_bytes"]
    assert [shared["last token"]["kv_bytes"] for shared in answers] == [alone / 2] * 2


def test_both_processes_give_the_reply_of_one(answers):
    assert answers[0]["reply"] == answers[1]["reply"] == reply(tiny_model("llama"))


def test_a_process_takes_up_its_own_part_of_a_saved_cache(answers):
    for shared in answers:
        own, other = shared["files"]
        assert own
        assert "CacheError" in other
        assert "fingerprint" in other


def test_a_model_that_stays_as_it_is_is_not_checked_again(answers):
    assert all(shared["contract is kept"] for shared in answers)


def test_heads_that_do_not_divide_are_refused(answers):
    for shared in answers:
        assert "UnsupportedModelError" in shared["too few heads"]
        assert "layer 0" in shared["too few heads"]


def test_a_model_that_was_spread_otherwise_is_refused(answers):
    for shared in answers:
        assert "UnsupportedModelError" in shared["by hand"]
        assert "DistributedConfig(tp_size=...)" in shared["by hand"]
