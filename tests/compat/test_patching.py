"""The patch mechanism, on classes made for the purpose."""

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sink_vllm.compat.patching import Patch

MODULE = "sink_vllm_patch_target"


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module with something of every kind to patch."""

    class Parent:
        limit = 7

        def method(self, a: int, b: int = 1) -> str:
            """Docstring of the original."""
            return f"{type(self).__name__}.method({a}, {b})"

        @staticmethod
        def static(a: int) -> str:
            return f"static({a})"

        @classmethod
        def of_class(cls, a: int) -> str:
            return f"{cls.__name__}.of_class({a})"

    class Child(Parent):
        pass

    def function() -> str:
        return "function"

    module: Any = ModuleType(MODULE)
    module.Parent, module.Child, module.function = Parent, Child, function
    monkeypatch.setitem(sys.modules, MODULE, module)
    return module


def loud(original: Callable[..., str]) -> Callable[..., str]:
    def replacement(*args: Any, **kwargs: Any) -> str:
        return original(*args, **kwargs).upper()

    return replacement


def patch(path: str, record: str = "0001-test", wrapper: Callable[[Any], Any] = loud) -> Patch:
    return Patch(target=f"{MODULE}:{path}", wrapper=wrapper, record=record)


def test_method_is_wrapped_and_keeps_name_docstring_and_signature(target: Any) -> None:
    before = inspect.signature(target.Parent.method)

    patch("Parent.method").apply()

    assert target.Parent().method(2) == "PARENT.METHOD(2, 1)"
    assert inspect.signature(target.Parent.method) == before
    assert target.Parent.method.__doc__ == "Docstring of the original."


def test_static_and_class_methods_stay_what_they_are(target: Any) -> None:
    patch("Parent.static").apply()
    patch("Parent.of_class").apply()

    assert target.Parent.static(3) == target.Parent().static(3) == "STATIC(3)"
    assert target.Child.of_class(4) == "CHILD.OF_CLASS(4)"


def test_function_of_a_module_is_wrapped(target: Any) -> None:
    patch("function").apply()

    assert target.function() == "FUNCTION"


def test_value_is_handed_over_as_stored(target: Any) -> None:
    patch("Parent.limit", wrapper=lambda limit: limit + 1).apply()

    assert target.Parent.limit == 8


def test_same_patch_twice_changes_nothing(target: Any) -> None:
    first = patch("Parent.method")
    first.apply()
    replacement = target.Parent.method

    first.apply()
    patch("Parent.method").apply()  # an equal declaration is the same patch

    assert target.Parent.method is replacement


def test_second_patch_on_one_attribute_is_an_error_that_names_both(target: Any) -> None:
    patch("Parent.method", "0001-first").apply()

    with pytest.raises(RuntimeError, match=r"'0002-second' wants .*'0001-first'"):
        patch("Parent.method", "0002-second").apply()


def test_patch_of_parent_and_patch_of_child_are_two_patches(target: Any) -> None:
    """Looking the attribute up instead of in ``__dict__`` would find the parent's patch."""
    parent, child = patch("Parent.method", "0001-parent"), patch("Child.method", "0002-child")
    parent.apply()
    assert [parent.is_applied, child.is_applied] == [True, False]

    child.apply()

    assert [parent.is_applied, child.is_applied] == [True, True]
    assert "method" in vars(target.Child)


@pytest.mark.parametrize(
    "path", ["Parent.method", "Parent.static", "Parent.of_class", "Child.method", "function"]
)
def test_revert_leaves_the_owner_as_it_was(target: Any, path: str) -> None:
    owners = (target, target.Parent, target.Child)
    before = [dict(vars(owner)) for owner in owners]
    applied = patch(path)

    applied.apply()
    applied.revert()

    assert [dict(vars(owner)) for owner in owners] == before
    assert not applied.is_applied
    applied.revert()  # nothing left to do


def test_revert_of_one_patch_leaves_the_other(target: Any) -> None:
    kept, reverted = patch("Parent.method", "0001-kept"), patch("Parent.static", "0002-gone")
    kept.apply()
    reverted.apply()

    reverted.revert()

    assert kept.is_applied
    assert target.Parent.static(1) == "static(1)"


def test_revert_under_a_later_replacement_is_an_error(target: Any) -> None:
    ours = patch("Parent.method")
    ours.apply()
    target.Parent.method = lambda self: "somebody else's"

    with pytest.raises(RuntimeError, match=r"replaced again after .*'0001-test'"):
        ours.revert()


@pytest.mark.parametrize(
    "path", [f"{MODULE}:Parent.gone", f"{MODULE}:Gone.method", "no_such_module:function"]
)
def test_missing_target_is_an_error_that_says_where_to_look(target: Any, path: str) -> None:
    missing = Patch(target=path, wrapper=loud, record="0001-test")

    with pytest.raises(RuntimeError, match=r"does not have .*patches/0001-test\.md"):
        missing.apply()


FILE = "sink_vllm_patched_on_import"


@pytest.fixture
def module_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module that can be imported, and has not been."""
    (tmp_path / f"{FILE}.py").write_text("def function():\n    return 'function'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, FILE, raising=False)
    return FILE


def test_on_import_a_module_is_patched_before_anybody_sees_it(module_of_a_file: str) -> None:
    patch = Patch(target=f"{module_of_a_file}:function", wrapper=loud, record="0001-test")

    patch.apply_on_import()
    patch.apply_on_import()  # of two calls the second changes nothing

    assert module_of_a_file not in sys.modules
    imported = importlib.import_module(module_of_a_file)
    assert imported.function() == "FUNCTION"
    assert patch.is_applied
    before = imported.function
    patch.apply_on_import()  # now the module is there
    assert imported.function is before


def test_on_import_a_missing_target_fails_the_import(module_of_a_file: str) -> None:
    missing = Patch(target=f"{module_of_a_file}:renamed", wrapper=loud, record="0001-test")

    missing.apply_on_import()

    with pytest.raises(RuntimeError, match=r"does not have .*patches/0001-test\.md"):
        importlib.import_module(module_of_a_file)
    assert module_of_a_file not in sys.modules


def test_on_import_patches_of_one_module_are_applied_in_their_order(module_of_a_file: str) -> None:
    first, second = (
        Patch(target=f"{module_of_a_file}:function", wrapper=loud, record=record)
        for record in ("0001-first", "0002-second")
    )
    first.apply_on_import()
    second.apply_on_import()

    with pytest.raises(RuntimeError, match=r"'0002-second' wants .*'0001-first'"):
        importlib.import_module(module_of_a_file)


def test_names_of_two_lines_are_in_one_module() -> None:
    with pytest.raises(ValueError, match=r"a:one and b:one are in different modules"):
        Patch(target="a:one", formerly="b:one", wrapper=loud, record="0001-test")
