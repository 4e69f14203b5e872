"""llama.cpp's server with context shift, as the wheel ``xllamacpp`` brings it, in this process.

    python -m benchmarks.peers.llama_server MODEL.gguf --capacity 256 --slots 8 --port 8100

Every slot is a stream of at most ``--capacity`` tokens. When a slot is full, llama.cpp discards
tokens behind the first ``n_keep`` and shifts the rest (`--context-shift`): half of them, or what
the request's ``n_discard`` says. It prints a line when it answers, and runs until it is ended.
"""

import argparse
import signal

import xllamacpp

CACHE_TYPES = {"f32": 0, "f16": 1}  # ggml's numbers
FLASH = {"auto": -1, "off": 0, "on": 1}


def parameters(options: argparse.Namespace) -> xllamacpp.CommonParams:
    """llama.cpp's own, each slot with a cache of its own."""
    made = xllamacpp.CommonParams()
    made.model.path = options.model
    made.hostnames = ["127.0.0.1"]
    made.port = options.port
    made.n_parallel = options.slots
    made.n_ctx = options.slots * options.capacity
    made.kv_unified = False
    made.ctx_shift = True
    made.cache_type_k = made.cache_type_v = CACHE_TYPES[options.cache_type]
    made.flash_attn_type = FLASH[options.flash_attention]
    made.cpuparams.n_threads = options.threads
    made.cpuparams_batch.n_threads = options.threads
    # What is for chats alone: it would keep prompts of streams that have ended.
    made.cache_ram_mib = 0
    made.n_ctx_checkpoints = 0
    made.warmup = True
    made.fit_params = False
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="GGUF file")
    parser.add_argument("--capacity", type=int, required=True, help="tokens of a slot")
    parser.add_argument("--slots", type=int, required=True, help="streams at once")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--cache-type", choices=CACHE_TYPES, default="f16")
    parser.add_argument("--flash-attention", choices=FLASH, default="auto")
    parser.add_argument("--threads", type=int, default=2)
    server = xllamacpp.Server(parameters(parser.parse_args()))
    print(f"answers at {server.listening_address}", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
