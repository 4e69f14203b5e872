"""Dashboard and alert rules: Prometheus understands them, and they go off when they should.

That a server has every metric in them is in tests/server/streams/test_api.py, which has a server.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.monitoring import FOLDER, dashboard_queries, metrics_named, rules

PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool (Debian: prometheus) is not installed"
)


def promtool(*words: str | Path) -> None:
    assert PROMTOOL is not None
    ran = subprocess.run(
        [PROMTOOL, *words], capture_output=True, text=True, timeout=60, cwd=FOLDER, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@needs_promtool
def test_rules_are_valid() -> None:
    promtool("check", "rules", "rules.yaml")


@needs_promtool
def test_alerts_go_off_when_they_should_and_only_then() -> None:
    promtool("test", "rules", "rules_test.yaml")


@needs_promtool
def test_queries_of_the_dashboard_are_valid(tmp_path: Path) -> None:
    queries = dashboard_queries()
    assert len(queries) > 20
    named = [{"record": f"query_{i}", "expr": query} for i, query in enumerate(queries)]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": named}]}))

    promtool("check", "rules", file)


def test_every_alert_is_tested_and_says_what_to_do() -> None:
    alerts = {rule["alert"]: rule for rule in rules() if "alert" in rule}
    tested = (FOLDER / "rules_test.yaml").read_text()

    for name, rule in alerts.items():
        going_off = f"alertname: {name}\n        exp_alerts:\n          - exp_labels"
        assert going_off in tested, name
        assert rule["annotations"].keys() == {"summary", "action"}


def test_panels_say_what_they_show() -> None:
    board = json.loads((FOLDER / "dashboard.json").read_text())
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]

    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert all(panel["title"] and panel["targets"] for panel in panels)
    assert {"sink_vllm:stalled_steps", "vllm:kv_cache_usage_perc"} <= metrics_named()
