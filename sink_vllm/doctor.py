"""``python -m sink_vllm.doctor``: the command ``sink-vllm doctor``."""

import sys

from sink_vllm.tools.main import main

if __name__ == "__main__":
    sys.exit(main(["doctor", *sys.argv[1:]]))
