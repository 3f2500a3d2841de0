"""Headless Chromium for tests, by the W3C WebDriver protocol over chromedriver's own HTTP interface.

Standard library only: start chromedriver on a free port, open a session, navigate, run scripts, click, send keys, take
screenshots, read logs. No waiting for elements and no retries: the pages tested here do all their work while they load.

    with Browser() as browser:
        browser.get(path.as_uri())
        browser.js("return document.title")
"""

import base64
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key under which the protocol names an element
KEYS = {
    "Tab": "\ue004", "Enter": "\ue007", "Escape": "\ue00c", "PageUp": "\ue00e", "PageDown": "\ue00f", "End": "\ue010",
    "Home": "\ue011", "ArrowLeft": "\ue012", "ArrowUp": "\ue013", "ArrowRight": "\ue014", "ArrowDown": "\ue015",
}  # fmt: skip
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--force-color-profile=srgb",
]  # fmt: skip


def missing() -> str | None:
    """Why there is no browser to test with, or None."""
    absent = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"not on PATH: {', '.join(absent)} (apt-get install chromium chromium-driver)" if absent else None


class Browser:
    """One session; leaves nothing behind."""

    def __enter__(self) -> "Browser":
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._driver = subprocess.Popen(
            ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            said = iter(self._driver.stdout)
            port = next(m[1] for m in (re.search(r"started successfully on port (\d+)", line) for line in said) if m)
            self._url = f"http://127.0.0.1:{port}/session"
            options = {"binary": shutil.which("chromium"), "args": [*FLAGS, f"--user-data-dir={self._profile.name}"]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
            self._url += "/" + self._call("POST", "", capabilities={"alwaysMatch": wanted})["sessionId"]
        except BaseException:
            self._driver.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.wait(10)
            self._driver.stdout.close()
            self._profile.cleanup()

    def _call(self, method: str, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode() if method == "POST" else None
        request = Request(self._url + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urlopen(request, timeout=60) as reply:
                return json.load(reply)["value"]
        except OSError as error:
            raise RuntimeError(f"{path}: {error.read().decode() if hasattr(error, 'read') else error}") from None

    def get(self, url: str) -> None:
        self._call("POST", "/url", url=url)

    def get_report(self, page: Path, drawn: bool = True) -> None:
        """Opens a page of write_report, which unpacks its tokens first; `drawn`: all texts, not only those in view."""
        self.get(page.as_uri())
        ready = "const { ready } = document.documentElement.dataset; if (ready) done(ready); else setTimeout(look);"
        assert self.js(f"return new Promise(done => {{ const look = () => {{ {ready} }}; look(); }})") == "yes"
        if drawn:
            self.js("dispatchEvent(new Event('beforeprint'))")

    def js(self, script: str, *args: Any) -> Any:
        """What the script, a function's body, returns."""
        return self._call("POST", "/execute/sync", script=script, args=list(args))

    def each(self, css: str, expression: str) -> list:
        """What a JavaScript expression in `e` gives for every element that a CSS selector matches."""
        return self.js(f"return [...document.querySelectorAll(arguments[0])].map(e => {expression})", css)

    def find(self, css: str) -> str:
        """The id of the first element that a CSS selector matches."""
        return self._call("POST", "/element", using="css selector", value=css)[ELEMENT]

    def click(self, css: str, x: int = 0, y: int = 0) -> None:
        """A real click, x and y pixels from the element's centre."""
        self.move(css, x, y, then=[{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}])

    def move(self, css: str, x: int = 0, y: int = 0, then: list | None = None) -> None:
        """Moves the mouse, x and y pixels from the element's centre, after scrolling there."""
        self.js("document.querySelector(arguments[0]).scrollIntoView({block: 'center', behavior: 'instant'})", css)
        to = {"type": "pointerMove", "origin": {ELEMENT: self.find(css)}, "x": x, "y": y, "duration": 0}
        self._call("POST", "/actions", actions=[{"type": "pointer", "id": "mouse", "actions": [to, *(then or [])]}])

    def keys(self, *names: str) -> None:
        """Keys of KEYS, pressed one after another while whatever has the focus has it."""
        presses = [{"type": kind, "value": KEYS[name]} for name in names for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", actions=[{"type": "key", "id": "keyboard", "actions": presses}])

    def cdp(self, command: str, **params: Any) -> Any:
        """A command of the Chrome DevTools Protocol."""
        return self._call("POST", "/goog/cdp/execute", cmd=command, params=params)

    def window(self, width: int, height: int = 900, dark: bool = False) -> None:
        """Size of the page's viewport, and which colour scheme it prefers."""
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path, full: bool = False) -> None:
        """A PNG of the viewport, or of the whole page."""
        shot = self.cdp("Page.captureScreenshot", format="png", captureBeyondViewport=full, fromSurface=True)
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def log(self, kind: str = "browser") -> list[dict]:
        """What was logged since the last call: "browser" is the console, "performance" the network among others."""
        return self._call("POST", "/se/log", type=kind)

    def requested(self) -> list[str]:
        """Every address asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
