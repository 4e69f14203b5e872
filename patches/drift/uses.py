"""Seams outside of classes: imports, and attributes of what was imported or annotated."""

import ast
from collections.abc import Iterator

from patches.drift.names import Names, functions, is_private, is_vllm
from patches.drift.scopes import chain_of
from patches.drift.seams import Kind, Place, Seam, Symbol


def seams_of_imports(names: Names) -> Iterator[Seam]:
    for line, module, path in names.lines:
        yield Seam(Kind.IMPORT, Symbol(module, path), (Place(names.module.file, line),))


def seams_of_chains(names: Names) -> Iterator[Seam]:
    """``Imported.attribute``, where what was imported is a class or a module."""
    for node in names.module.nodes:
        if not isinstance(node, ast.Attribute) or (chain := chain_of(node)) is None:
            continue
        taken = names.of_chain(chain)
        if taken is None or node.attr.startswith("__") or names.tree.find(*taken) is None:
            continue
        kind = Kind.PRIVATE if is_private(node.attr) else Kind.PUBLIC
        yield Seam(kind, Symbol(*taken), (Place(names.module.file, node.lineno),))


def seams_of_annotations(names: Names) -> Iterator[Seam]:
    """``parameter.attribute``, where the parameter is annotated with a class of vLLM."""
    for function in functions(names.module):
        typed = names.typed(function)
        for node in ast.walk(function) if typed else ():
            if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
                continue
            cls = typed.get(node.value.id)
            if cls is None or not is_vllm(cls.module.name) or node.attr.startswith("__"):
                continue
            if names.tree.member(cls, node.attr):
                stored = not isinstance(node.ctx, ast.Load)
                kind = Kind.PRIVATE if is_private(node.attr) else Kind.PUBLIC
                symbol = Symbol(cls.module.name, (*cls.path, node.attr))
                place = (Place(names.module.file, node.lineno),)
                yield Seam(Kind.SET if stored else kind, symbol, place)
