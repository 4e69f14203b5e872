"""Stands in for torchvision in tests, where it is not installed: names with nothing behind them.

vLLM's classes of multimodal models import it for their images, and use nothing of it while they
serve text alone. The ordinary wheel breaks a machine without CUDA (``operator torchvision::nms does
not exist``), and the CPU builds are not on PyPI. ``tests/conftest.py`` puts this folder on the
path.

Every name can be looked up, compared, inherited from and written in annotations; whatever is called
raises.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

__version__ = "0.28.0"  # the release beside torch 2.13


class _Absent(type):
    """A name of torchvision's."""

    def __getattr__(cls, name: str) -> Any:
        return _absent(cls, f"{cls.__name__}.{name}", name)

    def __call__(cls, *_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{cls.__name__} was called, and this is a stand-in for torchvision.")


def _absent(owner: Any, full_name: str, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"{full_name} does not exist")
    made = _Absent(full_name, (), {})
    setattr(owner, name, made)  # the same the next time it is asked for
    return made


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds ``torchvision.anything``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(f"{__name__}."):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def exec_module(self, module: types.ModuleType) -> None:
        name = module.__name__
        vars(module)["__getattr__"] = lambda one: _absent(module, f"{name}.{one}", one)


def __getattr__(name: str) -> Any:
    return _absent(sys.modules[__name__], f"{__name__}.{name}", name)


sys.meta_path.append(_Submodules())
