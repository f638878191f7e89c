"""Chromium, driven as a person drives it: by mouse, keys and dropped files. Over a pipe, so that no other package is needed."""

import base64
import contextlib
import fcntl
import functools
import http.server
import io
import json
import os
import select
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ISOLATED = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}


def find_program(names: tuple[str, ...]) -> str:
    """The path of the first program that there is. Installs Debian's package of the first name if there is none."""
    if not any(map(shutil.which, names)):
        prefix = [] if os.geteuid() == 0 else ["sudo", "-n"]
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", names[0]]):
            subprocess.run([*prefix, "apt-get", *command], check=True, env=environment, timeout=600)
    return next(path for path in map(shutil.which, names) if path)


def find_browser() -> str:
    """The path of Chromium or Chrome, installed if there is none."""
    return find_program(BROWSERS)


@contextlib.contextmanager
def serving(folder: Path, headers: dict[str, str] | None = None) -> Iterator[str]:
    """Serve a folder over HTTP, and yield its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def end_headers(self):
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            super().end_headers()

        def log_message(self, *args):
            pass

    Handler.extensions_map = {**Handler.extensions_map, ".mjs": "text/javascript", ".wasm": "application/wasm"}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


class Chromium:
    """
    A headless browser with one tab. `problems` are its errors and console messages, `requests` the addresses it asked for.
    """

    def __init__(self, profile: Path, width: int = 1280, height: int = 900, *flags: str):
        # The browser reads from descriptor 3 and writes to 4: its ends of the pipes lie above, and are moved there.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for pair in (os.pipe(), os.pipe()) for end in pair]
        read, self.write, self.read, write = ends
        command = [
            find_browser(), "--headless=new", "--no-sandbox", "--hide-scrollbars", "--no-first-run", "--remote-debugging-pipe",
            "--disable-component-update", "--disable-background-networking", f"--user-data-dir={profile}",
            f"--window-size={width},{height}", *flags, "about:blank",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command, pass_fds=(3, 4), preexec_fn=lambda: (os.dup2(read, 3), os.dup2(write, 4)),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(read)
        os.close(write)
        self.buffer, self.number, self.session = b"", 0, None
        self.problems: list[str] = []
        self.requests: list[str] = []
        target = next(one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(self, *exception) -> None:
        with contextlib.suppress(Exception):
            self.session = None
            self.call("Browser.close")
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        os.close(self.read)
        os.close(self.write)

    def call(self, method: str, **params) -> dict[str, Any]:
        """Send a command, and return its result. Events that come before it are noted."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        number = self.number
        while True:
            answer = self.receive(120)
            if answer is None:
                raise TimeoutError(method)
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def receive(self, seconds: float) -> dict[str, Any] | None:
        end = time.monotonic() + seconds
        while b"\0" not in self.buffer:
            if not select.select([self.read], [], [], max(0, end - time.monotonic()))[0]:
                return None
            part = os.read(self.read, 2**20)
            if not part:
                raise RuntimeError("The browser has ended.")
            self.buffer += part
        text, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(text)
        self.note(message.get("method"), message.get("params", {}))
        return message

    def note(self, event: str | None, params: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Runtime.consoleAPICalled":
            self.problems.append(" ".join(str(one.get("value", one.get("description"))) for one in params["args"]))
        elif event == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif event == "Log.entryAdded":
            self.problems.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def evaluate(self, expression: str) -> Any:
        """The value of an expression, awaited."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return result["result"].get("value")

    def wait(self, condition: str, seconds: float = 300) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(condition):
            if time.monotonic() > end:
                raise TimeoutError(f"{condition}; {self.problems}")
            self.receive(0.05)

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def rest(self, seconds: float) -> None:
        """Let time pass, and note what happens."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.receive(left)

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height of an element, which is scrolled into view."""
        return self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
            " const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; })()"
        )

    def point(self, selector: str, x: float = 0.5, y: float = 0.5) -> tuple[float, float]:
        left, top, width, height = self.box(selector)
        return left + x * width, top + y * height

    def mouse(self, kind: str, x: float, y: float, pressed: bool) -> None:
        self.call(
            "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left" if pressed else "none", buttons=int(pressed),
            clickCount=1 if kind in ("mousePressed", "mouseReleased") else 0,
        )  # fmt: skip

    def click(self, selector: str) -> None:
        self.drag(selector, [(0.5, 0.5)])

    def drag(self, selector: str, points: list[tuple[float, float]]) -> None:
        """Press the mouse on an element, move it through points (shares of its width and height), and let go."""
        left, top, width, height = self.box(selector)
        placed = [(left + x * width, top + y * height) for x, y in points]
        self.mouse("mouseMoved", *placed[0], False)
        self.call(
            "Input.dispatchMouseEvent",
            type="mousePressed",
            x=placed[0][0],
            y=placed[0][1],
            button="left",
            buttons=1,
            clickCount=1,
        )
        for x, y in placed[1:]:
            self.mouse("mouseMoved", x, y, True)
        self.call(
            "Input.dispatchMouseEvent",
            type="mouseReleased",
            x=placed[-1][0],
            y=placed[-1][1],
            button="left",
            clickCount=1,
        )

    def touch(self, selector: str, points: list[tuple[float, float]]) -> None:
        """Put a finger on an element, and move it."""
        left, top, width, height = self.box(selector)
        for i, (x, y) in enumerate(points):
            place = [{"x": left + x * width, "y": top + y * height}]
            self.call("Input.dispatchTouchEvent", type="touchMove" if i else "touchStart", touchPoints=place)
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, key: str) -> None:
        codes = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, " ": 32, "Tab": 9, "Enter": 13}
        code = codes.get(key, ord(key[0].upper()))
        typed = {"text": "\r" if key == "Enter" else key} if len(key) == 1 or key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, windowsVirtualKeyCode=code, **typed)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code)

    def drop(self, selector: str, file: Path) -> None:
        x, y = self.point(selector)
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def pixels(self, canvas: str) -> np.ndarray:
        """The pixels of a canvas, given by an expression, (H, W, 3) uint8."""
        text = self.evaluate(f"{canvas}.toDataURL()").partition(",")[2]
        with PIL.Image.open(io.BytesIO(base64.b64decode(text))) as image:
            return np.asarray(image.convert("RGB"))

    def emulate(self, width: int, height: int, dark: bool = False, mobile: bool = False) -> None:
        """Take the size of another screen, and a finger for the mouse if it is `mobile`."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        self.call("Emulation.setTouchEmulationEnabled", enabled=mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """Save a picture of the whole page."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        self.rest(0.3)
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
        Path(path).write_bytes(base64.b64decode(data))
