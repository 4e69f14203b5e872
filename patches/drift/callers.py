"""Whether whoever uses a symbol the old way can go on. Pure."""

import ast

from patches.drift.scopes import FUNCTIONS, scope_of
from patches.drift.tree import Found


def still_fits(before: Found, now: Found) -> bool:
    """Nothing that was there is gone or different; what is new may be left out."""
    old, new = before.nodes[-1], now.nodes[-1]
    if isinstance(old, ast.ClassDef) and isinstance(new, ast.ClassDef):
        return _class_fits(old, new)
    if isinstance(old, FUNCTIONS) and isinstance(new, FUNCTIONS):
        return type(old) is type(new) and _function_fits(old, new)
    return False


def _class_fits(old: ast.ClassDef, new: ast.ClassDef) -> bool:
    bases = [*map(ast.unparse, [*new.bases, *new.keywords])]
    if any(ast.unparse(one) not in bases for one in (*old.bases, *old.keywords)):
        return False
    before, now = _values(old), _values(new)
    if any(now.get(name) != value for name, value in before.items()):
        return False
    # A field of a data class without a default would have to be given.
    if any("=" not in value for name, value in now.items() if name not in before):
        return False
    first, second = _made(old), _made(new)
    if first is None or second is None:
        return first is second
    return _function_fits(first, second)


def _made(node: ast.ClassDef) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    found = [one for one in node.body if isinstance(one, FUNCTIONS) and one.name == "__init__"]
    return found[-1] if found else None


def _values(node: ast.ClassDef) -> dict[str, str]:
    """Attributes in the body of a class."""
    defined = scope_of(node.body, "", is_package=False).defined
    return {
        name: ast.unparse(nodes[-1])
        for name, nodes in defined.items()
        if isinstance(nodes[-1], ast.Assign | ast.AnnAssign)
    }


def _function_fits(
    old: ast.FunctionDef | ast.AsyncFunctionDef, new: ast.FunctionDef | ast.AsyncFunctionDef
) -> bool:
    if _unparsed(old.returns) != _unparsed(new.returns):
        return False
    if [*map(ast.unparse, old.decorator_list)] != [*map(ast.unparse, new.decorator_list)]:
        return False
    before, now = _positional(old.args), _positional(new.args)
    if now[: len(before)] != before or any("=" not in one for one in now[len(before) :]):
        return False
    named, more = _named(old.args), _named(new.args)
    if any(more.get(name) != value for name, value in named.items()):
        return False
    if any("=" not in value for name, value in more.items() if name not in named):
        return False
    return _rest(old.args) == _rest(new.args)


def _positional(arguments: ast.arguments) -> list[str]:
    every = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(every) - len(arguments.defaults)) + [*arguments.defaults]
    return [_spelled(one, default) for one, default in zip(every, defaults, strict=True)]


def _named(arguments: ast.arguments) -> dict[str, str]:
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return {one.arg: _spelled(one, default) for one, default in pairs}


def _rest(arguments: ast.arguments) -> tuple[bool, bool]:
    return arguments.vararg is not None, arguments.kwarg is not None


def _spelled(argument: ast.arg, default: ast.expr | None) -> str:
    return f"{ast.unparse(argument)}{'' if default is None else f' = {ast.unparse(default)}'}"


def _unparsed(node: ast.expr | None) -> str | None:
    return None if node is None else ast.unparse(node)
