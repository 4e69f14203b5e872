"""What ``--kv-policy sink`` refuses: one table for the gate, its messages, the docs and the test.

Anything that is not known to work is refused before a model is loaded; nothing falls back
silently. The first row that applies is reported, so the rows go from the model's nature to
single settings. Imports neither torch nor vLLM.
"""

from sink_vllm.gate.refusal import Refusal
from sink_vllm.gate.refusals_of_models import OF_MODELS
from sink_vllm.gate.refusals_of_settings import OF_SETTINGS

REFUSALS: tuple[Refusal, ...] = (*OF_MODELS, *OF_SETTINGS)
