"""``python -m sink_vllm``: the command ``sink-vllm``."""

import sys

from sink_vllm.tools.main import main

if __name__ == "__main__":
    sys.exit(main())
