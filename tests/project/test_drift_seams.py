"""`make drift`: the list of what we stand on in vLLM is whole.

It is read from source; here it is compared with what classes and code objects are at run time.
"""

import dis
import importlib
import pkgutil
import re
import types
from collections.abc import Iterator

import pytest

import sink_vllm
from patches.drift.accepted import read_accepted
from patches.drift.collect import foreign_names, our_files, seams_of, seams_of_code
from patches.drift.fetch import Files, installed
from patches.drift.seams import Kind, Place, Seam, Symbol
from patches.drift.tree import Tree
from sink_vllm.compat.changes import declared_patches
from tests.support.paths import ROOT

OF_OTHER_LIBRARIES = {
    "_StoreAction": "argparse",
    "_option_string_actions": "argparse",
    "_collector_to_names": "prometheus_client",
    "_names_to_collectors": "prometheus_client",
    "_is_amx_tile_supported": "torch",
    "_is_avx512_bf16_supported": "torch",
    "_is_avx512_supported": "torch",
}
PYTHONS = {"__init__", "__post_init__", "__call__"}


@pytest.fixture(scope="module")
def vllm() -> Files:
    return installed()[1]


@pytest.fixture(scope="module")
def tree(vllm: Files) -> Tree:
    return Tree(vllm)


@pytest.fixture(scope="module")
def seams(vllm: Files) -> list[Seam]:
    return seams_of(our_files(), vllm)


@pytest.fixture(scope="module")
def modules() -> list[types.ModuleType]:
    names = [one.name for one in pkgutil.walk_packages(sink_vllm.__path__, "sink_vllm.")]
    return [importlib.import_module(name) for name in names if not name.endswith("__main__")]


def _of(cls: type) -> str:
    return cls.__module__.split(".")[0]


def _classes(modules: list[types.ModuleType]) -> list[type]:
    return [
        cls
        for module in modules
        for cls in vars(module).values()
        if isinstance(cls, type) and cls.__module__ == module.__name__
    ]


def _code(module: types.ModuleType) -> Iterator[types.CodeType]:
    assert module.__file__ is not None
    with open(module.__file__) as file:
        waiting = [compile(file.read(), module.__file__, "exec")]
    while waiting:
        code = waiting.pop()
        yield code
        waiting += [one for one in code.co_consts if isinstance(one, types.CodeType)]


def _is_made(ours: type, theirs: type, name: str) -> bool:
    """Whether one of the two methods is in no source."""
    if theirs.__name__ == "TorchCompileWithNoGuardsWrapper":
        return True  # vLLM's decorator of models makes it a base of theirs
    made = hasattr(ours, "__dataclass_fields__") or getattr(theirs, "_is_protocol", False)
    return name == "__init__" and made


def test_overrides_are_those_of_the_running_classes(
    seams: list[Seam], tree: Tree, modules: list[types.ModuleType]
) -> None:
    """Mixins included, over every class they are mixed over."""
    running = set()
    for concrete in _classes(modules):
        order = concrete.__mro__
        for index, ours in enumerate(order):
            if _of(ours) != "sink_vllm":
                continue
            for name, value in vars(ours).items():
                if not callable(value) and not isinstance(
                    value, property | classmethod | staticmethod
                ):
                    continue
                if name.startswith("__") and name not in PYTHONS:
                    continue
                behind = [one for one in order[index:] if _of(one) == "vllm" and name in vars(one)]
                if behind and not _is_made(ours, behind[0], name):
                    running.add(f"{behind[0].__module__}:{behind[0].__qualname__}.{name}")
    listed = {
        found.spelled
        for seam in seams
        if seam.kind is Kind.OVERRIDE and (found := tree.find(*seam.symbol)) is not None
    }

    assert len(running) > 40
    assert running - listed == set()


def test_private_attributes_in_the_running_code_are_listed(
    seams: list[Seam], modules: list[types.ModuleType]
) -> None:
    used: dict[str, str] = {}
    ours: set[str] = set()
    for module in modules:
        ours |= vars(module).keys()
        for code in _code(module):
            ours |= {*code.co_varnames, code.co_name}
            before = None
            for step in dis.get_instructions(code):
                name = step.argval
                if step.opname in ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR"):
                    if re.match(r"_[^_]", name):
                        used.setdefault(name, module.__name__)
                    if step.opname == "STORE_ATTR" and before in ("self", "cls"):
                        ours.add(name)
                before = step.argval
    for cls in _classes(modules):
        ours |= {*vars(cls), *vars(cls).get("__annotations__", ())}
    listed = {seam.symbol.path[-1] for seam in seams if seam.symbol.path}

    assert len(used) > 100
    assert {name for name in used if name not in ours | listed} == OF_OTHER_LIBRARIES.keys()


def test_private_attributes_of_other_libraries_are_known(seams: list[Seam]) -> None:
    """What neither we nor vLLM bind belongs to somebody else, or vLLM has dropped it."""
    assert foreign_names(our_files(), seams) == OF_OTHER_LIBRARIES.keys()


def test_patch_targets_are_listed_where_they_are_spelled(seams: list[Seam]) -> None:
    listed = {str(seam.symbol): seam for seam in seams if seam.kind is Kind.PATCH}

    assert listed.keys() == {patch.target for patch in declared_patches()}
    for target, seam in listed.items():
        for place in seam.places:
            lines = (ROOT / place.file).read_text().splitlines()[place.line - 1 :][:3]
            assert re.split("[:.]", target)[-1] in "".join(lines), place


def test_class_swaps_are_listed(seams: list[Seam]) -> None:
    """Every assignment to ``__class__``, but for argparse's action."""
    assigned = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "sink_vllm").rglob("*.py")
        if re.search(r"\.__class__ = ", path.read_text())
    }
    swaps = [seam for seam in seams if seam.kind is Kind.SWAP]
    listed = {place.file for seam in swaps for place in seam.places}

    assert {file for file in assigned - listed if "argparse" not in (ROOT / file).read_text()} == (
        set()
    )
    assert all(seam.record for seam in swaps)


def test_sources_that_guards_read_are_listed(seams: list[Seam]) -> None:
    asks = "inspect.get" + "source("
    asked = {
        (path.relative_to(ROOT).as_posix(), number)
        for path in (ROOT / "tests").rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if asks in line
    }
    listed = {
        (place.file, place.line)
        for seam in seams
        if seam.kind is Kind.GUARD
        for place in seam.places
    }

    assert asked
    assert asked - listed == set()


def test_everything_listed_is_in_the_release_we_stand_on(seams: list[Seam], tree: Tree) -> None:
    missing = [
        seam.symbol
        for seam in seams
        if seam.kind is not Kind.OWN and tree.find(*seam.symbol) is None
    ]
    # Where a newer line has the target, an older one has it elsewhere.
    newer = {Symbol.of(patch.target) for patch in declared_patches() if patch.formerly}
    missing = [symbol for symbol in missing if symbol not in newer]

    assert missing == []


def test_what_was_read_is_about_seams(seams: list[Seam], tree: Tree) -> None:
    """An entry for a symbol that we no longer use must go."""
    names = {str(seam.symbol) for seam in seams}
    names |= {found.spelled for seam in seams if (found := tree.find(*seam.symbol)) is not None}

    assert [one.symbol for one in read_accepted() if str(one.symbol) not in names] == []


PLANTED = b'''
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.request import Request

_Base: Any = object


class Mixin(_Base):
    def finish_requests(self, *args: Any) -> Any:
        self._of_ours = 1
        self._free_blocks(args[0])
        return super().finish_requests(*args)


class Mixed(Mixin, Scheduler):
    """Says which class the mixin is for."""


class Runner(GPUModelRunner):
    def _dummy_run(self, *args: Any) -> Any:
        return super()._dummy_run(*args)


def of_a_parameter(request: Request) -> Any:
    return request._prompt_embeds_per_block_hashes


def of_an_unknown_object(client: Any) -> Any:
    return client._call_utility_async


def swap(runner: Any) -> None:
    runner.__class__ = Runner
'''


@pytest.mark.parametrize(
    ("kind", "symbol"),
    [
        (Kind.OVERRIDE, "vllm.v1.core.sched.scheduler:Scheduler.finish_requests"),
        (Kind.OVERRIDE, "vllm.v1.worker.gpu_model_runner:GPUModelRunner._dummy_run"),
        (Kind.PRIVATE, "vllm.v1.core.sched.scheduler:Scheduler._free_blocks"),
        (Kind.PRIVATE, "vllm.v1.request:Request._prompt_embeds_per_block_hashes"),
        (Kind.PRIVATE, "vllm.v1.engine.core_client:AsyncMPClient._call_utility_async"),
        (Kind.OWN, "vllm.v1.core.sched.scheduler:Scheduler._of_ours"),
        (Kind.SWAP, "vllm.v1.worker.gpu_model_runner:GPUModelRunner"),
        (Kind.IMPORT, "vllm.v1.request:Request"),
    ],
)
def test_a_new_dependence_is_found(vllm: Files, kind: Kind, symbol: str) -> None:
    lines = PLANTED.decode().splitlines()
    name = symbol.split(":")[1].split(".")[-1]
    tree = Tree({**vllm, "sink_vllm/planted.py": PLANTED})
    places = [
        place
        for seam in seams_of_code(tree)
        if (seam.kind, seam.symbol) == (kind, Symbol.of(symbol))
        for place in seam.places
    ]

    assert places
    used = "__class__" if kind is Kind.SWAP else name
    assert all(used in lines[place.line - 1] for place in places)
    assert {place.file for place in places} == {Place("sink_vllm/planted.py", 1).file}
