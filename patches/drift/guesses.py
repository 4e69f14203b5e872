"""Seams on objects whose class only a run would tell: by the names our code uses on them.

All names used on one object, by what it is called in one file, must be bound by its class. That
leaves a few classes of vLLM, and all of them are taken for meant.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from patches.drift.declared import is_declared_change
from patches.drift.names import VLLM, is_private
from patches.drift.scopes import FUNCTIONS, Class, Module, module_name
from patches.drift.seams import Kind, Place, Seam, Symbol
from patches.drift.tree import Found, Tree

_FEW = 3
"""Classes with values of the same names, among which one may be meant."""
_DEFINES = rb"def +%s\b"
_BINDS = _DEFINES + rb"|self\.%s *[:=,]|^ *%s *[:=]"


class Use(NamedTuple):
    """An attribute that our code uses."""

    receiver: tuple[str, str]
    """File, and what the object is called there."""
    name: str
    place: Place


def private_uses(modules: Iterable[Module]) -> list[Use]:
    """Private attributes that our code does not bind itself, on whatever object."""
    uses = []
    bound: set[str] = set()
    for module in modules:
        for node in module.nodes:
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    bound.add(name)
                case ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                    bound.add(name)
                case ast.Attribute(attr=name, value=ast.Name(id="self" | "cls"), ctx=ast.Store()):
                    bound.add(name)
                case ast.Attribute(attr=name) if is_private(name):
                    uses.append(_use(module, node))
                case _:
                    pass
    return [one for one in uses if one.name not in bound]


def attributes_set(module: Module) -> Iterator[Use]:
    """Attributes assigned on objects that are declared to be vLLM's."""
    for node in module.nodes:
        if not isinstance(node, ast.Attribute) or isinstance(node.ctx, ast.Load):
            continue
        if node.attr != "__class__" and is_declared_change(module.name, ast.unparse(node)):
            yield _use(module, node)


def _use(module: Module, node: ast.Attribute) -> Use:
    place = Place(module.file, node.lineno)
    return Use((module.file, ast.unparse(node.value)), node.attr, place)


def seams_of_guesses(
    tree: Tree, kind: Kind, uses: Iterable[Use], close: set[str]
) -> Iterator[Seam]:
    """One per class of vLLM that may be meant, and name.

    Args:
        kind: private attributes are looked for everywhere; of attributes that are set, methods
            are, and values in ``close`` only.
        close: modules our code imports from; if classes there have the names, they are meant.
    """
    uses = list(uses)
    pattern = _BINDS if kind is Kind.PRIVATE else _DEFINES
    definers = _definers(tree, {one.name for one in uses}, pattern, close)
    receivers: dict[tuple[str, str], list[Use]] = defaultdict(list)
    for use in uses:
        receivers[use.receiver].append(use)
    for used in receivers.values():
        names = {use.name for use in used}
        owners = {cls for name in names for _, cls in definers.get(name, ()) if cls is not None}
        whole = [cls for cls in owners if all(tree.member(cls, name) for name in names)]
        for use in used:
            found = [tree.member(cls, use.name) for cls in whole] or [
                one for one, _ in definers.get(use.name, ())
            ]
            for one in _likely(kind, [one for one in found if one is not None], close):
                yield Seam(kind, Symbol(one.module.name, one.path), (use.place,))


def _likely(kind: Kind, found: list[Found], close: set[str]) -> list[Found]:
    near = [one for one in found if one.module.name in close]
    if kind is Kind.PRIVATE:
        return near or found
    values = [one for one in near if not isinstance(one.nodes[-1], FUNCTIONS)]
    return near or found if len(values) <= _FEW else []


def _definers(
    tree: Tree, names: set[str], pattern: bytes, close: set[str]
) -> dict[str, list[tuple[Found, Class | None]]]:
    """Where vLLM binds names: in modules close to us, and where the text shows the pattern."""
    found: dict[str, list[tuple[Found, Class | None]]] = defaultdict(list)
    if not names:
        return found
    some = re.compile(b"|".join(re.escape(name.encode()) for name in names))
    exact = {
        name: re.compile(pattern.replace(b"%s", re.escape(name.encode())), flags=re.MULTILINE)
        for name in names
    }
    for file, text in sorted(tree.files.items()):
        if not file.startswith(f"{VLLM}/"):
            continue
        # Parsing is what takes the time.
        here = {one.decode() for one in set(some.findall(text))}
        if module_name(file) not in close:
            here = {name for name in here if exact[name].search(text)}
        module = tree.module(module_name(file)) if here else None
        if module is None:
            continue
        for name in here:
            if nodes := module.scope.defined.get(name):
                found[name].append((Found(module, (name,), tuple(nodes)), None))
        for defined, nodes in module.scope.defined.items():
            if not isinstance(node := nodes[-1], ast.ClassDef):
                continue
            cls = Class(module, (defined,), node)
            for name in here:
                if cls.binds(name) and (member := tree.member(cls, name)):
                    found[name].append((member, cls))
    return found
