"""`sink-vllm probe` says by its exit code whether a server makes progress."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from sink_vllm.server.metrics import GAUGES, NAMESPACE
from sink_vllm.tools.main import main


@contextmanager
def answering(text: bytes) -> Iterator[str]:
    """The address of something that answers ``/metrics``."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("localhost", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://localhost:{server.server_port}"
        finally:
            server.shutdown()


def metrics(*steps: int) -> bytes:
    """As a server with so many engines writes them."""
    registry = CollectorRegistry()
    name, documentation = GAUGES["steps_stalled"]
    labels = ["model_name", "engine"]
    gauge = Gauge(NAMESPACE + name, documentation, labelnames=labels, registry=registry)
    for engine, value in enumerate(steps):
        gauge.labels("m", str(engine)).set(value)
    return generate_latest(registry)


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        (metrics(0), 0, "ok"),
        (metrics(100, 2), 0, "ok"),
        (metrics(0, 101), 1, "has run nothing for 101 steps although requests wait"),
        (metrics(), 1, "reports no sink_vllm:stalled_steps; start it with --kv-policy sink"),
    ],
    ids=["idle", "busy", "stalled", "without the policy"],
)
def test_exit_code_and_sentence(
    text: bytes, code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with answering(text) as url:
        assert main(["probe", "--url", url]) == code
    said = capsys.readouterr()
    assert says in (said.err if code else said.out)


def test_a_server_that_is_gone(capsys: pytest.CaptureFixture[str]) -> None:
    with answering(b"") as url:
        pass

    assert main(["probe", "--url", url]) == 1
    assert "does not answer" in capsys.readouterr().err
