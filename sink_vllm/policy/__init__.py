"""The policy itself: options, schedule, plan, report. Pure Python, without torch and vLLM."""
