"""Chromium, driven through its chromedriver with the standard library alone."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # by which the WebDriver standard names elements


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Browser:
    """A headless Chromium of its own, without a profile. A context manager."""

    def __init__(self, width: int = 1280, height: int = 800, downloads: Path | None = None):
        self.size = (width, height)
        self.downloads = downloads

    def __enter__(self) -> "Browser":
        port = free_port()
        self.driver = subprocess.Popen(
            [shutil.which("chromedriver"), f"--port={port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.address = f"http://127.0.0.1:{port}"
        self._wait_for_driver()
        width, height = self.size
        options = {"args": ["--headless=new", "--no-sandbox", f"--window-size={width},{height}"]}
        options["args"] += ["--disable-dev-shm-usage", "--hide-scrollbars"]
        if self.downloads:
            options["prefs"] = {"download.default_directory": str(self.downloads)}
        capabilities = {"alwaysMatch": {"goog:chromeOptions": options}}
        session = self._ask("POST", "/session", {"capabilities": capabilities})
        self.address += f"/session/{session['sessionId']}"
        self.processes = session["capabilities"]
        self.resize(width, height)
        return self

    def __exit__(self, *_) -> None:
        with suppress(OSError):  # it was killed
            self._ask("DELETE", "")
        self.driver.terminate()
        self.driver.wait(timeout=10)

    def _wait_for_driver(self) -> None:
        end = time.monotonic() + 20
        while time.monotonic() < end:
            try:
                if self._ask("GET", "/status")["ready"]:
                    return
            except OSError:
                time.sleep(0.05)
        raise TimeoutError("chromedriver does not start")

    def _ask(self, method: str, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, method=method)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"].partition("\n")[0]) from None

    # ------------------------------------------------------------------------------- what one does

    def open(self, address: str) -> None:
        self._ask("POST", "/url", {"url": address})

    def run(self, script: str, *args):
        """The value that JavaScript returns."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": list(args)})

    def until(self, script: str, seconds: float = 10):
        """Wait until an expression is true -> its value."""
        end = time.monotonic() + seconds
        while not (value := self.run(f"return {script}")):
            assert time.monotonic() < end, f"not in {seconds} s: {script}"
            time.sleep(0.03)
        return value

    def find(self, selector: str) -> str:
        value = {"using": "css selector", "value": selector}
        return self._ask("POST", "/element", value)[ELEMENT]

    def click(self, selector: str) -> None:
        self._ask("POST", f"/element/{self.find(selector)}/click", {})

    def type(self, selector: str, text: str) -> None:
        """Keys of a person, into an emptied field; a file's path into a file input."""
        self._ask("POST", f"/element/{self.find(selector)}/value", {"text": text})

    def new_window(self) -> str:
        """Open one, and go there -> its name."""
        name = self._ask("POST", "/window/new", {"type": "window"})["handle"]
        self.go_to(name)
        return name

    def window(self) -> str:
        return self._ask("GET", "/window")

    def go_to(self, name: str) -> None:
        self._ask("POST", "/window", {"handle": name})

    def close_window(self) -> None:
        self._ask("DELETE", "/window")

    def command(self, name: str, **params):
        """One of Chromium's own protocol."""
        return self._ask("POST", "/goog/cdp/execute", {"cmd": name, "params": params})

    def resize(self, width: int, height: int, phone: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self.command("Emulation.setDeviceMetricsOverride", **size)

    def screenshot(self) -> bytes:
        """A PNG of what is seen."""
        return base64.b64decode(self._ask("GET", "/screenshot"))
