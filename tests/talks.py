"""Tiny models that talk: every token is a word, so that what was said can be said again."""

from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from lazyllm import AuxCache, Conversation, LazyPipeline, Stages, WindowAttention
from tests.tiny import VOCABULARY, tiny_model, word_tokenizer

MARKS = ("?", ".", "end", "tools", "think")
WORDS = [f"w{index}" for index in range(VOCABULARY - 6 - len(MARKS))]
GREEDY = {"do_sample": False, "eos_token_id": -1, "max_new_tokens": 4}
PRUNING = {"scorer": WindowAttention(window=4), "schedule": Stages({1: 0.6, 3: 0.3}), "cache": AuxCache()}
DOCUMENT = " ".join(WORDS[7 * index % 60] for index in range(40))

TURNS = "{% for message in messages %}{{ message.role }} : {{ message.content }} end {% endfor %}assistant :"
FORGETFUL = (
    "{% for message in messages %}{{ message.role }} : "
    "{% if message.role == 'assistant' %}{{ message.content.split('w')[0] }}"
    "{% else %}{{ message.content }}{% endif %} end {% endfor %}assistant :"
)
"""Leaves out earlier replies from their first word on."""
TOOLS_FIRST = "{% if tools %}tools : {% for tool in tools %}{{ tool.name }} . {% endfor %}end {% endif %}" + TURNS
TOOLS_LAST = (
    "{% for message in messages %}{% if loop.last and tools %}tools : "
    "{% for tool in tools %}{{ tool.name }} . {% endfor %}end {% endif %}"
    "{{ message.role }} : {{ message.content }} end {% endfor %}assistant :"
)
REFUSES = "{{ raise_exception('only short chats') if messages | length > 2 }}" + TURNS


def tokenizer(template: str | None = TURNS) -> PreTrainedTokenizerFast:
    """One word for every token of a tiny model, whose own `<pad>` and `<unk>` are not part of a text."""
    made = word_tokenizer([*MARKS, *WORDS])
    made.chat_template = template
    return made


def pipeline(template: str | None = TURNS, **policies: Any) -> LazyPipeline:
    """A pipeline that prunes, unless other policies are given."""
    return LazyPipeline(tiny_model(), tokenizer(template), **(policies or PRUNING))


def depths(chat: Conversation) -> torch.Tensor:
    """How deep each token of a conversation's cache is."""
    cache = chat.cache
    return cache.rows[0].ledger.depth.clone() if cache.rows else torch.empty(0, dtype=torch.long)
