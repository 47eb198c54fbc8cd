"""Tiny random float64 models of every family in the test matrix: a forward takes a millisecond or two."""

from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

LAYERS = 4
VOCABULARY = 96
WINDOW = 9

_BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"num_experts_per_tok": 2, "experts_implementation": "eager"}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "gemma": {},
    "gemma2": {"sliding_window": WINDOW, "attn_logit_softcapping": 20.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": WINDOW, "query_pre_attn_scalar": 8, "sliding_window_pattern": 2},
    "olmo2": {},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    "cohere": {},
    "smollm3": {},
    "mixtral": {"num_local_experts": 4, **_MOE},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "decoder_sparse_step": 1, **_MOE},
}
EAGER_ONLY = ("gemma2",)
"""Families whose logit cap the sdpa kernel refuses."""

FAMILY_KERNELS = [
    (family, kernel)
    for family in FAMILIES
    for kernel in ("sdpa", "eager")
    if kernel == "eager" or family not in EAGER_ONLY
]


MADE: list[PreTrainedModel] = []
"""Every model made so far, for the check that tests leave them as they were."""


@cache
def tiny_model(family: str = "llama", kernel: str = "sdpa", layers: int = LAYERS, seed: int = 0) -> PreTrainedModel:
    """A random model in evaluation mode; shared between tests, which must leave it as they found it."""
    options = {**_BASE, **FAMILIES[family], "num_hidden_layers": layers}
    experts = options.pop("experts_implementation", None)
    config = AutoConfig.for_model(family, **options)
    if experts:
        config._experts_implementation = experts
    config._attn_implementation = kernel
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation=kernel)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25) if parameter.ndim > 1 else None
    model.requires_grad_(False)
    MADE.append(model)
    return model.eval()


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids [b, t] without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


TEMPLATE = "{% for message in messages %}{{ message.role }} : {{ message.content }} {% endfor %}assistant :"


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token per word, with a chat template; an unknown word is `<unk>`."""
    known = dict.fromkeys(["<pad>", "<unk>", "system", "user", "assistant", ":", *words])
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(known)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", chat_template=TEMPLATE
    )
