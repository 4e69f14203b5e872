"""Python source as a graph of names: modules, what they import from each other, classes, bases.

Nothing is imported or run. A name that is bound in several branches has all of its definitions.
"""

import ast
from collections.abc import Iterator, Mapping
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


@dataclass(frozen=True)
class Found:
    """What a name turned out to be."""

    module: Module
    path: tuple[str, ...]
    """Empty for the module itself."""
    nodes: tuple[ast.stmt, ...]

    @property
    def spelled(self) -> str:
        return f"{self.module.name}:{'.'.join(self.path)}" if self.path else self.module.name

    @property
    def as_class(self) -> Class | None:
        node = self.nodes[-1] if self.nodes else None
        return Class(self.module, self.path, node) if isinstance(node, ast.ClassDef) else None


class Tree:
    """Packages by the text of their files, which are parsed when somebody asks."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        """``files``: by path, as ``"package/module.py"``."""
        self.files = {file: text for file, text in files.items() if file.endswith(".py")}
        self._modules: dict[str, Module | None] = {}
        self._orders: dict[Class, list[Class]] = {}

    @property
    def parsed(self) -> list[str]:
        """The files that were needed so far."""
        return sorted(one.file for one in self._modules.values() if one is not None)

    def module(self, name: str) -> Module | None:
        if name not in self._modules:
            base = name.replace(".", "/")
            self._modules[name] = None
            for file in (f"{base}/__init__.py", f"{base}.py"):
                if file in self.files:
                    text = self.files[file].decode(errors="replace")
                    self._modules[name] = Module(name, file, text)
                    break
        return self._modules[name]

    def find(self, module: str, path: tuple[str, ...]) -> Found | None:
        """What ``path`` is, seen from ``module``; ``None`` if there is no such thing."""
        return self._find(module, path, frozenset())

    def _find(self, name: str, path: tuple[str, ...], seen: frozenset[object]) -> Found | None:
        module = self.module(name)
        if module is None or (name, path) in seen:
            return None
        if not path:
            return Found(module, (), tuple(module.tree.body))
        seen = seen | {(name, path)}
        first, rest = path[0], path[1:]
        defined = module.scope.defined.get(first, ())
        found: Found | None = None
        if any(isinstance(one, (*FUNCTIONS, ast.ClassDef)) for one in defined):
            kept = [one for one in defined if not isinstance(one, ast.Assign | ast.AnnAssign)]
            return self._inside(Found(module, (first,), tuple(kept)), rest)
        for one in module.scope.imported.get(first, ()):
            found = (
                self._find(one.module, rest, seen)
                if one.name is None
                else self._find(one.module, (one.name, *rest), seen)
            )
            if found is not None:
                return found
        if defined:
            return self._behind(Found(module, (first,), tuple(defined)), rest, seen)
        for star in module.scope.stars:
            if (found := self._find(star, path, seen)) is not None:
                return found
        return self._find(f"{name}.{first}", rest, seen)

    def _behind(
        self, variable: Found, rest: tuple[str, ...], seen: frozenset[object]
    ) -> Found | None:
        """A variable, or what it is another name of."""
        value = getattr(variable.nodes[-1], "value", None)
        chain = chain_of(value)
        if chain is not None and chain != variable.path:
            other = self._find(variable.module.name, (*chain, *rest), seen)
            if other is not None:
                return other
        return None if rest else variable

    def _inside(self, found: Found, rest: tuple[str, ...]) -> Found | None:
        if not rest:
            return found
        owner = found.as_class
        if owner is None:
            return None
        member = self.member(owner, rest[0])
        return None if member is None else self._inside(member, rest[1:])

    def member(self, cls: Class, name: str) -> Found | None:
        """What ``name`` is on ``cls`` or its instances, inherited or not."""
        order = self.order(cls)
        for one in order:
            if nodes := one.scope.defined.get(name):
                return Found(one.module, (*one.path, name), tuple(nodes))
        for one in order:
            if assigned := one.on_instances.get(name):
                return Found(one.module, (*one.path, name), tuple(assigned))
        return None

    def order(self, cls: Class) -> list[Class]:
        """The method resolution order, without classes that are in no file here."""
        if cls not in self._orders:
            self._orders[cls] = [cls]  # against circles
            bases = []
            for node in cls.node.bases:
                chain = chain_of(node.value if isinstance(node, ast.Subscript) else node)
                found = chain and self.find(cls.module.name, chain)
                if found and (base := found.as_class) is not None:
                    bases.append(base)
            self._orders[cls] = [cls, *_linear([*map(self.order, bases), bases])]
        return self._orders[cls]

    def classes(self, package: str) -> Iterator[Class]:
        """All classes at the top level of a package's modules."""
        for module in self.modules(package):
            for name, nodes in module.scope.defined.items():
                if isinstance(node := nodes[-1], ast.ClassDef):
                    yield Class(module, (name,), node)

    def modules(self, package: str) -> Iterator[Module]:
        for file in sorted(self.files):
            if file.startswith(f"{package}/"):
                if (module := self.module(module_name(file))) is not None:
                    yield module


def _linear(rows: list[list[Class]]) -> list[Class]:
    """C3: the order Python would use; what contradicts itself keeps the order it is written in."""
    result: list[Class] = []
    while rows := [row for row in rows if row]:
        heads = [row[0] for row in rows]
        free = [head for head in heads if not any(head in row[1:] for row in rows)]
        chosen = (free or heads)[0]
        result.append(chosen)
        rows = [[one for one in row if one != chosen] for row in rows]
    return result


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
