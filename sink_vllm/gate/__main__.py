"""``python -m sink_vllm.gate`` prints the table of refusals as Markdown."""

from sink_vllm.gate.check import markdown

if __name__ == "__main__":
    print(markdown())
