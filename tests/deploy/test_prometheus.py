"""A real Prometheus beside a server with 16 streams has data for every panel, and every rule works.

What is about something wrong has a value of zero then, or none: ``QUIET`` says why.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import ModelFactory
from tests.support.monitoring import dashboard_queries, metrics_in, rules
from tests.support.prometheus import PROGRAM, Prometheus, watching
from tests.support.serving import CAPACITY, MODEL, Client, prompt_of, tiny_server
from tests.support.tiny_models import TinyLlama

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(PROGRAM is None, reason="prometheus (Debian) is not installed"),
]

STREAMS = 16
QUIET = {
    "sum(rate(sink_vllm:reanchorings_total": "keys are rotated back after a million tokens",
    "sum(rate(vllm:num_preemptions_total": "pages are not short",
}
"""Queries (their beginnings) whose value is 0 while nothing is wrong."""


def talk(client: Client) -> None:
    """Streams that evict, a stored one that is resumed, a chat that is resent, and a refusal."""
    with ThreadPoolExecutor(STREAMS) as pool:
        salts = range(7, 7 + 2 * STREAMS, 2)
        answers = list(
            pool.map(
                lambda salt: client.complete(prompt=prompt_of(40, salt), max_tokens=3 * CAPACITY),
                salts,
            )
        )
    assert all(answer["kv_transfer_params"]["streaming_llm"]["evictions"] for answer in answers)
    history = prompt_of(2 * CAPACITY)
    for more in (0, 20, 40):
        client.complete(prompt=[*history, *prompt_of(60)[1 : 1 + more]], max_tokens=8)
    created = client.http.post("/v1/streams", json={"model": MODEL})
    assert created.status_code == 201, created.text
    for _ in range(3):
        body = {"tokens": prompt_of(CAPACITY), "generate": {"max_tokens": 8}}
        answer = client.http.post(f"/v1/streams/{created.json()['id']}/append", json=body)
        assert answer.status_code == 200, answer.text
    assert client.http.post("/v1/streams/none/append", json=body).status_code == 404


@pytest.fixture(scope="module")
def watched(
    tiny_llama: ModelFactory, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """Prometheus with some seconds of a busy server; the last one while 16 streams run."""
    folder: Path = tiny_llama(TinyLlama())
    more = ("--max-num-seqs", str(STREAMS), "--enable-prompt-tokens-details")
    with tiny_server(folder, *more, environment={"VLLM_PLUGINS": "sink_vllm"}) as server:
        server.wait(lambda _: None)
        target = server.url.removeprefix("http://")
        with watching(target, tmp_path_factory.mktemp("prometheus")) as prometheus:
            client = Client(server)
            talk(client)
            prometheus.wait_for("sink_vllm:refused_appends:rate5m")
            talk(client)  # what was new is older than one reading now
            prometheus.wait_for("sink_vllm:resumed_tokens:ratio15m > 0")
            yield prometheus


def test_every_panel_has_data(watched: Prometheus) -> None:
    for query in dashboard_queries():
        values = watched.values(query)
        assert values, query
        if any(query.startswith(start) for start in QUIET):
            assert values == [0], query


def test_numbers_of_the_panels_are_those_of_the_streams(watched: Prometheus) -> None:
    """Reach: all streams evicted, and some text was resumed."""
    assert watched.values("sum(sink_vllm:streams_evicted_total)")[0] >= 2 * STREAMS
    assert watched.values("sum(rate(sink_vllm:evicted_tokens_total[5m]))")[0] > 0
    assert watched.values("sum(sink_vllm:resumed_streams_total)")[0] > 0
    assert watched.values("sink_vllm:resumed_tokens:ratio15m")[0] > 0
    assert watched.values("sink_vllm:refused_appends:rate5m")[0] >= 0


def test_every_rule_is_evaluated_and_no_alert_goes_off(watched: Prometheus) -> None:
    """An alert asks for what is there: each of its metrics has a series."""
    evaluated = watched.rules()

    for rule in rules():
        name = rule.get("record") or rule["alert"]
        assert evaluated[name]["health"] == "ok", evaluated[name]
        for metric in metrics_in(rule["expr"]):
            assert watched.values(f"count({metric})"), f"{name}: {metric}"
        if "record" in rule:
            assert watched.values(name), name
        else:
            assert evaluated[name]["state"] == "inactive", evaluated[name]
