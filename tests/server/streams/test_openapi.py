"""The schema of ``/v1/streams`` is valid, complete, and says what the routes take and answer."""

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from jsonschema import Draft202012Validator

from sink_vllm.server.streams.bodies import Answer, Appended, AppendUsage, StreamInfo
from sink_vllm.server.streams.routes import StreamsPlugin


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    app = FastAPI(title="streams", version="1")
    StreamsPlugin().attach_router(app)
    found: dict[str, Any] = app.openapi()
    return found


def _operations(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            yield f"{method} {path}", operation


def _nodes(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
        for value in node.values():
            yield from _nodes(value)
    elif isinstance(node, list):
        for value in node:
            yield from _nodes(value)


def _body(schema: dict[str, Any], name: str) -> Draft202012Validator:
    whole = {"$ref": f"#/components/schemas/{name}", "components": schema["components"]}
    return Draft202012Validator(whole)


def test_it_is_valid_openapi(schema: dict[str, Any]) -> None:
    validator = pytest.importorskip(
        "openapi_spec_validator", reason="pip install openapi-spec-validator checks it as a whole"
    )

    validator.validate(schema)


def test_every_body_is_a_schema_and_every_reference_leads_somewhere(
    schema: dict[str, Any],
) -> None:
    bodies = schema["components"]["schemas"]
    for name, body in bodies.items():
        Draft202012Validator.check_schema(body)
        assert body.get("description") or name.endswith(("Error", "Response", "ErrorInfo")), name
    references = {node["$ref"] for node in _nodes(schema) if "$ref" in node}

    assert references
    assert {one.removeprefix("#/components/schemas/") for one in references} <= set(bodies)


def test_every_route_says_what_it_does_takes_and_answers(schema: dict[str, Any]) -> None:
    operations = dict(_operations(schema))
    assert len({one["operationId"] for one in operations.values()}) == len(operations) == 5

    for name, operation in operations.items():
        assert operation["summary"], name
        assert operation["description"], name
        assert operation["tags"] == ["streams"], name
        for parameter in operation.get("parameters", ()):
            assert parameter.get("description"), (name, parameter["name"])
        for status, answer in operation["responses"].items():
            assert answer["description"], (name, status)
            assert answer["content"], (name, status)
        assert {"400", "401", "500", "501", "503"} <= set(operation["responses"]), name


def test_answers_that_may_be_tried_again_name_the_header(schema: dict[str, Any]) -> None:
    append = schema["paths"]["/v1/streams/{stream_id}/append"]["post"]["responses"]

    for status in ("409", "429"):
        assert set(append[status]["headers"]) == {"Retry-After"}


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("CreateStream", {"tokens": [1, 2], "priority": -1}, {"tokens": [-1]}),
        ("CreateStream", {"metadata": {"a": "b"}}, {"metadata": {"a": 1}}),
        ("CreateStream", {"sink_pin": "system", "system": "a"}, {"sink_pin": "all"}),
        ("Append", {"text": "a", "generate": {"max_tokens": 3}}, {"text": ""}),
        ("Append", {"messages": [{"role": "user", "content": "a"}]}, {"messages": []}),
        ("Generate", {"temperature": 0, "stop": ["a"]}, {"beams": 2}),
    ],
)
def test_requests_are_told_apart(
    schema: dict[str, Any], name: str, good: dict[str, Any], bad: dict[str, Any]
) -> None:
    validator = _body(schema, name)

    assert validator.is_valid(good)
    assert not validator.is_valid(bad)


def test_an_answer_is_what_the_schema_says(schema: dict[str, Any]) -> None:
    stream = StreamInfo(
        id="stream-0",
        model="m",
        created=1,
        age_seconds=1.0,
        idle_seconds=0.0,
        expires_in_seconds=9.0,
        busy=False,
        turn=None,
        turns=1,
        position=3,
        evicted=0,
        cached=3,
        evictions=0,
        sink_tokens=4,
        sink_window=92,
        capacity=128,
        pending_messages=0,
        metadata={},
        priority=0,
    )
    usage = AppendUsage(
        appended_tokens=1,
        generated_tokens=2,
        cached_tokens=0,
        computed_tokens=1,
        resumed_from="survivors",
    )
    answer = Answer(text="a", token_ids=[1, 2], finish_reason="length", usage=usage)
    account = Appended(**answer.model_dump(), stream=stream).model_dump(mode="json")
    validator = _body(schema, "Appended")

    assert list(validator.iter_errors(account)) == []
    del account["usage"]["resumed_from"]
    assert not validator.is_valid(account)
