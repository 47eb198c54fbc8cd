"""llama.cpp as a worker: python llama_cpp_worker.py MODEL.gguf CONTEXT_TOKENS THREADS.

Prompts are given to the server inside the process as token ids, without its prompt cache.
"""

from __future__ import annotations

import re
import sys
import time
from typing import Any

import xllamacpp
from protocol import Reply, serve


def load() -> tuple[Reply, dict[str, Any]]:
    path, context_tokens, threads = sys.argv[1:]
    options = xllamacpp.CommonParams()
    options.model.path = path
    options.n_ctx = int(context_tokens)
    options.n_parallel = 1
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = int(threads)
    options.cache_prompt = False
    options.cache_ram_mib = 0
    server = xllamacpp.Server(options)

    def reply(request: dict[str, Any]) -> dict[str, Any]:
        return answer(server, request["token_ids"], request["new_tokens"])

    built_with = re.findall(r"(\w+) = 1", xllamacpp.get_system_info())
    return reply, {"xllamacpp": xllamacpp.__version__, "built with": " ".join(built_with)}


def answer(server: Any, token_ids: list[int], new_tokens: int) -> dict[str, Any]:
    """Times one reply: to the first piece that arrives, and by the server's own clock from there on."""
    pieces: list[tuple[float, dict[str, Any]]] = []
    options = {
        "prompt": token_ids,
        "n_predict": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
        "stream": True,
        "n_probs": 1,
        "post_sampling_probs": True,
    }
    started = time.perf_counter()
    failed = server.handle_completions(options, lambda piece: pieces.append((time.perf_counter(), piece)))
    if not pieces or "timings" not in pieces[-1][1]:
        raise RuntimeError(f"no reply: {pieces[-1][1] if pieces else failed}")
    timings, steps = pieces[-1][1]["timings"], new_tokens - 1
    counts = timings["cache_n"], timings["prompt_n"], timings["predicted_n"]
    if counts != (0, len(token_ids), new_tokens):
        raise RuntimeError(
            f"(cached, prompt, reply) tokens were {counts}, not {(0, len(token_ids), new_tokens)}; "
            "every round is to compute the whole prompt"
        )
    return {
        "ttft_seconds": pieces[0][0] - started,
        "step_seconds": [timings["predicted_ms"] / 1000 / steps] * steps if steps else [],
        "token_ids": [token["id"] for _, piece in pieces for token in logprobs(piece)],
        "kept_tokens": len(token_ids),
    }


def logprobs(piece: dict[str, Any]) -> list[dict[str, Any]]:
    found = piece["choices"][0]["logprobs"]
    return found["content"] if found else []


if __name__ == "__main__":
    serve(load)
