"""The one mechanism for run-time patches of vLLM.

A patch is a declared object: what it replaces, the function that makes the replacement from the
original, and the record in ``patches/`` that says why there is no better way. Declaring one costs
nothing; targets are resolved when the patch is applied, so declarations import no vLLM. A process
applies a patch when it imports the target's module, and never loads one for the patch's sake:
workers do not need API servers' modules, which would cost every start half a second.

Invariants (pinned by tests/compat/test_patching.py):

- applying the same patch twice changes nothing the second time;
- two patches of ours on one attribute are an error that names both;
- a target that is missing is an error, never a skip: vLLM has renamed it. The import of its module
  fails with it;
- ``revert()`` leaves the owner exactly as it was found.
"""

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from wrapt import register_post_import_hook

_BOOK = "_sink_vllm_patches"  # in the owner's own __dict__, so that subclasses are not confused


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """One replaced attribute of vLLM."""

    target: str
    """``"package.module:function"`` or ``"package.module:Class.attribute"``."""
    wrapper: Callable[[Any], Any]
    """Takes the original, returns its replacement.

    For static and class methods it takes and returns the plain function; the mechanism wraps it
    again. Anything that is not a function is handed over as it is stored.
    """
    record: str
    """File name in ``patches/``, without ``.md``."""
    formerly: str | None = None
    """The target on an older vLLM line, which does not have ``target``; in the same module."""

    def __post_init__(self) -> None:
        if self.formerly is not None and _module_of(self.formerly) != self.module:
            raise ValueError(f"{self.target} and {self.formerly} are in different modules")

    @property
    def module(self) -> str:
        """Name of the module that has the target."""
        return _module_of(self.target)

    @property
    def is_applied(self) -> bool:
        """Whether this patch is in effect in this process."""
        owner, name = self.locate()
        applied = _book_of(owner).get(name)
        return applied is not None and applied.patch == self

    def apply(self) -> None:
        """Replace the target; does nothing if this patch has done so already.

        Raises:
            RuntimeError: the target does not exist, or another patch of ours holds it.
        """
        owner, name = self.locate()
        book = _book_of(owner)
        applied = book.get(name)
        if applied is not None:
            if applied.patch == self:
                return
            raise RuntimeError(
                f"sink_vllm patch {self.record!r} wants {self.target}, which patch "
                f"{applied.patch.record!r} has replaced already; merge the two into one."
            )
        stored = inspect.getattr_static(owner, name)
        replacement = _replace(stored, self.wrapper)
        was_own = name in vars(owner)
        setattr(owner, name, replacement)
        setattr(owner, _BOOK, {**book, name: _Applied(self, stored, replacement, was_own)})

    def apply_on_import(self) -> None:
        """Apply as soon as this process has imported the target's module; at once if it has.

        What :meth:`apply` raises comes out of that import.
        """
        register_post_import_hook(lambda _module: self.apply(), self.module)

    def revert(self) -> None:
        """Put the original back; does nothing if this patch is not applied (for tests).

        Raises:
            RuntimeError: somebody else has replaced the attribute since.
        """
        owner, name = self.locate()
        book = _book_of(owner)
        applied = book.get(name)
        if applied is None or applied.patch != self:
            return
        if inspect.getattr_static(owner, name) is not applied.replacement:
            raise RuntimeError(
                f"{self.target} was replaced again after sink_vllm patch {self.record!r}; "
                "revert the later replacement first."
            )
        if applied.was_own:
            setattr(owner, name, applied.stored)
        else:  # it was inherited
            delattr(owner, name)
        rest = {key: value for key, value in book.items() if key != name}
        if rest:
            setattr(owner, _BOOK, rest)
        else:
            delattr(owner, _BOOK)

    def locate(self) -> tuple[Any, str]:
        """The object that holds the target, and the target's name in it."""
        if self.formerly is not None:
            with contextlib.suppress(RuntimeError):
                return self._find(self.target)
            return self._find(self.formerly)
        return self._find(self.target)

    def _find(self, target: str) -> tuple[Any, str]:
        *outer, name = target.partition(":")[2].split(".")
        try:
            owner = importlib.import_module(_module_of(target))
            for part in outer:
                owner = getattr(owner, part)
            inspect.getattr_static(owner, name)
        except (ModuleNotFoundError, AttributeError) as error:
            raise RuntimeError(
                f"sink_vllm patch {self.record!r} replaces {target}, which this vLLM does "
                f"not have ({error}); vLLM seems to have renamed it: see patches/{self.record}.md "
                "and install a vLLM version that this sink_vllm supports."
            ) from error
        return owner, name


def _module_of(target: str) -> str:
    return target.partition(":")[0]


@dataclass(frozen=True, slots=True)
class _Applied:
    patch: Patch
    stored: Any
    replacement: Any
    was_own: bool


def _book_of(owner: Any) -> dict[str, _Applied]:
    """Our patches on ``owner`` itself (not on its parents), by attribute name."""
    book: dict[str, _Applied] = vars(owner).get(_BOOK, {})
    return book


def _replace(stored: Any, wrapper: Callable[[Any], Any]) -> Any:
    """The replacement in the form in which the original is stored."""
    if isinstance(stored, staticmethod | classmethod):
        return type(stored)(_replace(stored.__func__, wrapper))
    replacement = wrapper(stored)
    if inspect.isfunction(stored):
        functools.update_wrapper(replacement, stored)  # signature, name and docstring stay
    return replacement
