"""Where the tests find the project's own files."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
MODEL = ROOT / "examples" / "models" / "pystream-2.5m"
"""The repository's trained model, with tokenizer and chat template."""
