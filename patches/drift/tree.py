"""Packages as a graph of names: what modules import from each other, classes and their bases."""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from patches.drift.scopes import FUNCTIONS, Class, Module, chain_of, module_name


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
            module = self.module(module_name(file)) if file.startswith(f"{package}/") else None
            if module is not None:
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
