"""The list of seams, generated from the code."""

import itertools
from collections.abc import Mapping
from pathlib import Path

from patches.drift.classes import seams_of_classes
from patches.drift.declared import seams_of_patches, seams_of_swaps
from patches.drift.guards import seams_of_guards
from patches.drift.guesses import attributes_set, private_uses, seams_of_guesses
from patches.drift.names import Names
from patches.drift.seams import Kind, Seam, merged
from patches.drift.tree import Tree
from patches.drift.uses import seams_of_annotations, seams_of_chains, seams_of_imports

ROOT = Path(__file__).resolve().parents[2]
OURS = "sink_vllm"
USERS = ("tests", "benchmarks", "examples")
"""Their imports must go on working, too."""


def our_files() -> dict[str, bytes]:
    """The project's own source, by path in the repository."""
    return {
        str(path.relative_to(ROOT)): path.read_bytes()
        for package in (OURS, *USERS)
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def seams_of(ours: Mapping[str, bytes], vllm: Mapping[str, bytes]) -> list[Seam]:
    """Everything ``ours`` stands on, as ``vllm`` has it: the release the project is made for."""
    tree = Tree({**vllm, **ours})
    return _once(merged([*seams_of_patches(tree), *seams_of_code(tree)]))


def seams_of_code(tree: Tree) -> list[Seam]:
    """All but the targets of patches, which are strings; a seam per place."""
    seams = [*seams_of_classes(tree, OURS)]
    for module in tree.modules(OURS):
        names = Names(tree, module)
        seams += seams_of_imports(names)
        seams += seams_of_chains(names)
        seams += seams_of_annotations(names)
        seams += seams_of_swaps(names)
    for package in USERS:
        for module in tree.modules(package):
            names = Names(tree, module)
            seams += seams_of_imports(names)
            if package == "tests":
                seams += seams_of_guards(names)
    return [*seams, *_guessed(tree, seams)]


def _once(seams: list[Seam]) -> list[Seam]:
    """A method that is overridden or patched is used, too: by ``super()``, or by the wrapper."""
    whole = {seam.symbol for seam in seams if seam.kind in (Kind.PATCH, Kind.OVERRIDE)}
    used = (Kind.PRIVATE, Kind.PUBLIC)
    return [seam for seam in seams if seam.kind not in used or seam.symbol not in whole]


def _guessed(tree: Tree, known: list[Seam]) -> list[Seam]:
    """Attributes of objects whose class the text does not tell."""
    close = {
        found.module.name
        for seam in known
        if seam.kind in (Kind.IMPORT, Kind.PATCH, Kind.OVERRIDE)
        and any(place.file.startswith(OURS) for place in seam.places)
        and (found := tree.find(*seam.symbol)) is not None
    }
    certain = {
        (seam.symbol.path[-1], place)
        for seam in known
        if seam.kind in (Kind.PRIVATE, Kind.SET, Kind.OVERRIDE)
        for place in seam.places
    }
    modules = list(tree.modules(OURS))
    written = itertools.chain.from_iterable(map(attributes_set, modules))
    return [
        *seams_of_guesses(
            tree,
            Kind.PRIVATE,
            [use for use in private_uses(modules) if (use.name, use.place) not in certain],
            close,
        ),
        *seams_of_guesses(
            tree,
            Kind.SET,
            [use for use in written if (use.name, use.place) not in certain],
            close,
        ),
    ]


def foreign_names(ours: Mapping[str, bytes], seams: list[Seam]) -> set[str]:
    """Private attributes that neither our code nor vLLM binds: those of other libraries."""
    known = {seam.symbol.path[-1] for seam in seams if seam.symbol.path}
    return {use.name for use in private_uses(Tree(ours).modules(OURS))} - known
