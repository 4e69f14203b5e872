"""What vLLM's sources say of the backends of latent attention that it chooses from on NVIDIA GPUs.

Read, not imported: half of them import packages that a machine without a GPU lacks.
"""

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum


@dataclass(frozen=True, slots=True)
class LatentBackend:
    """A class of a backend and of its implementation."""

    name: str
    bases: tuple[str, ...]
    members: tuple[str, ...]
    """Names that the class defines itself."""
    dtypes: tuple[str, ...]
    """Of the cache: ``supported_kv_cache_dtypes``."""
    sizes: tuple[int, ...]
    """Tokens of a kernel's page; of multiples of a number, the number."""
    implementation: tuple[str, ...]
    """Names that its implementation defines."""


def _vllm() -> Path:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def names_on_cuda() -> list[str]:
    """Members of ``AttentionBackendEnum`` that are named for ``use_mla``, in any order."""
    tree = ast.parse((_vllm() / "platforms" / "cuda.py").read_text())
    (function,) = [
        one
        for one in ast.walk(tree)
        if isinstance(one, ast.FunctionDef) and one.name == "_get_backend_priorities"
    ]
    (branch,) = [one for one in function.body if isinstance(one, ast.If)]
    assert ast.unparse(branch.test) == "use_mla"
    found = {
        one.attr
        for statement in branch.body
        for one in ast.walk(statement)
        if isinstance(one, ast.Attribute) and ast.unparse(one.value) == "AttentionBackendEnum"
    }
    return sorted(found)


def read(name: str) -> LatentBackend:
    """The backend that ``AttentionBackendEnum`` has under ``name``."""
    module, _, class_name = AttentionBackendEnum[name].value.rpartition(".")
    path = _vllm().parent / Path(*module.split("."))
    tree = ast.parse(path.with_suffix(".py").read_text())
    classes = {one.name: one for one in tree.body if isinstance(one, ast.ClassDef)}
    backend = classes[class_name]
    functions = {one.name: one for one in backend.body if isinstance(one, ast.FunctionDef)}
    implementation = ast.unparse(_returned(functions["get_impl_cls"]))
    return LatentBackend(
        name=str(ast.literal_eval(_returned(functions["get_name"]))),
        bases=tuple(ast.unparse(one) for one in backend.bases),
        members=tuple(_names(backend)),
        dtypes=tuple(_value(backend, "supported_kv_cache_dtypes")),
        sizes=tuple(
            ast.literal_eval(one if isinstance(one, ast.Constant) else one.args[0])
            for one in _returned(functions["get_supported_kernel_block_sizes"]).elts
        ),
        implementation=tuple(_names(classes[implementation])),
    )


def _names(owner: ast.ClassDef) -> Iterator[str]:
    for one in owner.body:
        if isinstance(one, ast.FunctionDef):
            yield one.name
        elif isinstance(one, ast.AnnAssign):
            yield ast.unparse(one.target)


def _value(owner: ast.ClassDef, name: str) -> Any:
    (found,) = [
        one.value
        for one in owner.body
        if isinstance(one, ast.AnnAssign) and ast.unparse(one.target) == name
    ]
    assert found is not None
    return ast.literal_eval(found)


def _returned(function: ast.FunctionDef) -> Any:
    (found,) = [one.value for one in ast.walk(function) if isinstance(one, ast.Return)]
    return found
