"""Processes that believe to run beside another release of vLLM."""

import os
import sys
from pathlib import Path

from tests.support.paths import ROOT

_SITECUSTOMIZE = '''\
"""Stands in for the file that vLLM's build writes its version into."""
import sys, types
version = types.ModuleType("vllm._version")
version.__version__ = "{version}"
version.__version_tuple__ = tuple(map(int, "{version}".split(".")))
sys.modules["vllm._version"] = version
'''


def environment_of(version: str, folder: Path) -> dict[str, str]:
    """Variables under which ``vllm.__version__`` is ``version``, in child processes too.

    Args:
        version: three numbers.
        folder: an empty one, which must outlive the processes.
    """
    folder.joinpath("sitecustomize.py").write_text(_SITECUSTOMIZE.format(version=version))
    inherited = os.environ.get("PYTHONPATH")
    root = str(ROOT)
    paths = [str(folder), root, *([inherited] if inherited else [])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


VLLM = str(Path(sys.executable).with_name("vllm"))
