"""Single files of Python source: the names that modules, classes and instances bind.

Nothing is imported or run. A name that is bound in several branches has all of its definitions.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True, slots=True)
class Imported:
    """A name that a module takes from another one; the module itself if ``name`` is ``None``."""

    module: str
    name: str | None


@dataclass(slots=True)
class Scope:
    """What the names of a module or class body are bound to."""

    defined: dict[str, list[Definition]] = field(default_factory=dict)
    imported: dict[str, list[Imported]] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)
    """Modules all of whose names are taken."""


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a scope, those in branches included."""
    for node in body:
        yield node
        for name in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With | ast.For | ast.While):
                yield from statements(getattr(node, name, []))
        for handler in getattr(node, "handlers", []):
            yield from statements(handler.body)


def absolute(module: str, is_package: bool, node: ast.ImportFrom) -> str:
    """The module that ``from ... import`` names, in ``module``."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, node.module] if node.module else parts)


def scope_of(body: list[ast.stmt], module: str, is_package: bool) -> Scope:
    """The names bound by a body."""
    scope = Scope()
    for node in statements(body):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                scope.defined.setdefault(node.name, []).append(node)
            case ast.Assign():
                for target in node.targets:
                    for one in ast.walk(target):
                        if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store):
                            scope.defined.setdefault(one.id, []).append(node)
            case ast.AnnAssign(target=ast.Name(id=name)):
                scope.defined.setdefault(name, []).append(node)
            case ast.Import():
                for alias in node.names:
                    whole = alias.asname or alias.name.partition(".")[0]
                    taken = alias.name if alias.asname else whole
                    scope.imported.setdefault(whole, []).append(Imported(taken, None))
            case ast.ImportFrom():
                source = absolute(module, is_package, node)
                for alias in node.names:
                    if alias.name == "*":
                        scope.stars.append(source)
                        continue
                    name = alias.asname or alias.name
                    scope.imported.setdefault(name, []).append(Imported(source, alias.name))
            case _:
                pass
    return scope


@dataclass
class Module:
    """One file."""

    name: str
    file: str
    text: str

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All of the file; walking a tree again and again would take most of the time."""
        return list(ast.walk(self.tree))

    @cached_property
    def scope(self) -> Scope:
        return scope_of(self.tree.body, self.name, self.is_package)

    @property
    def is_package(self) -> bool:
        return self.file.endswith("__init__.py")


@dataclass(frozen=True)
class Class:
    """A class and what it binds, itself and on its instances."""

    module: Module
    path: tuple[str, ...]
    node: ast.ClassDef

    def __hash__(self) -> int:
        return hash((self.module.name, self.path))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Class) and (self.module.name, self.path) == (
            other.module.name,
            other.path,
        )

    @cached_property
    def scope(self) -> Scope:
        return scope_of(self.node.body, self.module.name, self.module.is_package)

    @cached_property
    def on_instances(self) -> dict[str, list[ast.stmt]]:
        """Statements in methods that assign to attributes of ``self``, by attribute."""
        found: dict[str, list[ast.stmt]] = {}
        for method in self.node.body:
            if not isinstance(method, FUNCTIONS) or not method.args.args:
                continue
            me = method.args.args[0].arg
            for node in ast.walk(method):
                targets: list[ast.expr] = []
                if isinstance(node, ast.Assign):
                    targets = list(node.targets)
                elif isinstance(node, ast.AnnAssign):
                    targets = [node.target]
                while targets:
                    target = targets.pop()
                    if isinstance(target, ast.Tuple | ast.List):
                        targets += target.elts
                    elif (
                        isinstance(target, ast.Attribute)
                        and isinstance(target.value, ast.Name)
                        and target.value.id == me
                        and isinstance(node, ast.stmt)
                    ):
                        found.setdefault(target.attr, []).append(node)
        return found

    def binds(self, name: str) -> bool:
        """Whether this class itself binds ``name``, on the class or on instances."""
        return name in self.scope.defined or name in self.on_instances


def module_name(file: str) -> str:
    """``"package.module"`` for its file."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def chain_of(node: ast.AST | None) -> tuple[str, ...] | None:
    """``("a", "b")`` for the expression ``a.b``; ``None`` for any other."""
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Attribute):
        inner = chain_of(node.value)
        return None if inner is None else (*inner, node.attr)
    return None
