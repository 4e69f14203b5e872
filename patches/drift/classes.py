"""Seams of our subclasses: what they override, what they use, and the names they add.

A mixin says nothing of the classes it is mixed over; the concrete classes do, by their order of
resolution. So a mixin is read once per concrete class, and stands on every class that follows it.
"""

import ast
from collections.abc import Iterator

from patches.drift.names import is_private, is_super, is_vllm
from patches.drift.scopes import FUNCTIONS, Class
from patches.drift.seams import Kind, Place, Seam, Symbol
from patches.drift.tree import Tree

_PYTHONS = {"__init__", "__post_init__", "__call__"}
"""Of Python's own names, those a subclass must fit its base with."""


def seams_of_classes(tree: Tree, package: str) -> Iterator[Seam]:
    """Of every class of ``package`` with a class of vLLM behind it."""
    for concrete in tree.classes(package):
        order = tree.order(concrete)
        theirs = [one for one in order if is_vllm(one.module.name)]
        heads = [one for one in theirs if not any(one in tree.order(other)[1:] for other in theirs)]
        for ours in order:
            if heads and not is_vllm(ours.module.name):
                yield from _overrides(tree, ours, heads)
                yield from _uses(tree, ours, heads)


def _symbol(head: Class, name: str) -> Symbol:
    return Symbol(head.module.name, (*head.path, name))


def _overrides(tree: Tree, ours: Class, heads: list[Class]) -> Iterator[Seam]:
    own: dict[str, int] = {
        name: statements[0].lineno for name, statements in ours.on_instances.items()
    }
    own |= {name: nodes[0].lineno for name, nodes in ours.scope.defined.items()}
    for name, line in own.items():
        if name.startswith("__") and name not in _PYTHONS:
            continue
        place = (Place(ours.module.file, line),)
        behind = [head for head in heads if tree.member(head, name)]
        on_class = name in ours.scope.defined
        for head in behind:
            yield Seam(Kind.OVERRIDE if on_class else Kind.SET, _symbol(head, name), place)
        if not behind and name not in _PYTHONS:
            yield from (Seam(Kind.OWN, _symbol(head, name), place) for head in heads)


def _uses(tree: Tree, ours: Class, heads: list[Class]) -> Iterator[Seam]:
    for method in ours.node.body:
        if not isinstance(method, FUNCTIONS) or not method.args.args:
            continue
        me = method.args.args[0].arg
        for node in ast.walk(method):
            if not isinstance(node, ast.Attribute):
                continue
            mine = isinstance(node.value, ast.Name) and node.value.id == me
            if not (mine or is_super(node.value)) or node.attr.startswith("__"):
                continue
            kind = Kind.PRIVATE if is_private(node.attr) else Kind.PUBLIC
            for head in heads:
                if tree.member(head, node.attr):
                    place = (Place(ours.module.file, node.lineno),)
                    yield Seam(kind, _symbol(head, node.attr), place)
