"""A path of an option that cannot be written ends the start with one sentence.

Tests may run as root, who may write everywhere but where no file system lets anybody: below /proc.
"""

import pytest

from tests.conftest import ModelFactory
from tests.support.serving import refused_start, tiny_server
from tests.support.tiny_models import TinyLlama

pytestmark = pytest.mark.server

PLUGINS = {"VLLM_PLUGINS": "sink_vllm"}
DATABASE, FOLDER = "/proc/streams.db", "/proc/pages"


@pytest.mark.parametrize(
    ("flags", "option", "way_out"),
    [
        (["--sink-streams-db", DATABASE], f"--sink-streams-db='{DATABASE}'", "; use another "),
        (
            ["--sink-host-gib", "0.05", "--sink-disk", FOLDER, "--sink-disk-gib", "1"],
            f"--sink-disk='{FOLDER}'",
            "; name a folder that this server may write to.",
        ),
    ],
    ids=["database", "pages"],
)
def test_a_read_only_path_ends_the_start(
    flags: list[str], option: str, way_out: str, tiny_llama: ModelFactory
) -> None:
    """The option, its value, why not, and the way out; before an engine loads."""
    last = refused_start(tiny_server(tiny_llama(TinyLlama()), *flags, environment=PLUGINS))

    assert last.startswith(f"vllm serve: error: {option} cannot be used")
    assert way_out in last
