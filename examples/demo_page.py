"""`make demo ARGS="--open"`: the page at `/streams`, with a stream on it that generates.

The server checks a key made up for it, as it lists streams to those with a key only. The address
that is printed carries the key behind a `#`, which browsers do not send to servers.
"""

import os
import secrets
import sys
import threading
import time
import webbrowser
from collections.abc import Sequence

import httpx

from examples.serving import Server, for_few_processors


def page(arguments: Sequence[str], prompt: str, tokens: int) -> None:
    """Serve until Ctrl-C.

    Args:
        arguments: of `vllm serve`.
        prompt: the beginning of the stream.
        tokens: to generate behind it.
    """
    key = secrets.token_urlsafe(16)
    plugins = os.environ.get("VLLM_PLUGINS", "")
    environment = {
        "VLLM_PLUGINS": ",".join(filter(None, [plugins, "sink_vllm"])),
        "VLLM_API_KEY": key,
    } | for_few_processors()
    with Server(arguments, environment) as server:
        print("  starting", flush=True)
        server.wait(lambda _waited: None)
        threading.Thread(
            target=_stream, args=(server.url, key, prompt, tokens), daemon=True
        ).start()
        address = f"{server.url}/streams#key={key}"
        print(f"  the page: {address}\n  Ctrl-C ends the server", flush=True)
        if _has_display():
            webbrowser.open(address)
        try:
            while True:
                server.check()
                time.sleep(1)
        finally:
            print("\n  stopping the server", flush=True)


def _stream(url: str, key: str, prompt: str, tokens: int) -> None:
    """One turn of one stream; the page can go on with it."""
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=url, headers=headers, timeout=None) as client:
        created = client.post("/v1/streams", json={"metadata": {"name": "Python without end"}})
        generate = {"max_tokens": tokens, "ignore_eos": True, "top_p": 0.95}
        answer = client.post(
            f"/v1/streams/{created.raise_for_status().json()['id']}/append",
            json={"text": prompt, "generate": generate},
        )
        answer.raise_for_status()


def _has_display() -> bool:
    """A browser in a terminal would take it over."""
    on_linux = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return sys.platform in ("darwin", "win32") or bool(on_linux)
