"""A headless Chromium, spoken to by its own DevTools protocol."""

import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from websockets.sync.client import connect

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


class PageError(AssertionError):
    """A script of the page has failed, or the page has not come to what was waited for."""


class Browser:
    """One page of a browser, as a context manager that leaves no process behind.

    What the page logs as an error, and every request that fails or leaves the server, is kept.
    """

    def __init__(self, *, width: int = 1200, height: int = 900) -> None:
        program = next(filter(None, map(shutil.which, PROGRAMS)), None)
        if program is None:
            pytest.skip(f"needs a browser: none of {', '.join(PROGRAMS)} is installed")
        self._program, self._size = program, (width, height)
        self._ids = 0
        self.errors: list[str] = []
        self.requested: list[str] = []

    def __enter__(self) -> "Browser":
        self._folder = tempfile.TemporaryDirectory(
            prefix="sink_vllm-browser-", ignore_cleanup_errors=True
        )
        # Its sandbox needs rights that a container does not have; only our own page is opened.
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        flags += ["--no-first-run", "--disable-background-networking", "--disable-extensions"]
        flags += ["--remote-debugging-port=0", f"--user-data-dir={self._folder.name}"]
        self._process = subprocess.Popen(
            [self._program, *flags, "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            self._socket = connect(self._address(), max_size=None)
            for domain in ("Page", "Runtime", "Network", "Log"):
                self.call(f"{domain}.enable")
            self.resize(*self._size)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):
            self._socket.close()
        self._end()

    def _end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def _address(self, limit: float = 60) -> str:
        file, deadline = Path(self._folder.name) / "DevToolsActivePort", time.monotonic() + limit
        while time.monotonic() < deadline:
            if file.exists() and "\n" in (text := file.read_text()):
                port = text.split("\n")[0]
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
                    pages = [one for one in json.load(answer) if one["type"] == "page"]
                if pages:
                    address: str = pages[0]["webSocketDebuggerUrl"]
                    return address
            time.sleep(0.1)
        raise PageError(f"{self._program} has not started within {limit:.0f} s")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A method of the protocol; its result."""
        sent = self._send(method, params)
        while True:
            said = json.loads(self._socket.recv(timeout=60))
            if said.get("id") == sent:
                if "error" in said:
                    raise PageError(f"{method}: {said['error']}")
                result: dict[str, Any] = said["result"]
                return result
            self._take(said)

    def _send(self, method: str, params: dict[str, Any]) -> int:
        self._ids += 1
        self._socket.send(json.dumps({"id": self._ids, "method": method, "params": params}))
        return self._ids

    def _take(self, said: dict[str, Any]) -> None:
        params = said.get("params", {})
        match said.get("method"):
            case "Runtime.exceptionThrown":
                self.errors.append(json.dumps(params["exceptionDetails"])[:500])
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                entry = params["entry"]
                self.errors.append(f"{entry['text']} {entry.get('url', '')}")
            case "Network.requestWillBeSent":
                self.requested.append(params["request"]["url"])
            case "Page.javascriptDialogOpening":
                self._send("Page.handleJavaScriptDialog", {"accept": True})

    def run(self, script: str) -> Any:
        """The value of an expression, also one that is promised."""
        result = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in result:
            raise PageError(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def wait(self, condition: str, limit: float = 30) -> Any:
        """Until an expression is true (an element is not: compare it with null); its value."""
        deadline = time.monotonic() + limit
        while True:
            value = self.run(condition)
            if value:
                return value
            if time.monotonic() > deadline:
                text = self.run("document.body.innerText")
                raise PageError(f"not within {limit:.0f} s: {condition}; {self.errors}\n{text}")
            time.sleep(0.1)

    def text(self, selector: str) -> str:
        """What is seen of an element; nothing of one that is hidden."""
        element = f"document.querySelector({json.dumps(selector)})"
        found: str = self.run(f"{element}?.checkVisibility() ? {element}.innerText : ''")
        return found

    def key(self, name: str, text: str = "", modifiers: int = 0) -> None:
        """Press and release a key: of the keyboard, not an event of the script."""
        code = {"Tab": 9, "Enter": 13, " ": 32}.get(name, 0)
        fields = {"key": name, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        pressed = {"text": text, **fields} if text else fields
        self.call("Input.dispatchKeyEvent", type="keyDown", **pressed)
        self.call("Input.dispatchKeyEvent", type="keyUp", **fields)

    def type(self, text: str) -> None:
        """Into the element that has the focus."""
        self.call("Input.insertText", text=text)

    def resize(self, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def prefer(self, **features: str) -> None:
        """Media features of the page, such as ``prefers-color-scheme``; ``_`` for ``-``."""
        wanted = [{"name": k.replace("_", "-"), "value": v} for k, v in features.items()]
        self.call("Emulation.setEmulatedMedia", features=wanted)

    def picture(self, file: Path) -> None:
        """A PNG of what is in view."""
        file.write_bytes(
            base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        )

    def accessible(self) -> list[tuple[str, str]]:
        """Role and name of everything assistive technology is told of."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"]
        ]
