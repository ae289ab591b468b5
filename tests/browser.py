"""A headless Chromium, driven by its DevTools protocol: what a page shows, asks for and says."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
_SECONDS = 60


class Page:
    """One tab.

    Args:
        socket: Connection to the browser.
        session: Session of the tab in it.
    """

    def __init__(self, socket: ClientConnection, session: str) -> None:
        self.requests: list[str] = []
        self.problems: list[str] = []
        self._socket, self._session, self._ids = socket, session, itertools.count(1)
        self._loaded = False
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Call a method of the protocol; the result."""
        number = next(self._ids)
        message = {"id": number, "sessionId": self._session, "method": method, "params": arguments}
        self._socket.send(json.dumps(message))
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, page: Path | str, width: int, *, dark: bool = False) -> None:
        """Load a file or an address at a width in CSS pixels, and wait until it is loaded."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.resize(width)
        self._loaded = False
        self.send("Page.navigate", url=page.resolve().as_uri() if isinstance(page, Path) else page)
        while not self._loaded:
            self._receive()

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript gives, as JSON types; a promise is waited for."""
        found = self.send(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, expression: str, seconds: float = _SECONDS) -> None:
        """Wait until an expression of JavaScript is true."""
        end = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.02)

    def upload(self, selector: str, path: Path) -> None:
        """Give a field for files, which CSS selects, a file."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def press(self, key: str) -> None:
        """Press a key, as a person does, and let it go."""
        text = {"text": key} if len(key) == 1 else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def resize(self, width: int, height: int = 900) -> None:
        """Make the window's inside of this size in CSS pixels."""
        size = {"width": width, "height": height}
        self.send("Emulation.setDeviceMetricsOverride", deviceScaleFactor=1, mobile=False, **size)

    def picture(self, width: int) -> bytes:
        """The whole page as PNG."""
        self.resize(width, self.value("document.documentElement.scrollHeight"))
        return base64.b64decode(self.send("Page.captureScreenshot")["data"])

    def _receive(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._socket.recv(timeout=_SECONDS))
        told = answer.get("params", {})
        match answer.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Network.requestWillBeSent":
                self.requests.append(told["request"]["url"])
            case "Runtime.exceptionThrown":
                self.problems.append(str(told["exceptionDetails"]))
            case "Runtime.consoleAPICalled":
                self.problems.append(str(told["args"]))
            case "Log.entryAdded":
                self.problems.append(told["entry"]["text"])
        return answer


@contextlib.contextmanager
def open_page() -> Iterator[Page]:
    """A tab of a browser that runs for a `with` block."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            CHROMIUM,
            "--headless",
            "--remote-debugging-port=0",
            f"--user-data-dir={profile}",
        ]
        command += ["--no-first-run", "--disable-gpu", "--disable-dev-shm-usage"]
        if os.geteuid() == 0:
            command.append("--no-sandbox")  # it starts for no root without
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as browser:
            try:
                port, path = _address(Path(profile) / "DevToolsActivePort", browser)
                # No pings: their answers wait behind what a page says while a test looks elsewhere.
                options: dict[str, Any] = {"max_size": None, "proxy": None, "ping_interval": None}
                with connect(f"ws://127.0.0.1:{port}{path}", **options) as socket:
                    yield Page(socket, _tab(socket))
            finally:
                browser.terminate()


def _address(file: Path, browser: subprocess.Popen[bytes]) -> list[str]:
    end = time.monotonic() + _SECONDS
    while not file.is_file() or len(lines := file.read_text().split()) < 2:
        assert browser.poll() is None, f"{CHROMIUM} ended with {browser.returncode}"
        assert time.monotonic() < end, f"{CHROMIUM} opened no port"
        time.sleep(0.05)
    return lines


def _tab(socket: ClientConnection) -> str:
    def call(number: int, method: str, **arguments: Any) -> dict[str, Any]:
        socket.send(json.dumps({"id": number, "method": method, "params": arguments}))
        while True:
            answer = json.loads(socket.recv(timeout=_SECONDS))
            if answer.get("id") == number:
                return answer["result"]

    target = call(1, "Target.createTarget", url="about:blank")["targetId"]
    session: str = call(2, "Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    return session
