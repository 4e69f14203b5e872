"""Seams that the project declares itself: patches, and changes of single objects."""

import ast
import re
from collections.abc import Iterator

from patches.drift.names import Names
from patches.drift.scopes import Class, Module, chain_of
from patches.drift.seams import Kind, Place, Seam, Symbol
from patches.drift.tree import Tree
from sink_vllm.compat.changes import OBJECT_CHANGES, declared_patches


def seams_of_patches(tree: Tree) -> Iterator[Seam]:
    """The targets of all patches, at the line that names them. Imports no vLLM."""
    for patch in declared_patches():
        module = tree.module(patch.wrapper.__module__)
        assert module is not None
        place = Place(module.file, _line_of(module, patch.target))
        yield Seam(Kind.PATCH, Symbol.of(patch.target), (place,), patch.record)


def _line_of(module: Module, target: str) -> int:
    """Where a target is spelled; its attribute, if the code puts the target together."""
    constants = {
        node.value: node.lineno
        for node in module.nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    ending = re.split(r"[:.]", target)[-1]
    return constants.get(target) or constants.get(ending) or 1


def swapped_classes(names: Names) -> Iterator[tuple[str, Place, str]]:
    """Assignments to ``__class__``: the name of each class assigned, place, and target."""
    if "__class__" not in names.module.text:
        return
    nodes = names.module.nodes
    variables = {
        target.id: node.value
        for node in nodes
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    for node in nodes:
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            if isinstance(target, ast.Attribute) and target.attr == "__class__":
                place = Place(names.module.file, node.lineno)
                value = node.value
                if isinstance(value, ast.Subscript) and (table := chain_of(value.value)):
                    value = variables.get(table[-1], value)  # a table of classes
                assigned = value.values if isinstance(value, ast.Dict) else [value]
                for one in assigned:
                    if chain := chain_of(one):
                        yield chain[-1], place, ast.unparse(target)


def seams_of_swaps(names: Names) -> Iterator[Seam]:
    """The classes of vLLM whose place is taken by a subclass of ours."""
    for name, place, target in swapped_classes(names):
        found = names.tree.find(names.module.name, (name,))
        cls = found.as_class if found else None
        if cls is None:
            continue
        base = _first_of_vllm(names.tree, cls)
        if base is not None:
            record = record_of(names.module.name, target)
            yield Seam(Kind.SWAP, Symbol(base.module.name, base.path), (place,), record)


def _first_of_vllm(tree: Tree, cls: Class) -> Class | None:
    """The class of vLLM that an object had before: the base our class is made for.

    That is the last head: mixins of ours derive from more general classes and come before it.
    """
    theirs = [one for one in tree.order(cls) if one.module.name.startswith("vllm")]
    return theirs[0] if theirs else None


def record_of(module: str, what: str) -> str | None:
    """The record of an assignment to an object of vLLM, if it is declared as one."""
    for change in OBJECT_CHANGES:
        pattern = re.escape(change.what).replace(r"\*", ".*")
        within = module == change.where or module.startswith(f"{change.where}.")
        if within and re.fullmatch(pattern, what):
            return change.record
    return None


def is_declared_change(module: str, what: str) -> bool:
    """Whether an assignment is declared to change an object of vLLM."""
    return record_of(module, what) is not None
