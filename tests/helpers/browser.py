"""A headless Chromium, controlled over its DevTools protocol with aiohttp, a dependency of Ray."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome")
WAIT_S = 60.0
DRAWN = """
document.readyState === 'complete' &&
[...document.querySelectorAll('.js-plotly-plot')].every(e => e.querySelector('.main-svg'))
"""
"""True when plotly has drawn all figures."""


def browser_path() -> str | None:
    """Return the path of an installed browser."""
    for name in NAMES:
        path = shutil.which(name)
        if path:
            return path
    return None


@dataclass
class Seen:
    """What a page did.

    Attributes:
        value: result of the script.
        complaints: errors and warnings.
        requests: URLs that the page requested.
    """

    value: Any = None
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def look(
    page: Path,
    script: str,
    folder: Path,
    width: int = 1200,
    height: int = 900,
    dark: bool = False,
    picture: Path | None = None,
) -> Seen:
    """Open a page, wait until plotly has drawn, and evaluate a script in it.

    Args:
        page: the HTML file.
        script: in JavaScript.
        folder: for the browser's files.
        width: of the window.
        height: of the window.
        dark: whether the page is shown in dark mode.
        picture: path for a screenshot, None for no screenshot.
    """
    path = browser_path()
    assert path
    flags = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-extensions",
    ]
    process = subprocess.Popen(
        [path, *flags, "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        return asyncio.run(
            asyncio.wait_for(_look(page, script, folder, (width, height), dark, picture), WAIT_S)
        )
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()


async def _look(
    page: Path,
    script: str,
    folder: Path,
    size: tuple[int, int],
    dark: bool,
    picture: Path | None,
) -> Seen:
    port_file = folder / "DevToolsActivePort"
    started = time.monotonic()
    while not port_file.exists() or port_file.read_text().count("\n") < 1:
        assert time.monotonic() - started < WAIT_S, "the browser does not start"
        await asyncio.sleep(0.05)
    port = port_file.read_text().splitlines()[0]
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            tab = next(target for target in await answer.json() if target["type"] == "page")
        async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            tools = _DevTools(socket)
            for domain in ("Page", "Runtime", "Log", "Network"):
                await tools.ask(f"{domain}.enable")
            metrics = {
                "width": size[0],
                "height": size[1],
                "deviceScaleFactor": 1,
                "mobile": size[0] < 600,
            }
            await tools.ask("Emulation.setDeviceMetricsOverride", **metrics)
            await tools.ask(
                "Emulation.setEmulatedMedia",
                features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
            )
            await tools.ask("Page.navigate", url=page.resolve().as_uri())
            while not await tools.value(DRAWN):
                await asyncio.sleep(0.1)
            await asyncio.sleep(0.3)  # plotly resizes the figures once more after drawing
            seen = Seen(
                await tools.value(script),
                tools.complaints,
                [url for url in tools.requests if url != page.resolve().as_uri()],
            )
            if picture:
                screenshot = await tools.ask("Page.captureScreenshot", format="png")
                picture.write_bytes(base64.b64decode(screenshot["data"]))
            return seen


class _DevTools:
    """Requests to a tab, and the events that it sends meanwhile."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0
        self.complaints: list[str] = []
        self.requests: list[str] = []

    async def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == self._number:
                assert "error" not in message, message
                return dict(message["result"])
            self._record(message)

    async def value(self, script: str) -> Any:
        answer = await self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def _record(self, event: dict[str, Any]) -> None:
        method = event.get("method")
        parameters = event.get("params", {})
        if method == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            if not url.startswith("data:"):
                self.requests.append(url)
        elif (
            method == "Runtime.exceptionThrown"
            or (method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"))
            or (
                method == "Runtime.consoleAPICalled"
                and parameters["type"] in ("error", "warning", "assert")
            )
        ):
            self.complaints.append(str(parameters))
