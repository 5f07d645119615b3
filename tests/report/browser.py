"""A headless Chromium, driven by its own protocol over a pipe: no driver and no port.

`Browser()` starts it, `page(path)` opens a file and collects what its console, its policy and the
network have to say.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
SECONDS = 60.0


def found() -> str | None:
    """The program, if there is one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A process of its own, ended by `close`."""

    def __init__(self) -> None:
        program = found()
        assert program, f"these tests need a browser ({', '.join(NAMES)}): apt-get install chromium"
        self._folder = tempfile.mkdtemp(prefix="dlora-browser-")
        theirs, ours = os.pipe()
        mine, yours = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        flags += ["--disable-background-networking", "--remote-debugging-pipe"]
        # It reads from descriptor 3 and writes to 4.
        shell = f'exec "$0" "$@" 3<&{theirs} 4>&{yours}'
        self._process = subprocess.Popen(
            [
                "bash",
                "-c",
                shell,
                program,
                *flags,
                f"--user-data-dir={self._folder}",
                "about:blank",
            ],
            pass_fds=(theirs, yours),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs)
        os.close(yours)
        self._in, self._out, self._rest, self._id = ours, mine, b"", 0
        self.events: list[dict[str, Any]] = []
        os.set_blocking(mine, False)

    def close(self) -> None:
        """End it and all that it started."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._folder, ignore_errors=True)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """A command of the protocol; its answer."""
        self._id += 1
        message = {"id": self._id, "method": method, "params": params}
        message |= {"sessionId": session} if session else {}
        os.write(self._in, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._id:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + SECONDS
        while b"\0" not in self._rest:
            assert self._process.poll() is None, "the browser has ended"
            assert time.monotonic() < until, "the browser does not answer"
            try:
                self._rest += os.read(self._out, 1 << 20)
            except BlockingIOError:
                time.sleep(0.005)
        text, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(text))

    def page(self, path: Path, **screen: Any) -> Page:
        """Open a file, and wait until it is loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        return Page(self, attached["sessionId"], path, **screen)


class Page:
    """A page.

    Args:
        width, height: of the screen.
        phone: with touch, and the pixels of one.
        dark: what the page is asked to prefer.
        script: whether scripts run.
    """

    def __init__(
        self,
        browser: Browser,
        session: str,
        path: Path,
        *,
        width: int = 1280,
        height: int = 800,
        phone: bool = False,
        dark: bool = False,
        script: bool = True,
    ) -> None:
        self._browser, self._session, self.width, self.phone = browser, session, width, phone
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        scale = 2 if phone else 1
        screen = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **screen)
        if phone:
            self.call("Emulation.setTouchEmulationEnabled", enabled=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        if not script:
            self.call("Emulation.setScriptExecutionDisabled", value=True)
        began = len(browser.events)
        self.call("Page.navigate", url=path.absolute().as_uri())
        until = time.monotonic() + SECONDS
        while not any(e.get("method") == "Page.loadEventFired" for e in self._since(began)):
            assert time.monotonic() < until, "the page is not loaded"
            self.call("Page.getFrameTree")
            time.sleep(0.02)
        self._began = began

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the protocol for this page."""
        return self._browser.call(method, self._session, **params)

    def _since(self, began: int) -> list[dict[str, Any]]:
        return [e for e in self._browser.events[began:] if e.get("sessionId") == self._session]

    def complaints(self) -> list[str]:
        """What was written to the console, thrown, or refused by the page's policy."""
        self.value("0")
        wanted = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(e) for e in self._since(self._began) if e["method"] in wanted]

    def requests(self) -> list[str]:
        """All addresses that were asked for."""
        self.value("0")
        asked = (e for e in self._since(self._began) if e["method"] == "Network.requestWillBeSent")
        return [e["params"]["request"]["url"] for e in asked]

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript is, as JSON."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def middle(self, selector: str, x: float = 0.5, y: float = 0.5) -> tuple[float, float]:
        """Scroll to an element; a point in it, on the screen."""
        box = self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'center', behavior: 'instant'}); "
            "const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; })()"
        )
        return box[0] + x * box[2], box[1] + y * box[3]

    def hover(self, selector: str, x: float = 0.5) -> None:
        """Move the mouse over an element, or touch it on a phone."""
        px, py = self.middle(selector, x)
        if self.phone:
            point = {"x": px, "y": py}
            self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[point])
            self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        else:
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=px, y=py)

    def key(self, name: str) -> None:
        """Press a key."""
        self.call("Input.dispatchKeyEvent", type="keyDown", key=name, code=name)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=name, code=name)

    def picture(self, path: Path, top: int = 0, height: int = 0) -> Path:
        """Write what it looks like from `top` on, as PNG."""
        whole = self.call("Page.getLayoutMetrics")["cssContentSize"]["height"]
        clip = {"x": 0, "y": top, "width": self.width, "height": height or whole - top, "scale": 1}
        shot = self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path
