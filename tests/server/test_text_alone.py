"""`vllm serve --language-model-only` of a multimodal checkpoint: chats without end, no images."""

import base64
import dataclasses
import io
from collections.abc import Iterator

import pytest
from PIL import Image

from tests.support.families_media import MEDIA
from tests.support.family import Family, write_family
from tests.support.serving import CAPACITY, SCHEDULE, Client, evicted, report, tiny_server

pytestmark = pytest.mark.server

CHAT = "/v1/chat/completions"
TURNS, ANSWER = 6, 60


def with_positions(family: Family, count: int) -> Family:
    return dataclasses.replace(
        family, settings=family.settings | {"max_position_embeddings": count}
    )


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    family = next(family for family in MEDIA if family.name == "Qwen3-VL")
    model = write_family(tmp_path_factory.mktemp("qwen"), with_positions(family, CAPACITY))
    flags = ("--language-model-only", "--enable-prompt-tokens-details")
    with tiny_server(model, *flags) as server:
        server.wait(lambda _waited: None)
        yield Client(server)


def picture() -> str:
    file = io.BytesIO()
    Image.new("RGB", (56, 56), "red").save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def test_a_resent_chat_goes_on_past_the_capacity(client: Client) -> None:
    """Every turn is resumed from the cache, and metrics count what answers report."""
    messages = [{"role": "user", "content": "tell me everything"}]
    new: list[int] = []  # tokens that a turn evicted, and the turns before had not
    for _ in range(TURNS):
        answer = client.ask(CHAT, messages=messages, max_tokens=ANSWER)
        usage, told = answer["usage"], report(answer)
        assert usage["completion_tokens"] == ANSWER
        so_far = evicted(usage["prompt_tokens"], ANSWER)
        assert (told or {"evicted_tokens": 0})["evicted_tokens"] == so_far
        cached = (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0)
        # A stream is resumed behind the eviction that its next token needs.
        new.append(so_far - SCHEDULE.evicted(cached + 1))
        messages.append(answer["choices"][0]["message"] | {"role": "assistant"})
        messages.append({"role": "user", "content": "and then?"})

    assert usage["prompt_tokens"] > 3 * CAPACITY
    assert cached > 2 * CAPACITY  # pages of the turns before, far behind the first eviction
    client.wait_idle()
    assert client.counter("sink_vllm:evicted_tokens_total") == sum(new) > 0
    assert client.counter("sink_vllm:evictions_total") == sum(new) / SCHEDULE.stride


@pytest.mark.parametrize("turns", [0, 8], ids=["short", "past the capacity"])
def test_an_image_is_a_bad_request(client: Client, turns: int) -> None:
    """In vLLM's words, wherever in the history it is; the server goes on."""
    said = [{"role": "user", "content": "words " * 20}] * turns
    image = {"type": "image_url", "image_url": {"url": picture()}}
    question = {"role": "user", "content": [{"type": "text", "text": "what is this?"}, image]}

    for messages in ([*said, question], [question, *said]):
        answer = client.post(CHAT, messages=messages, max_tokens=5)

        assert answer.status_code == 400, answer.text
        assert "image" in answer.json()["error"]["message"]
    client.wait_idle()
    assert client.ask(CHAT, messages=[*said, {"role": "user", "content": "hello"}], max_tokens=5)
