"""What another release of vLLM changes of all that sink_vllm stands on. Starts no engine.

    make drift VLLM=0.33.0
    python -m patches.drift VLLM [--base VLLM] [--summary]

VLLM is a version, which pip fetches, or the path of a wheel, an sdist or an unpacked wheel. The
release in this environment, or --base, is what the project is taken to be made for. vLLM is read,
never imported.

Exit code: 0 nothing changed, or all changes have been read (patches/drift/accepted.toml);
1 changed; 2 something is gone; 3 there is nothing to compare. (`make` turns all but 0 into 2.)
"""

import argparse
import sys
from typing import NoReturn

from patches.drift import show
from patches.drift.accepted import read_accepted
from patches.drift.collect import our_files, seams_of
from patches.drift.compare import Row, State, table
from patches.drift.fetch import FetchError, installed, release
from patches.drift.tree import Tree

NOTHING_TO_COMPARE = 3


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Python's own exit code for this would be that of something gone."""
        self.exit(NOTHING_TO_COMPARE, f"drift: {message}\n")


def exit_code(rows: list[Row]) -> int:
    """By the worst row."""
    worst = max((row.state for row in rows), default=State.UNCHANGED)
    return 2 if worst is State.GONE else int(worst > State.ACCEPTED)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    lines = (__doc__ or "").splitlines()
    parser = _Parser(prog="python -m patches.drift", description=lines[0])
    parser.add_argument("vllm", metavar="VLLM", help="version, wheel, sdist, or unpacked wheel")
    parser.add_argument("--base", metavar="VLLM", help="compare with this one (default: installed)")
    parser.add_argument("--summary", action="store_true", help="counts only")
    options = parser.parse_args(arguments)
    try:
        base_name, base = release(options.base) if options.base else installed()
        name, other = release(options.vllm)
        accepted = read_accepted()
    except (FetchError, ValueError) as error:
        print(f"drift: {error}", file=sys.stderr)
        return NOTHING_TO_COMPARE
    ours = our_files()
    seams = seams_of(ours, base)
    rows = table(seams, Tree(base), Tree(other), accepted)
    print(f"vLLM {name} against {base_name}: {len(rows)} seams")
    for line in show.summary(rows) if options.summary else show.whole(rows):
        print(line)
    return exit_code(rows)


if __name__ == "__main__":
    sys.exit(main())
