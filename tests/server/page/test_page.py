"""The page at ``/streams``, in a browser: what the server says of streams is what one sees."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from examples.serving import Server
from sink_vllm.server.page import routes
from tests.support.browser import Browser
from tests.support.serving import CAPACITY, SCHEDULE, prompt_of, tiny_server
from tests.support.tiny_models import TinyLlama

pytestmark = pytest.mark.server

KEY = "a-key"
CTRL = 2


@pytest.fixture(scope="module")
def server(tiny_llama: Callable[[TinyLlama], Path]) -> Iterator[Server]:
    model = tiny_llama(TinyLlama())
    environment = {"VLLM_PLUGINS": "sink_vllm"}
    with tiny_server(model, "--api-key", KEY, environment=environment) as server:
        server.wait(lambda _seconds: None)
        yield server


@pytest.fixture(scope="module")
def api(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(
        base_url=server.url, timeout=300, headers={"Authorization": f"Bearer {KEY}"}
    ) as client:
        yield client


@pytest.fixture
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser
        assert browser.errors == []


@pytest.fixture
def page(server: Server, browser: Browser) -> Browser:
    """The page as somebody sees it who has come with a key."""
    browser.open(f"{server.url}/streams#key={KEY}")
    browser.wait("document.querySelector('#connection').textContent !== ''")
    return browser


def create(api: httpx.Client, **body: Any) -> str:
    answer = api.post("/v1/streams", json=body)
    assert answer.status_code == 201, answer.text
    stream_id: str = answer.json()["id"]
    return stream_id


def append(api: httpx.Client, stream_id: str, max_tokens: int, **body: Any) -> None:
    generate = {"temperature": 0, "ignore_eos": True, "max_tokens": max_tokens}
    answer = api.post(f"/v1/streams/{stream_id}/append", json={"generate": generate, **body})
    assert answer.status_code == 200, answer.text


def row(browser: Browser, stream_id: str) -> list[str]:
    """The cells of a stream in the list."""
    cells: list[str] = browser.run(
        f"[...(document.querySelector('tr[data-id=\"{stream_id}\"]')?.cells ?? [])]"
        ".map((cell) => cell.innerText)"
    )
    return cells


def choose(browser: Browser, stream_id: str) -> None:
    """As by clicking on a stream of the list."""
    button = f"document.querySelector('tr[data-id=\"{stream_id}\"] button')"
    browser.wait(button + " !== null")
    browser.run(button + ".click()")
    browser.wait("!document.querySelector('#stream').hidden")


def widths(browser: Browser) -> dict[str, float]:
    """Of the parts of the bar, as shares of it, after they have stopped moving."""
    found: dict[str, float] = browser.run(
        "new Promise((done) => setTimeout(done, 400)).then(() => Object.fromEntries("
        "[...document.querySelectorAll('#cache span')].map((part) => [part.className.split(' ')[0],"
        "part.offsetWidth / document.querySelector('#cache').clientWidth])))"
    )
    return found


def test_the_files_are_sent_with_a_strict_policy(server: Server) -> None:
    """To everybody, with no style or script in the page itself; the API behind it wants the key."""
    scripts = sorted(file.name for file in Path(routes.__file__).parent.glob("*.js"))
    assert "page.js" in scripts
    for path, media_type in {
        "/streams": "text/html",
        "/streams/page.css": "text/css",
        **{f"/streams/{name}": "text/javascript" for name in scripts},
    }.items():
        answer = httpx.get(f"{server.url}{path}")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(media_type)
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        assert "http" not in re.sub(r"https?://www\.w3\.org", "", answer.text), "asks elsewhere"
    assert httpx.get(f"{server.url}/v1/streams").status_code == 401


def test_the_key_is_asked_for_and_the_list_is_live(
    server: Server, browser: Browser, api: httpx.Client
) -> None:
    """A wrong key is said to be one; then streams come, change and go as they do in the API."""
    browser.open(f"{server.url}/streams")
    browser.wait("!document.querySelector('#keys').hidden")
    for key in ("wrong", KEY):
        browser.run("document.querySelector('#key').focus()")
        browser.type(key)
        browser.key("Enter", "\r")
        if key == "wrong":
            browser.wait("document.querySelector('#error').innerText.includes('this key')")
    browser.wait("document.querySelector('#keys').hidden")
    assert browser.text("#error") == ""

    stream_id = create(api, metadata={"name": "<img src=x onerror=alert(1)>"})
    browser.wait(f"document.querySelector('tr[data-id=\"{stream_id}\"]') !== null")
    append(api, stream_id, 50, tokens=prompt_of(300))
    browser.wait(f"document.querySelector('tr[data-id=\"{stream_id}\"]').innerText.includes('350')")
    stream = api.get(f"/v1/streams/{stream_id}").json()
    assert stream["evicted"] == SCHEDULE.evicted(349) > 0
    assert row(browser, stream_id) == [
        "<img src=x onerror=alert(1)>",
        "350",
        f"{stream['evicted']}",
        f"{stream['cached']}",
        "–",
    ]
    assert api.delete(f"/v1/streams/{stream_id}").status_code == 200
    browser.wait(f"document.querySelector('tr[data-id=\"{stream_id}\"]') === null")
    # Refused keys are answers that a browser logs.
    assert all("401" in error for error in browser.errors), browser.errors
    browser.errors.clear()


@contextmanager
def generating(api: httpx.Client, stream_id: str) -> Iterator[None]:
    """Through a turn that ends with the block, however fast the machine is."""
    over = threading.Event()
    generate = {"temperature": 0, "ignore_eos": True, "max_tokens": 1_000_000}
    body = {"text": "abc", "stream": True, "generate": generate}

    def read() -> None:
        with api.stream("POST", f"/v1/streams/{stream_id}/append", json=body) as answer:
            for _ in answer.iter_lines():
                if over.is_set():
                    return

    turn = threading.Thread(target=read)
    turn.start()
    try:
        yield
    finally:
        over.set()
        turn.join()


def test_a_stream_is_seen_to_evict_while_it_generates(page: Browser, api: httpx.Client) -> None:
    """Its numbers and its bar move in the middle of a turn, and end where the API says."""
    stream_id = create(api)
    choose(page, stream_id)
    evictions = "Number(document.querySelector('#cache').dataset.evicted)"
    seen = 0
    with generating(api, stream_id):
        for _ in range(4):
            found = page.wait(
                "(() => { const bar = document.querySelector('#cache').dataset;"
                f"return Number(bar.evicted) > {seen} && [bar.evicted, bar.position] }})()"
            )
            seen, position = map(int, found)
            assert seen == SCHEDULE.evicted(position - 1)
            assert position - seen <= CAPACITY + 1
        cells = row(page, stream_id)
        assert api.get(f"/v1/streams/{stream_id}").json()["busy"], "seen only when it was over"
        page.wait(f"{evictions} > {seen + SCHEDULE.stride}")
    assert re.fullmatch(r"[\d,]+|…|computing", cells[4]), cells
    page.wait(f"document.querySelector('tr[data-id=\"{stream_id}\"]').cells[4].innerText === '–'")
    stream = api.get(f"/v1/streams/{stream_id}").json()
    page.wait(f"document.querySelector('#cache').dataset.position === '{stream['position']}'")

    assert not stream["busy"]
    assert stream["position"] > position
    assert seen < stream["evicted"]
    assert f"Evicted last: tokens {stream['evicted'] - 32 + 4:,}" in page.text("#cache-text")
    shares, cached = widths(page), stream["cached"]
    whole = CAPACITY + SCHEDULE.stride
    for part, tokens in {
        "sinks": 4,
        "evicted": SCHEDULE.stride,
        "window": cached - 4,
        "free": CAPACITY - cached,
    }.items():
        assert shares[part] == pytest.approx(tokens / whole, abs=0.01), part
    api.delete(f"/v1/streams/{stream_id}")


def test_a_stream_is_made_and_appended_to_with_the_keyboard_alone(
    page: Browser, server: Server, api: httpx.Client
) -> None:
    """Tab and Enter reach everything; an answer goes past the capacity, and one is stopped."""

    def tab_to(element: str) -> None:
        for _ in range(30):
            page.key("Tab")
            if page.run(f"document.activeElement.matches({json.dumps(element)})"):
                return
        raise AssertionError(f"the keyboard does not reach {element}")

    tab_to("summary")
    page.key("Enter", "\r")
    tab_to("#new-form button")
    page.key("Enter", "\r")
    page.wait("document.activeElement.id === 'content'")
    (stream,) = api.get("/v1/streams").json()["data"]
    page.type("Tell me everything.")
    tab_to("#most")
    page.run("document.activeElement.select()")
    page.type("300")
    tab_to("#ignore-end")
    page.key(" ", " ")
    tab_to("#send")
    page.key("Enter", "\r")
    page.wait("document.querySelector('#turn').innerText.includes('300 generated (length)')")

    stream = api.get(f"/v1/streams/{stream['id']}").json()
    assert stream["evicted"] > 0
    assert f"{stream['evicted']} of the stream's {stream['position']}" in page.text("#turn")
    assert page.text("#said .you pre") == "Tell me everything."
    assert len(page.run("document.querySelector('#said .model pre').textContent")) > 200
    assert row(page, stream["id"])[1:4] == [
        f"{stream[name]}" for name in ("position", "evicted", "cached")
    ]

    # Without content it goes on; Ctrl+Enter sends, and Stop keeps what has arrived.
    page.run("document.querySelector('#most').value = 100000")
    page.run("document.querySelector('#content').focus()")
    page.key("Enter", "\r", CTRL)
    page.wait("document.querySelectorAll('#said .model')[1]?.textContent.length > 100")
    page.run("document.querySelector('#stop').click()")
    page.wait("document.querySelector('#turn').innerText.startsWith('Stopped')")
    page.wait("!document.querySelector('#send').disabled")
    after = api.get(f"/v1/streams/{stream['id']}").json()
    assert stream["position"] < after["position"] < 100_000

    page.run("document.querySelector('#forget').click()")
    page.wait("document.querySelector('#stream').hidden")
    assert api.get("/v1/streams").json()["data"] == []
    assert all(url.startswith((server.url, "data:")) for url in page.requested), page.requested


def test_what_a_screen_reader_is_told(page: Browser, api: httpx.Client) -> None:
    """Everything one can use has a name, the bar is a picture with a text, and text that arrives
    is not read out token by token."""
    stream_id = create(api)
    append(api, stream_id, 20, tokens=prompt_of(300))
    page.run("document.querySelector('#making').open = true")
    choose(page, stream_id)
    told = page.accessible()
    usable = [
        (role, name)
        for role, name in told
        if role in ("button", "textbox", "checkbox", "radio", "spinbutton")
    ]

    assert {role for role, _ in usable} == {"button", "textbox", "checkbox", "radio", "spinbutton"}
    assert all(name for _, name in usable), usable
    (bar,) = [name for role, name in told if role == "image" and name.startswith("The cache")]
    assert "4 sink tokens" in bar
    assert "Evicted last" in bar
    assert ("heading", "All streams") in told
    live = "[role=status], [role=alert], [role=log], [aria-live]"
    assert page.run(f"document.querySelector('#said').closest('{live}') === null")
    assert page.run(f"document.querySelector('#said').querySelector('{live}') === null")
    api.delete(f"/v1/streams/{stream_id}")


CONTRAST = """
(() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = parts(colour).slice(0, 3).map((c) => c / 255)
      .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (parts(colour)[3] !== 0) return colour;
    }
  };
  const texts = "h1,h2,h3,p,th,td,label,legend,button,summary,input,textarea";
  return [...document.querySelectorAll(texts)]
    .filter((element) => element.checkVisibility() && !element.disabled)
    .map((element) => {
      const [a, b] = [light(getComputedStyle(element).color), light(behind(element))];
      return [element.outerHTML.slice(0, 60), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
    });
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_in_both_schemes_and_on_a_phone(
    page: Browser, api: httpx.Client, scheme: str
) -> None:
    """Text stands out from what is behind it (WCAG AA), and nothing is wider than the screen."""
    stream_id = create(api)
    page.prefer(prefers_color_scheme=scheme)
    page.run("document.querySelector('#making').open = true")
    choose(page, stream_id)
    dark = page.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    assert dark == (scheme == "dark")

    contrasts = page.run(CONTRAST)
    assert len(contrasts) > 20
    assert [one for one in contrasts if one[1] < 4.5] == []
    page.resize(360, 700)
    assert page.run("document.documentElement.scrollWidth") <= 360
    api.delete(f"/v1/streams/{stream_id}")


@pytest.mark.slow
def test_a_server_without_keys_lists_what_was_opened_here(
    tiny_llama: Callable[[TinyLlama], Path], browser: Browser
) -> None:
    """It lists no streams, and the page says so; a stream is opened by its id."""
    model = tiny_llama(TinyLlama())
    with tiny_server(model, environment={"VLLM_PLUGINS": "sink_vllm"}) as server:
        server.wait(lambda _seconds: None)
        with httpx.Client(base_url=server.url, timeout=300) as api:
            ids = [create(api), create(api)]
            append(api, ids[1], 5, tokens=prompt_of(300))
        browser.open(f"{server.url}/streams")
        browser.wait("document.querySelector('#list-note').innerText.includes('lists no streams')")
        assert browser.text("#keys") == ""
        browser.run("document.querySelector('#making').open = true")
        browser.run("document.querySelector('#open-id').focus()")
        browser.type(ids[1])
        browser.key("Enter", "\r")
        browser.wait("!document.querySelector('#stream').hidden")
        browser.wait(f"document.querySelector('tr[data-id=\"{ids[1]}\"]') !== null")
        assert row(browser, ids[1])[1] == "305"
        assert row(browser, ids[0]) == []
    # The refusal to list is an answer that a browser logs, and so is a server that has ended.
    assert all("403" in error or "REFUSED" in error for error in browser.errors), browser.errors
    browser.errors.clear()
