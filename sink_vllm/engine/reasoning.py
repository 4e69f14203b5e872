"""Whether the reasoning of a model ended in its prompt, decided while the whole prompt is there."""

from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager


def decide_reasoning(manager: StructuredOutputManager, request: Request) -> None:
    """Answer, for a request with a grammar, what vLLM would ask of the tokens it is shown.

    With a reasoning parser vLLM applies a grammar only behind the end of the reasoning, and looks
    for that end in the prompt when the first token is sampled. By then most of a long prompt has
    been evicted; a marker that went with it would leave the whole answer unconstrained.
    """
    structured = request.structured_output_request
    if structured is None or structured.reasoning_ended is not None or manager.enable_in_reasoning:
        return
    reasoner = manager._get_reasoner(request)
    if reasoner is not None:
        structured.reasoning_ended = reasoner.is_reasoning_end(request.prompt_token_ids or [])
