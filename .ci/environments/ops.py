"""Which compiled operators a vLLM source tree calls, and whether those at hand can take the calls.

Read from the source without importing it. Operators of CPUs are told from the hundreds for other
devices by where they stand: "cpu" in the operator's name, in the file, the function, the class,
or the condition around the call.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CPU = re.compile(r"(?<![a-z])cpu(?![a-z])|Cpu|CPU")
OTHER_DEVICE = re.compile(r"cuda|xpu|rocm")  # as in `get_cuda_view_from_cpu_tensor`


@dataclass(frozen=True)
class Call:
    """The shape of a call, or a mention that is none."""

    operator: str
    """As torch names it: ``"_C::rms_norm"``."""
    on_cpu: bool
    positional: int | None = None
    """How many arguments by position; None for a mention, and where that cannot be read."""
    keywords: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Signature:
    """The parameters of a compiled operator."""

    names: tuple[str, ...]
    required: frozenset[str]

    def takes(self, call: Call) -> bool:
        """Whether the arguments fit."""
        if call.positional is None:
            return True
        by_position = frozenset(self.names[: call.positional])
        return (
            call.positional <= len(self.names)
            and call.keywords <= frozenset(self.names) - by_position
            and self.required <= by_position | call.keywords
        )


def read_calls(source: str, file: str) -> tuple[dict[Call, str], set[str]]:
    """The operators of one file.

    Returns:
        Every call with the place it was first seen at (``"vllm/_custom_ops.py:12"``), and the
        operators the file asks ``hasattr`` about, so can do without.
    """
    calls: dict[Call, str] = {}
    optional: set[str] = set()
    for node, around in _walk(ast.parse(source), (file,)):
        operator = _operator(node.func if isinstance(node, ast.Call) else node)
        if operator is not None:
            on_cpu = any(CPU.search(text) for text in (operator, *around))
            on_cpu = on_cpu and not OTHER_DEVICE.search(operator)
            calls.setdefault(_call(operator, on_cpu, node), f"{file}:{node.lineno}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "hasattr":
            namespace, name = node.args
            path = ast.unparse(namespace).split(".")
            asked = name.value if isinstance(name, ast.Constant) else None
            if path[:2] == ["torch", "ops"] and len(path) == 3 and isinstance(asked, str):
                optional.add(f"{path[2]}::{asked}")
    return calls, optional


def read_tree(package: Path) -> tuple[dict[Call, str], set[str]]:
    """The operators of vLLM's own extensions (namespaces ``_C``, ``_moe_C``, …) of a package."""
    calls: dict[Call, str] = {}
    optional: set[str] = set()
    for path in sorted(package.rglob("*.py")):
        source = path.read_text()
        if "torch.ops." not in source:
            continue  # most files: parsing them all takes half a minute
        found, maybe = read_calls(source, str(path.relative_to(package.parent)))
        for call, place in found.items():
            if call.operator.partition("::")[0].endswith("_C"):
                calls.setdefault(call, place)
        optional |= maybe
    return calls, optional


def missing(
    new: dict[Call, str],
    old: dict[Call, str],
    optional: set[str],
    compiled: dict[str, Signature],
) -> list[str]:
    """The operators that a CPU needs for the new source and has not, each with its place.

    Args:
        new: the calls of the source to be run.
        old: those of the source that the extensions were built with. What it names and they lack
            is not for this machine.
        optional: what the new source does without.
        compiled: the operators there are.
    """
    there = {call.operator for call in old} | optional | set(compiled)
    places: dict[str, str] = {}
    for call, place in new.items():
        if call.on_cpu and call.operator not in there:
            places.setdefault(_spelled(call.operator), place)
    return [f"{name} ({place})" for name, place in places.items()]


def misfits(
    new: dict[Call, str], old: dict[Call, str], compiled: dict[str, Signature]
) -> list[str]:
    """The operators that the new source calls in a way they cannot take, one phrase each."""
    found: dict[str, str] = {}
    for call, place in new.items():
        operator = compiled.get(call.operator)
        if operator is not None and call not in old and not operator.takes(call):
            names = ", ".join(operator.names)
            phrase = f"{_spelled(call.operator)} takes ({names}), not as {place} calls it"
            found.setdefault(call.operator, phrase)
    return list(found.values())


def _spelled(operator: str) -> str:
    return "torch.ops." + operator.replace("::", ".")


def _call(operator: str, on_cpu: bool, node: ast.expr) -> Call:
    if not isinstance(node, ast.Call):
        return Call(operator, on_cpu)
    keywords = frozenset(keyword.arg for keyword in node.keywords if keyword.arg)
    unpacked = any(isinstance(argument, ast.Starred) for argument in node.args)
    if unpacked or len(keywords) < len(node.keywords):
        return Call(operator, on_cpu)
    return Call(operator, on_cpu, len(node.args), keywords)


def _operator(node: ast.AST) -> str | None:
    """``"_C::name"`` of ``torch.ops._C.name``, also with ``.default`` behind it."""
    if isinstance(node, ast.Attribute) and node.attr == "default":
        node = node.value
    if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Attribute):
        return None
    namespace = node.value
    if not isinstance(namespace.value, ast.Attribute) or namespace.value.attr != "ops":
        return None
    torch = namespace.value.value
    if not isinstance(torch, ast.Name) or torch.id != "torch":
        return None
    return f"{namespace.attr}::{node.attr}"


def _walk(node: ast.AST, around: tuple[str, ...]) -> Iterator[tuple[ast.expr, tuple[str, ...]]]:
    """Every expression with the names and conditions it stands in."""
    for child in ast.iter_child_nodes(node):
        inside = around
        if isinstance(node, ast.If) and child in node.body:
            condition = ast.unparse(node.test)
            if "not " not in condition:
                inside = (*around, condition)
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inside = (*inside, child.name)
        if isinstance(child, ast.expr):
            yield child, inside
        yield from _walk(child, inside)
