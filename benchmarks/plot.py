"""What plots of single runs share: a figure beside the rows, the same file for the same data."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def figure(path: Path, rows: int = 1, **options: Any) -> Iterator[Any]:
    """Panels (one, or an array of ``rows``) to draw on; ``path`` is written at the end.

    Args:
        options: of ``matplotlib.pyplot.subplots``.
    """
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "sink_vllm"  # the same data, the same file
    mpl.rcParams["svg.fonttype"] = "none"  # text, not outlines: a third of the size
    from matplotlib import pyplot as plt

    made, panels = plt.subplots(rows, 1, layout="constrained", **options)
    yield panels
    made.savefig(path, metadata={"Date": None})
    plt.close(made)


def main(doc: str | None, write: Callable[[Path], Path]) -> None:
    """The command line of a module that plots a run."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder below benchmarks/results")
    print(write(parser.parse_args().run), "written")
