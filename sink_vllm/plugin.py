"""The entry point ``sink_vllm`` of group ``vllm.general_plugins``.

vLLM calls :func:`register` once in every process: API servers, engine cores, workers. It changes
nothing that a user without ``--kv-policy sink`` can observe, apart from the new flags. Beside a
vLLM it was not made for it does not even that: it warns, and refuses the policy (see
``sink_vllm.compat.unsupported``).
"""

import logging
import os

from wrapt import register_post_import_hook

from sink_vllm.compat.versions import DISTRIBUTION, is_supported, supported_versions

_WARNED = "SINK_VLLM_WARNED"
"""Environment variable: the warning has been given in this tree of processes."""


def register() -> None:
    """See to the patches, register KV cache spec and models. Idempotent.

    A patch is applied when its module is imported, which fails if the patched symbol is missing.
    Beside another vLLM: warn once, and see to it that the policy is refused.

    Raises:
        RuntimeError: a symbol to patch is missing in a module that has been imported already.
    """
    # Inside the function: vLLM only logs what fails while it *imports* a plugin, and the
    # scheduler's tests import this package without vLLM's weight.
    from vllm import __version__ as vllm_version

    if not is_supported(vllm_version):
        _stand_aside(vllm_version)
        return

    from sink_vllm.compat.changes import start_up_patches

    for patch in start_up_patches():
        patch.apply_on_import()

    from sink_vllm import models
    from sink_vllm.engine import managers

    models.register()
    # Not before: a process that inspects a model, for one, would load all that serves its pages.
    register_post_import_hook(lambda _module: managers.register(), managers.OF_VLLM)


def _stand_aside(found: str) -> None:
    from sink_vllm.compat import unsupported

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
