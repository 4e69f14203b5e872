"""Refuses at start-up what ``--kv-policy sink`` is not known to work with.

The table is in :mod:`sink_vllm.gate.refusals`, the reading of vLLM's configuration in
:mod:`sink_vllm.gate.facts`. ``python -m sink_vllm.gate`` prints the table as Markdown.
"""

from sink_vllm.gate.facts import Facts
from sink_vllm.gate.refusals import REFUSALS
from sink_vllm.gate.refused import Refused


def reason(facts: Facts) -> str | None:
    """Why ``facts`` are refused: the first row that applies; ``None`` when none does."""
    return next(filter(None, (row.reason(facts) for row in REFUSALS)), None)


def check(facts: Facts) -> None:
    """Refuse ``facts`` that the policy does not work with.

    Raises:
        Refused: one sentence with option, value, rule and way out.
    """
    refused = reason(facts)
    if refused is not None:
        raise Refused(refused)


def markdown() -> str:
    """The table for the documentation."""
    lines = ["| Refused | | Because | Way out |", "|---|---|---|---|"]
    lines += [
        f"| {row.what} | {'cannot work' if row.final else 'not yet'} | {row.why} | {row.way_out} |"
        for row in REFUSALS
    ]
    return "\n".join(lines)
