"""How near a pruned model stays to the dense one along the dense one's own replies, and what that saves."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lazyllm.config import LazyConfig
from lazyllm.errors import InputError
from lazyllm.evaluation.fidelity import divergence
from lazyllm.evaluation.quality import Contender, forced_logits, greedy_reply
from lazyllm.files.prompts import NamedPrompt
from lazyllm.generation.result import StepRecorder, step_flops
from lazyllm.models.families import contract_of
from lazyllm.models.fingerprint import fingerprint
from lazyllm.models.flops import flop_model
from lazyllm.pipeline import LazyPipeline
from lazyllm.policies.schedules.tuned import Measured


@dataclass(frozen=True)
class Reference:
    """What the dense model replies to a prompt: tokens [n], greedily, and the logits [n, vocabulary] before each."""

    prompt: NamedPrompt
    tokens: list[int]
    logits: Tensor


class Fidelity:
    """Compares configurations with a dense model.

    Args:
        model, tokenizer: the model.
        folder: where the dense model's replies are kept, so that they are computed once.
        new_tokens: how many tokens of each reply are compared.

    Raises:
        UnsupportedModelError: when the model does not follow the layer contract.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, new_tokens: int
    ) -> None:
        self.model, self.tokenizer, self.folder, self.new_tokens = model, tokenizer, folder, new_tokens
        self.dense = LazyPipeline.from_preset("dense", model, tokenizer)
        self.contract = contract_of(model)
        self.costs = flop_model(model, self.contract)
        self.fingerprint = fingerprint(model)

    def token_ids(self, prompt: NamedPrompt) -> list[int]:
        """Of a prompt.

        Raises:
            InputError: when it and the reply do not fit the model's positions.
        """
        token_ids = self.dense.encode(prompt.prompt).token_ids
        longest = self.contract.max_positions
        if longest is not None and len(token_ids) + self.new_tokens > longest:
            raise InputError(
                f"the prompt {prompt.name!r} has {len(token_ids)} tokens, with a reply of {self.new_tokens} more than "
                f"the {longest} positions of the model"
            )
        return token_ids

    def reference(self, prompt: NamedPrompt) -> Reference:
        """The dense model's reply, from the folder if it is there."""
        key = f"{self.fingerprint} {self.new_tokens} {self.token_ids(prompt)}"
        path = self.folder / f"{blake2b(key.encode(), digest_size=16).hexdigest()}.safetensors"
        stored = _stored(path)
        if stored is None:
            contender = Contender(self.dense, "dense", is_stock=True)
            tokens, logits = greedy_reply(contender, prompt.prompt, self.new_tokens)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).cpu()
            if not bool(logits.isfinite().all()):
                raise InputError(f"the dense model's logits for the prompt {prompt.name!r} are not all finite")
            stored = {"tokens": torch.tensor(tokens), "logits": logits.contiguous()}
            _store(stored, path)
        return Reference(prompt, stored["tokens"].tolist(), stored["logits"])

    def measure(self, config: LazyConfig, references: Sequence[Reference]) -> Measured:
        """The mean divergence over the prompts, and the speedup of their prefills together."""
        recorder = StepRecorder(self.contract.windows)
        pipe = LazyPipeline.from_config(config, self.model, self.tokenizer, callbacks=[recorder])
        contender = Contender(pipe, "pruned")
        divergences = [
            divergence(reference.logits, forced_logits(contender, reference.prompt.prompt, reference.tokens))
            for reference in references
        ]
        prefill = [row for step in recorder.steps for row in step if row.is_prefill]
        done, dense = step_flops(prefill, self.costs, self.contract.windows)
        return Measured(prompts=len(divergences), divergence=sum(divergences) / len(divergences), speedup=dense / done)


def _stored(path: Path) -> dict[str, Tensor] | None:
    """What a file holds; None when there is none, or it was cut off."""
    try:
        return load_file(path)
    except (FileNotFoundError, SafetensorError):
        return None


def _store(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(tensors, part)
    os.replace(part, path)
