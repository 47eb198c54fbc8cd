"""llama.cpp's own server: python llama_cpp_server.py MODEL.gguf PORT SLOTS TOKENS_PER_SLOT THREADS.

It listens to this machine alone, answers SLOTS requests at once, and ends with its process.
"""

from __future__ import annotations

import signal
import sys

import xllamacpp


def main() -> None:
    path, port, slots, tokens, threads = sys.argv[1:]
    options = xllamacpp.CommonParams()
    options.model.path = path
    options.hostnames, options.port = ["127.0.0.1"], int(port)
    options.n_parallel = int(slots)
    options.n_ctx = int(slots) * int(tokens)
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = int(threads)
    server = xllamacpp.Server(options)
    print(f"xllamacpp {xllamacpp.__version__} listens at {server.listening_address}", flush=True)
    signal.sigwait([signal.SIGTERM, signal.SIGINT])


if __name__ == "__main__":
    main()
