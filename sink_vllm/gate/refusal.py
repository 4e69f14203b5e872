"""One row of the table of what ``--kv-policy sink`` refuses. Imports neither torch nor vLLM."""

from collections.abc import Callable
from dataclasses import dataclass

from sink_vllm.gate.facts import Facts

OTHER_MODEL = "serve this model with --kv-policy full"


@dataclass(frozen=True, slots=True)
class Refusal:
    """One row of the table."""

    name: str
    what: str
    found: Callable[[Facts], object]
    """The value that was found when the row applies; ``None``, ``False`` or ``0`` otherwise."""
    why: str
    way_out: str
    final: bool = False
    """Whether the method itself does not apply; otherwise sink_vllm cannot do it *yet*."""

    def reason(self, facts: Facts) -> str | None:
        """One sentence with option, value, rule and way out, when the row applies."""
        found = self.found(facts)
        if not found:
            return None
        verb, when = ("cannot work with", "") if self.final else ("does not work with", " yet")
        return f"--kv-policy sink {verb} {self.what}{when} ({found}): {self.why}; {self.way_out}."


def when(applies: bool, value: object) -> object:
    """What a row says it has found: ``value``, or nothing."""
    return value if applies else None
