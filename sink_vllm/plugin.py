"""The entry point ``sink_vllm`` of group ``vllm.general_plugins``.

vLLM calls :func:`register` once in every process: API servers, engine cores, workers. It changes
nothing that a user without ``--kv-policy sink`` can observe, apart from the new flags. Beside a
vLLM it was not made for it does not even that: it warns, and refuses the policy (see
``sink_vllm.frontend.unsupported``).
"""

import logging
import os
import re
from importlib.metadata import requires

DISTRIBUTION = "sink-vllm"
_WARNED = "SINK_VLLM_WARNED"
"""Environment variable: the warning has been given in this tree of processes."""


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


def is_supported(found: str) -> bool:
    """Whether this release was made for the internals of vLLM ``found``."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion

    try:
        return SpecifierSet(supported_versions()).contains(found, prereleases=True)
    except InvalidVersion:  # "dev": a build that does not know what it is
        return False


def refusal_of(found: str) -> str:
    """Why ``--kv-policy sink`` cannot run in vLLM ``found``, and what to do."""
    return (
        f"--kv-policy sink needs vLLM {supported_versions()}, found vLLM {found}; install a vLLM "
        f"that this sink_vllm supports, or a sink_vllm that supports this vLLM."
    )


def register() -> None:
    """Apply the patches, register KV cache spec and models. Idempotent.

    Beside another vLLM: warn once, and see to it that the policy is refused.

    Raises:
        RuntimeError: a patched symbol is missing.
    """
    # Inside the function: vLLM only logs what fails while it *imports* a plugin, and the
    # scheduler's tests import this package without vLLM's weight.
    from vllm import __version__ as vllm_version

    if not is_supported(vllm_version):
        _stand_aside(vllm_version)
        return

    from sink_vllm.patches_declared import start_up_patches

    for patch in start_up_patches():
        patch.apply()

    from sink_vllm import models
    from sink_vllm.scheduler import spec

    models.register()
    spec.register()


def _stand_aside(found: str) -> None:
    from sink_vllm.frontend import unsupported

    unsupported.refuse_the_policy()
    if os.environ.get(_WARNED) != found:
        os.environ[_WARNED] = found  # for the processes that this one will start
        logging.getLogger("vllm.sink_vllm").warning(
            "sink_vllm supports vLLM %s, found vLLM %s: it stands aside, and --kv-policy sink is "
            "refused. Install a supported vLLM, or uninstall %s (or leave it out of VLLM_PLUGINS).",
            supported_versions(),
            found,
            DISTRIBUTION,
        )
