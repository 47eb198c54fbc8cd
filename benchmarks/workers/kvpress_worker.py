"""kvpress as a worker: python kvpress_worker.py FOLDER DTYPE THREADS.

A request names a press and the share of the K/V that it leaves out. The prompt is computed in full, its K/V are cut,
and the reply is decoded greedily over the rest as kvpress' own pipeline does. With `"scores": true` the answer is what
the press scored instead: by layer, by K/V head, one number per token; `"options"` are the press's.
"""

from __future__ import annotations

import sys
import time
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import torch
from kvpress import KnormPress, ObservedAttentionPress, SnapKVPress, StreamingLLMPress
from protocol import Reply, serve
from transformers import AutoModelForCausalLM, DynamicCache

PRESSES = {
    "SnapKV": SnapKVPress,
    "KNorm": KnormPress,
    "StreamingLLM": StreamingLLMPress,
    "ObservedAttention": ObservedAttentionPress,
}


def load() -> tuple[Reply, dict[str, Any]]:
    folder, dtype, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()

    def reply(request: dict[str, Any]) -> dict[str, Any]:
        press = PRESSES[request["press"]](compression_ratio=request["compression_ratio"], **request.get("options", {}))
        if request.get("scores"):
            return {"scores": scores(model, press, request["token_ids"])}
        return answer(model, press, request["token_ids"], request["new_tokens"])

    return reply, {name: version(name) for name in ("kvpress", "transformers", "torch")}


@torch.inference_mode()
def answer(model: Any, press: Any, token_ids: list[int], new_tokens: int) -> dict[str, Any]:
    """Times one reply with a new cache."""
    started = time.perf_counter()
    cache = DynamicCache()
    with press(model):
        logits = model(torch.tensor([token_ids]), past_key_values=cache, logits_to_keep=1).logits
    reply = [int(logits[0, -1].argmax())]
    times = [time.perf_counter()]
    while len(reply) < new_tokens:
        position = torch.tensor([[len(token_ids) + len(reply) - 1]])
        logits = model(torch.tensor([[reply[-1]]]), past_key_values=cache, position_ids=position).logits
        reply.append(int(logits[0, -1].argmax()))
        times.append(time.perf_counter())
    return {
        "ttft_seconds": times[0] - started,
        "step_seconds": [after - before for before, after in pairwise(times)],
        "token_ids": reply,
        "kept_tokens": cache.get_seq_length() - (new_tokens - 1),
    }


@torch.inference_mode()
def scores(model: Any, press: Any, token_ids: list[int]) -> list[list[list[float]]]:
    """By layer, by K/V head, what the press scored each token of a prompt."""
    noted = []
    score = press.score

    def note(*arguments: Any, **options: Any) -> torch.Tensor:
        found = score(*arguments, **options)
        noted.append(found[0].tolist())
        return found

    press.score = note
    # Attention that is read has to be written down, which eager attention alone does.
    model.set_attn_implementation("eager" if isinstance(press, ObservedAttentionPress) else "sdpa")
    with press(model):
        model(
            torch.tensor([token_ids]),
            past_key_values=DynamicCache(),
            logits_to_keep=1,
            output_attentions=isinstance(press, ObservedAttentionPress),
        )
    model.set_attn_implementation("sdpa")
    return noted


if __name__ == "__main__":
    serve(load)
