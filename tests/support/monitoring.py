"""What the dashboard and the alert rules in ``deploy/monitoring`` ask for."""

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from tests.support.paths import ROOT

FOLDER = ROOT / "deploy" / "monitoring"
_METRIC = re.compile(r"\b(?:(?:sink_vllm|vllm):\w+(?::\w+)?|http_requests_total)\b")


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((FOLDER / "rules.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard_queries() -> list[str]:
    """Every query, with the variables of Grafana filled in."""
    board = json.loads((FOLDER / "dashboard.json").read_text())
    targets = (target for panel in board["panels"] for target in panel.get("targets", ()))
    return [
        target["expr"]
        .replace("$__rate_interval", "5m")
        .replace("$model", ".*")
        .replace("$instance", ".*")
        for target in targets
    ]


def metrics_in(expression: str) -> set[str]:
    """The metrics of a query, recorded ones included."""
    return set(_METRIC.findall(expression))


def metrics_named() -> set[str]:
    """The metrics that a server must have; what the rules record themselves is not among them."""
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    return set(_names()) - recorded


def _names() -> Iterator[str]:
    for text in (*(rule["expr"] for rule in rules()), *dashboard_queries()):
        yield from _METRIC.findall(text)
