"""Seams of the guard tests: the sources of vLLM they read, and what they look for in them."""

import ast
from collections.abc import Iterator

from patches.drift.names import Function, Names, functions
from patches.drift.scopes import chain_of
from patches.drift.seams import Kind, Phrases, Place, Seam, Symbol

_READERS = {"re", "ast"}
"""Modules that take a source apart in ways that are not followed here."""


def seams_of_guards(names: Names) -> Iterator[Seam]:
    """One per symbol whose source a test asks for."""
    for function, call in source_reads(names):
        read = Reader(names, function)
        phrases = phrases_of(function)
        place = (Place(names.module.file, call.lineno),)
        for symbol in sorted(read.symbols(call.args[0])):
            yield Seam(Kind.GUARD, symbol, place, phrases=phrases)


def source_reads(names: Names) -> Iterator[tuple[Function, ast.Call]]:
    """Calls of ``inspect.getsource``, with the test they are in."""
    if "getsource" not in names.module.text:
        return
    for function in functions(names.module):
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and chain_of(node.func) == ("inspect", "getsource"):
                yield function, node


class Reader:
    """Which symbols of vLLM an expression in a test may stand for: rather too many than too few."""

    def __init__(self, names: Names, function: Function) -> None:
        self.names = names
        self.function = function
        self._bound: dict[str, list[ast.expr]] = {}
        for node in ast.walk(function):
            match node:
                case ast.Assign(targets=targets, value=value):
                    for target in targets:
                        self._bind(target, value)
                case ast.For(target=target, iter=value):
                    self._bind(target, value)
                case ast.comprehension(target=target, iter=value):
                    self._bind(target, value)
                case _:
                    pass
        fixtures = {one.name: one for one in functions(names.module)}
        for argument in function.args.args:
            fixture = fixtures.get(argument.arg)
            for node in ast.walk(fixture) if fixture else ():
                if isinstance(node, ast.Return | ast.Yield) and node.value is not None:
                    self._bound.setdefault(argument.arg, []).append(node.value)
            for decorator in function.decorator_list:
                if isinstance(decorator, ast.Call):
                    self._bound.setdefault(argument.arg, []).extend(decorator.args)

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        for node in ast.walk(target):
            if isinstance(node, ast.Name):
                self._bound.setdefault(node.id, []).append(value)

    def symbols(self, node: ast.expr) -> set[Symbol]:
        found = set()
        for module, path in self._taken(node, frozenset()):
            while path and self.names.tree.find(module, path) is None:
                path = path[:-1]  # an attribute of its value, such as ``__func__``
            found.add(Symbol(module, path))
        return found

    def _taken(self, node: ast.AST, seen: frozenset[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
        chain = chain_of(node)
        if chain is None:
            for child in ast.iter_child_nodes(node):
                yield from self._taken(child, seen)
            return
        if chain[0] not in seen and chain[0] in self._bound:
            for value in self._bound[chain[0]]:
                for module, path in self._taken(value, seen | {chain[0]}):
                    yield module, (*path, *chain[1:])
        elif taken := self.names.of_chain(chain):
            yield taken


def phrases_of(function: Function) -> Phrases | None:
    """The texts a test looks for; ``None`` if it looks in other ways, too."""
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and (chain_of(node) or ("",))[0] in _READERS:
            return None
    present, counted, absent = set(), set(), set()
    for node in ast.walk(function):
        match node:
            case ast.Constant(value=str(text)):
                present.add(text)
            case _:
                pass
    for node in ast.walk(function):
        match node:
            case ast.Compare(left=ast.Constant(value=str(text)), ops=[ast.NotIn()]):
                absent.add(text)
            case ast.Call(func=ast.Attribute(attr="count"), args=[ast.Constant(value=str(text))]):
                counted.add(text)
            case _:
                pass
    texts = {one for one in present if len(one) > 3} - counted - absent
    return Phrases(frozenset(texts), frozenset(counted), frozenset(absent))
