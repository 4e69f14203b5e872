"""The entry point ``sink_vllm`` of group ``vllm.general_plugins``.

vLLM calls :func:`register` once in every process: API servers, engine cores, workers. It changes
nothing that a user without ``--kv-policy sink`` can observe, apart from the new flags.
"""

import re
from importlib.metadata import requires

DISTRIBUTION = "sink-vllm"


def supported_versions() -> str:
    """The vLLM versions this release was made for, such as ``"<0.33,>=0.32"``.

    Read from the requirement on ``vllm`` in this distribution's metadata (pyproject.toml), so
    that installing and running cannot disagree.
    """
    for requirement in requires(DISTRIBUTION) or ():
        match = re.match(r"vllm\s*([<>=!~][^;]*)", requirement)
        if match:
            return match[1].strip()
    raise RuntimeError(
        f"The metadata of {DISTRIBUTION} name no vLLM versions; install {DISTRIBUTION} again."
    )


def check_vllm_version(found: str) -> None:
    """Refuse a vLLM whose internals this release was not made for.

    Raises:
        RuntimeError: ``found`` is outside the supported versions.
    """
    from packaging.specifiers import SpecifierSet

    supported = supported_versions()
    if not SpecifierSet(supported).contains(found, prereleases=True):
        raise RuntimeError(
            f"sink_vllm supports vLLM {supported}, found vLLM {found}; install a supported vLLM, "
            f"or uninstall {DISTRIBUTION} (or leave it out of VLLM_PLUGINS) to run without it."
        )


def register() -> None:
    """Check vLLM's version, apply the patches, register KV cache spec and models. Idempotent.

    Raises:
        RuntimeError: wrong vLLM version, or a patched symbol is missing.
    """
    # Inside the function: vLLM only logs what fails while it *imports* a plugin, and the
    # scheduler's tests import this package without vLLM's weight.
    from vllm import __version__ as vllm_version

    check_vllm_version(vllm_version)

    from sink_vllm.patches_declared import start_up_patches

    for patch in start_up_patches():
        patch.apply()

    from sink_vllm import models
    from sink_vllm.scheduler import spec

    models.register()
    spec.register()
