"""What SECURITY.md promises about files and code."""

import ast
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lazyllm.config import LazyConfig
from lazyllm.errors import ConfigError, LazyLLMError
from lazyllm.models.loading import load_model
from tests.environments import ROOT

FORBIDDEN = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.save", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load", "np.load",
}  # fmt: skip
"""Calls that run text as code, or read what may be code."""
PICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


class Trap:
    """A pickle that makes a folder when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A tiny model whose weights are nothing but a pickle, and a trap in it."""
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    folder = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Trap(tmp_path / "sprung")}, folder / "pytorch_model.bin")
    return folder


def test_the_trap_is_one(checkpoint: Path):
    torch.load(checkpoint / "pytorch_model.bin", weights_only=False)
    assert (checkpoint.parent / "sprung").exists()


def test_weights_in_a_pickle_are_refused(checkpoint: Path):
    with pytest.raises(OSError, match="safetensors"):
        load_model(checkpoint)
    assert not (checkpoint.parent / "sprung").exists()


def test_weights_in_a_pickle_that_is_asked_for_run_no_code(checkpoint: Path):
    with pytest.raises((OSError, ValueError, RuntimeError, pickle.UnpicklingError)):
        load_model(checkpoint, use_safetensors=False)
    assert not (checkpoint.parent / "sprung").exists()


def test_tags_in_a_configuration_make_no_objects():
    for text in ("scorer: !!python/object/apply:os.getcwd []", "!!python/name:os.system"):
        with pytest.raises(ConfigError):
            LazyConfig.from_text(text)


def test_a_name_in_a_configuration_is_called_only_when_it_is_a_policy(tmp_path):
    for name in ("os:system", "os:getcwd", "pathlib:Path"):
        with pytest.raises(LazyLLMError, match=r"is not a Scorer class"):
            LazyConfig(scorer=name)


def test_no_text_is_run_as_code_and_no_pickle_is_read():
    offenders = [
        f"{path.relative_to(ROOT)}, line {line}: {what}"
        for path in sorted((ROOT / "lazyllm").rglob("*.py"))
        for line, what in _risks(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert offenders == []


def _risks(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN:
                yield node.lineno, name
            yield from ((node.lineno, f"{name}({word.arg}=True)") for word in node.keywords if _is_risky(word))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            yield from ((node.lineno, name) for name in sorted(PICKLERS & names))


def _is_risky(word: ast.keyword) -> bool:
    return word.arg in ("shell", "trust_remote_code", "allow_pickle") and ast.unparse(word.value) == "True"
