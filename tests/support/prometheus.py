"""A real Prometheus beside a real server, every second, with the rules of ``deploy/``."""

import json
import math
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.support.monitoring import FOLDER

PROGRAM = shutil.which("prometheus")


class Prometheus:
    """Its HTTP API."""

    def __init__(self, url: str) -> None:
        self.url = url

    def _get(self, path: str, **words: str) -> Any:
        address = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(words)}"
        with urllib.request.urlopen(address, timeout=30) as answer:
            said = json.load(answer)
        assert said["status"] == "success", said
        return said["data"]

    def values(self, query: str) -> list[float]:
        """Of an instant query: numbers only, as a panel shows nothing for NaN."""
        found = [float(sample["value"][1]) for sample in self._get("query", query=query)["result"]]
        return [value for value in found if not math.isnan(value)]

    def rules(self) -> dict[str, dict[str, Any]]:
        """By name, as they were evaluated last."""
        groups = self._get("rules")["groups"]
        return {rule["name"]: rule for group in groups for rule in group["rules"]}

    def wait_for(self, query: str, limit: float = 120) -> None:
        """Until a query has a value.

        Raises:
            AssertionError: it has none after ``limit`` seconds.
        """
        deadline = time.monotonic() + limit
        while not self.values(query):
            assert time.monotonic() < deadline, query
            time.sleep(0.5)


@contextmanager
def watching(target: str, folder: Path) -> Iterator[Prometheus]:
    """Prometheus that scrapes ``target`` (host and port), until the block ends.

    Args:
        target: of the server.
        folder: for its data.
    """
    assert PROGRAM is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        own = f"127.0.0.1:{probe.getsockname()[1]}"
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(FOLDER / "rules.yaml")],
        "scrape_configs": [{"job_name": "vllm", "static_configs": [{"targets": [target]}]}],
    }
    file = folder / "prometheus.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [PROGRAM, f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address={own}"], stdout=log, stderr=subprocess.STDOUT
        )
        try:
            made = Prometheus(f"http://{own}")
            deadline = time.monotonic() + 60
            while True:
                assert process.poll() is None, (folder / "log").read_text()
                try:
                    if made.values("up") == [1]:
                        break
                except OSError:
                    pass  # it does not listen yet
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.2)
            yield made
        finally:
            process.terminate()
            process.wait(30)
