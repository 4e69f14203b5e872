"""Settings every test shares; they must be in the environment before torch and vLLM load."""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Tiny models gain nothing from threads, and spinning ones starve their neighbours.
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",  # which sets OpenMP's, when n-grams are looked up
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # Tables of four capacities, for many re-anchorings in short streams.
    "SINK_VLLM_ROPE_ROWS": "0",
}
for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)
_support = Path(__file__).parent / "support"
# For processes that are started: servers, workers, and vLLM's own look at a model class.
_paths = [str(_support / "startup"), os.environ.get("PYTHONPATH", "")]
if importlib.util.find_spec("torchvision") is None:
    _stand_ins = str(_support / "stand_ins")
    sys.path.append(_stand_ins)
    _paths.append(_stand_ins)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, _paths))

from tests.support.tiny_models import TinyLlama, write_tiny_llama  # noqa: E402

pytest_plugins = ["tests.support.repeating"]

ModelFactory = Callable[[TinyLlama], Path]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> ModelFactory:
    """Folder of a tiny Llama checkpoint of the given shape, written once per session."""
    folders: dict[str, Path] = {}

    def folder_of(shape: TinyLlama) -> Path:
        key = repr(shape)
        if key not in folders:
            folders[key] = write_tiny_llama(tmp_path_factory.mktemp("tiny"), shape)
        return folders[key]

    return folder_of


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none."""
    import torch  # not before the environment is set

    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


_LONGEST_FIRST = ("ray", "server", "engine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start clusters, servers and engines come first, in the order of their names.

    Processes take a file at a time in this order, so none is left with a long one at the end.
    """

    def weight(item: pytest.Item) -> int:
        marks = [i for i, name in enumerate(_LONGEST_FIRST) if item.get_closest_marker(name)]
        return min(marks, default=len(_LONGEST_FIRST))

    heaviest: dict[Path, int] = {}
    for item in items:
        heaviest[item.path] = min(weight(item), heaviest.get(item.path, len(_LONGEST_FIRST)))
    items.sort(key=lambda item: heaviest[item.path])
