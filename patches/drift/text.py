"""What a symbol says: its source, its signature, the outline of a class. Pure."""

import ast
import hashlib
import textwrap

from patches.drift.scopes import FUNCTIONS, scope_of
from patches.drift.tree import Found


def source(found: Found) -> str:
    """As it stands in the file, with comments; definitions in the order of the file."""
    if not found.path:
        return found.module.text
    lines = found.module.lines
    pieces = []
    for node in found.nodes:
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(one.lineno for one in decorators)])
        pieces.append(textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno])))
    return "\n".join(dict.fromkeys(pieces)) + "\n"


def body(found: Found) -> str:
    """What it does: without comments, docstrings, and the way it is laid out."""
    return "\n".join(dict.fromkeys(_plain(node) for node in found.nodes))


def signature(found: Found) -> str:
    """How it is used: parameters of a function, outline of a class, nothing of a value."""
    return "\n".join(dict.fromkeys(_signature(node) for node in found.nodes)) if found.path else ""


def outline(found: Found) -> str:
    """Of a class whose place is taken: all that its instances are made of, and who answers.

    Bases, attributes, the signatures of its methods, and the whole of ``__init__``.
    """
    cls = found.as_class
    if cls is None:
        return body(found)
    methods = [
        _plain(node) if node.name == "__init__" else _signature(node)
        for node in cls.node.body
        if isinstance(node, FUNCTIONS)
    ]
    return "\n".join([_signature(cls.node), *methods])


def digest(text: str) -> str:
    """Short name of a text, for the list of what was read."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _signature(node: ast.stmt) -> str:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            decorators = [f"@{ast.unparse(one)}" for one in node.decorator_list]
            returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
            kind = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
            head = f"{kind} {node.name}({ast.unparse(node.args)}){returns}"
            return "\n".join([*decorators, head])
        case ast.ClassDef():
            return _outline_of_class(node)
        case _:
            return ""


def _outline_of_class(node: ast.ClassDef) -> str:
    """Bases, attributes without their docstrings, and how it is made."""
    bases = ", ".join(map(ast.unparse, [*node.bases, *node.keywords]))
    lines = [f"class {node.name}({bases})"]
    for names in scope_of(node.body, "", is_package=False).defined.values():
        for one in names:
            if isinstance(one, ast.Assign | ast.AnnAssign):
                lines.append(f"    {ast.unparse(one)}")
            elif one.name == "__init__":
                lines.append(textwrap.indent(_signature(one), "    "))
    return "\n".join(lines)


def _plain(node: ast.stmt) -> str:
    copy = ast.parse(ast.unparse(node))
    for one in ast.walk(copy):
        held = getattr(one, "body", None)
        if isinstance(held, list) and held:
            kept = [stmt for stmt in held if not _is_text(stmt)]
            one.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.unparse(copy)


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
