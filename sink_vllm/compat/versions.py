"""Which vLLM this release was made for: one statement, in pyproject.toml. Imports no vLLM."""

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
