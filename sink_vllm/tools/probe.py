"""``sink-vllm probe``: a liveness probe that sees a scheduler that hangs. Imports no vLLM.

vLLM's ``/health`` says that the engine's process is alive, which it also is when it runs steps in
which nothing is scheduled although requests wait. The scheduler counts those
(``sink_vllm:stalled_steps``). A step that never ends is not seen here, as it reports nothing; the
alert ``SinkVLLMNothingGenerated`` sees that.
"""

import re
import urllib.request

_STALLED = re.compile(r"^sink_vllm:stalled_steps\{[^}]*\} (\S+)$", re.MULTILINE)


def complaint(url: str, most: int, timeout: float) -> str | None:
    """What is wrong with a server, in one sentence; ``None`` if nothing is.

    Args:
        url: of the server.
        most: stalled steps in a row that are in order; one or two are ordinary.
        timeout: seconds to wait for an answer.
    """
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/metrics", timeout=timeout) as answer:
            text = answer.read().decode()
    except (OSError, ValueError) as error:  # ValueError: no such kind of address
        return f"{url} does not answer: {error}."
    steps = [float(value) for value in _STALLED.findall(text)]
    if not steps:
        return (
            f"{url} reports no sink_vllm:stalled_steps; start it with --kv-policy sink and without "
            f"--disable-log-stats."
        )
    if max(steps) > most:
        return f"{url} has run nothing for {max(steps):.0f} steps although requests wait."
    return None
