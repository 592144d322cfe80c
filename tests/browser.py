"""A real Chromium, driven over a pipe by the DevTools protocol: needs no package beside it, and opens no port."""

import base64
import contextlib
import json
import os
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
# The browser reads its commands from descriptor 3 and answers on 4.
LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execvp(sys.argv[3], sys.argv[3:])"
)


def found_browser() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page. `events`: all that the browser told since `open`."""

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, read
        self._pending = b""
        self._session: str | None = None
        self._number = 0
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command, and wait for its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def _next(self, limit_s: float = 30) -> dict[str, Any]:
        with selectors.DefaultSelector() as selector:
            selector.register(self._read, selectors.EVENT_READ)
            while b"\0" not in self._pending:
                assert selector.select(limit_s), "the browser does not answer"
                part = os.read(self._read, 1 << 20)
                assert part, "the browser has ended"
                self._pending += part
        message, _, self._pending = self._pending.partition(b"\0")
        told = dict(json.loads(message))
        if "method" in told:
            self.events.append(told)
        return told

    def open(self, page: Path | str, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Load a file, or an address, until its load event."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.events.clear()
        self.call("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        deadline = time.monotonic() + 60
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            assert time.monotonic() < deadline, "the page does not load"
            self._next()

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression; a promise is waited for."""
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def press(self, key: str, code: int) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def screenshot(self, whole: bool = False) -> bytes:
        """A PNG of what is in the window, or of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"] if whole else {}
        clip = {"captureBeyondViewport": True, "clip": {**size, "scale": 1}} if whole else {}
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", **clip)["data"])

    def requests(self) -> list[str]:
        """URLs that the page asked for, data: ones apart."""
        urls = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if not url.startswith("data:")]

    def complaints(self) -> list[Any]:
        """What the console shows."""
        kinds = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
        return [event["params"] for event in self.events if event["method"] in kinds]


@contextlib.contextmanager
def browser(path: str, profile: Path) -> Iterator[Browser]:
    """`profile`: an empty folder of its own."""
    (commands, write), (read, answers) = os.pipe(), os.pipe()
    command = [sys.executable, "-c", LAUNCH, str(commands), str(answers), path, *FLAGS, f"--user-data-dir={profile}"]
    with open(profile / "log", "wb") as log:
        process = subprocess.Popen(command, pass_fds=(commands, answers), stdout=log, stderr=log)
    os.close(commands)
    os.close(answers)
    try:
        yield Browser(write, read)
    finally:
        os.close(write)  # the browser ends with its pipe
        os.close(read)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
