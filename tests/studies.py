"""A tiny model and tiny studies for the tests of ablations; everything here can be pickled by name."""

import multiprocessing
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lazyllm import Scorer
from lazyllm.ablation import Study
from lazyllm.ablation.results import Results
from lazyllm.evaluation.tasks import Item, make_items
from tests.tiny import word_tokenizer

WORDS = ("What", "is", "the", "phone", "number", "of", "?", "Answer", "briefly", ".", "name", "city", "main", "text")
TIMES = ("speedup", "decode_speedup")


def tiny() -> tuple[Any, Any]:
    """A random model of two layers, and a tokenizer of a few words."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=4096, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.float64).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25) if parameter.ndim > 1 else None
    return model.requires_grad_(False), word_tokenizer(WORDS)


def load(ref) -> tuple[Any, Any]:
    """The tiny model, whatever it is called; "tiny-2" has other weights."""
    model, tokenizer = tiny()
    if ref.model == "tiny-2":
        model.lm_head.weight.data += 1
    return model, tokenizer


def load_but_in_the_first_worker(ref) -> tuple[Any, Any]:
    """As `load`, but the first worker cannot."""
    if multiprocessing.current_process().name == "lazyllm-worker-1":
        raise OSError("no room here")
    return load(ref)


def load_and_tell(ref) -> tuple[Any, Any]:
    """As `load`; the model's name is a folder, where the process leaves a file with its number."""
    if "default_worker" in sys.argv[0]:  # in an actor, not in the driver
        Path(ref.model, str(os.getpid())).touch()
    return load(ref)


class NotANumber(Scorer):
    """Scores nobody can rank."""

    def score(self, context):
        return torch.full(context.tokens.shape, float("nan"))


def small(**fields: Any) -> Study:
    """Two tasks with two items each on the tiny model, one of them with the unmodified model's reply as reference."""
    given = {"model": "tiny", "dtype": "float64", "tasks": {"records": 2, "summary": 1}, "tokens": 300, **fields}
    config = {"scorer": "SinkRecent", "schedule": "Constant(0.5, start=1)", "protect": {"recent": 4}}
    return Study(**{"config": config, **given})


def short_items(*given: Any, **options: Any) -> list[Item]:
    """As `make_items`, with short replies and references, so that a unit takes some milliseconds."""
    return [replace(item, new_tokens=3, reference=item.reference[:4]) for item in make_items(*given, **options)]


def figures(results: Results) -> list[dict[str, Any]]:
    """The lines without what differs from run to run."""
    lines = [asdict(line) for line in results.lines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]
