"""What a name in one of our functions stands for in vLLM, as far as the text tells."""

import ast
from collections.abc import Iterator

from patches.drift.scopes import FUNCTIONS, Class, Module, absolute, chain_of
from patches.drift.tree import Tree

VLLM = "vllm"
Function = ast.FunctionDef | ast.AsyncFunctionDef


def is_vllm(module: str) -> bool:
    return module.split(".")[0] == VLLM


class Names:
    """The names of vLLM that one of our modules has, wherever it imports them."""

    def __init__(self, tree: Tree, module: Module) -> None:
        self.tree = tree
        self.module = module
        self.imported: dict[str, tuple[str, tuple[str, ...]]] = {}
        """Module and path that a name stands for; functions import under names of their own."""
        self.lines: list[tuple[int, str, tuple[str, ...]]] = []
        """Every import from vLLM: line, module, path."""
        for node in module.nodes:
            if isinstance(node, ast.ImportFrom):
                source = absolute(module.name, module.is_package, node)
                for alias in node.names:
                    if is_vllm(source):
                        self._take(alias.asname or alias.name, node.lineno, source, (alias.name,))
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if is_vllm(alias.name):
                        name = alias.asname or alias.name
                        self._take(name, node.lineno, alias.name, ())

    def _take(self, name: str, line: int, module: str, path: tuple[str, ...]) -> None:
        self.imported[name] = (module, path)
        self.lines.append((line, module, path))

    def of_chain(self, chain: tuple[str, ...]) -> tuple[str, tuple[str, ...]] | None:
        """Module and path of a chain that starts at an imported name."""
        for length in range(len(chain), 0, -1):  # "vllm.a.b" of ``import vllm.a`` is one name
            if taken := self.imported.get(".".join(chain[:length])):
                return taken[0], (*taken[1], *chain[length:])
        return None

    def class_of(self, annotation: ast.expr | None) -> Class | None:
        """The class, ours or vLLM's, that an annotation names; not one in a container."""
        match annotation:
            case ast.Constant(value=str(text)):
                try:
                    return self.class_of(ast.parse(text, mode="eval").body)
                except SyntaxError:
                    return None
            case ast.BinOp(left=left, op=ast.BitOr(), right=right):
                return self.class_of(left) or self.class_of(right)
            case ast.Name() | ast.Attribute():
                chain = chain_of(annotation)
                if chain is None:
                    return None
                taken = self.of_chain(chain)
                found = (
                    self.tree.find(self.module.name, chain)
                    if taken is None
                    else self.tree.find(*taken)
                )
                return None if found is None else found.as_class
            case _:
                return None

    def typed(self, function: Function) -> dict[str, Class]:
        """Classes of parameters and annotated variables of a function."""
        arguments = function.args
        annotated = {
            one.arg: one.annotation
            for one in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
        }
        for node in ast.walk(function):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                annotated[node.target.id] = node.annotation
        classes = {name: self.class_of(node) for name, node in annotated.items()}
        return {name: cls for name, cls in classes.items() if cls is not None}


def functions(module: Module) -> Iterator[Function]:
    for node in module.nodes:
        if isinstance(node, FUNCTIONS):
            yield node


def is_private(name: str) -> bool:
    """One underscore: neither promised to anybody nor Python's own."""
    return name.startswith("_") and not name.startswith("__")


def is_super(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"
    )
