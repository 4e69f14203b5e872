"""From the wheel alone, doctor, plan, serve, stream and stop say what the docs show."""

import shutil
from pathlib import Path

import pytest

from tests.support import transcript


@pytest.mark.server
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_transcript_is_what_happens(installed: Path, tmp_path: Path) -> None:
    """If it changes for a reason: ``python -m tests.support.transcript > docs/transcript.md``."""
    page = transcript.page(installed, tmp_path)

    assert '"evictions":24' in page  # reach: most of the stream is gone
    assert page == transcript.PAGE.read_text()
