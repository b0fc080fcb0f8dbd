"""What a person at the live page would see of a model, measured from a window without a browser.

    python tools/bench_page.py --seconds 40 -- --random-weights --compile
    python tools/bench_page.py -- --release Wan2.2-TI2V-5B --weights dmd.safetensors --compile

What stands behind -- are options of live.py, which it starts and stops. Delays of prompts are from
the request to the first frame under it: when it came, and when it is shown.
"""

import argparse
import http.client
import json
import statistics
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).parents[1]
WHO = "a window of bench_page"


class Page:
    """One that watches, and directs."""

    def __init__(self, address: str):
        self.address = urlsplit(address)
        self.shown: list[tuple[float, float, int]] = []  # when due and when come, of which version
        self.state: dict = {}
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        connection = http.client.HTTPConnection(self.address.netloc, timeout=60)
        connection.request("GET", "/frames", headers={"X-Window": WHO})
        answer = connection.getresponse()
        while head := answer.read(4):
            content = answer.read(*struct.unpack(">I", head))
            if content[0] == 0:
                self.state = json.loads(content[1:])
            else:
                _, _, version, due, _ = struct.unpack(">IIIdd", content[1:29])
                self.shown.append((due, time.monotonic(), version))

    def post(self, path: str, body: bytes) -> dict:
        connection = http.client.HTTPConnection(self.address.netloc, timeout=60)
        origin = f"http://{self.address.netloc}"
        connection.request("POST", path, body, {"Origin": origin})
        value = json.load(connection.getresponse())
        if "error" in value:
            raise ValueError(value["error"])
        return value

    def start(self, prompt: str) -> None:
        asked = json.dumps({"who": WHO, "prompt": prompt, "seed": 0}).encode()
        self.post("/start", struct.pack(">I", len(asked)) + asked)

    def change(self, prompt: str) -> int:
        return self.post("/prompt", json.dumps({"who": WHO, "prompt": prompt}).encode())["version"]

    def wait(self, fits, seconds: float = 120) -> None:
        end = time.monotonic() + seconds
        while not fits():
            if self.state.get("error"):
                raise ValueError(self.state["error"])
            if time.monotonic() > end:
                raise TimeoutError(f"nothing in {seconds} s; state {self.state}")
            time.sleep(0.005)


def measure(page: Page, seconds: float) -> None:
    """Print the figures. The page's clock and ours are one where both run on one machine."""
    begun = time.monotonic()
    page.start("a red fox in deep snow")
    page.wait(lambda: page.shown)
    print(f"first frame: came after {page.shown[0][1] - begun:.2f} s")

    came, shown, memory = [], [], []
    end = begun + seconds
    while time.monotonic() < end:
        time.sleep(3.0 + 0.37 * len(came) % 1)  # at another place in the chunk each time
        asked = time.monotonic()
        version = page.change(f"a red fox, picture number {len(came)}")
        page.wait(lambda version=version: page.shown[-1][2] >= version)
        due, at, _ = next(frame for frame in page.shown if frame[2] >= version)
        came.append(at - asked)
        shown.append(max(due, at) - asked)
        memory.append(page.state["figures"]["memory"])
    for name, delays in (("came", came), ("shown", shown)):
        middle = statistics.median(delays)
        print(f"prompt to picture, {name}: {middle:.2f} s (at most {max(delays):.2f})")

    dues = [due for due, _, _ in page.shown]
    steps = sorted(b - a for a, b in zip(dues, dues[1:], strict=False))
    late = sum(at > due for due, at, _ in page.shown)
    print(f"{len(dues) / (dues[-1] - dues[0]):.2f} frames a second shown, {late} came late")
    print(
        f"between frames: {1000 * steps[len(steps) // 2]:.1f} ms (at most {1000 * steps[-1]:.1f})"
    )
    for place in ("host", "gpu"):
        used = [now[place] / 2**20 for now in memory[:: max(1, len(memory) // 8)] if place in now]
        if used:
            print(f"MiB, {place}, from the start to the end:", *(f"{one:.0f}" for one in used))
    print(json.dumps(page.state["figures"]))
    print(f"kept for saving: {page.state['kept']} of {page.state['frames']} {page.state['lost']}")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("options", nargs="*")
    args = parser.parse_args()
    command = [sys.executable, str(ROOT / "live.py"), "--port", "0", *args.options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    begun = time.monotonic()
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("http"):
                break
        else:
            sys.exit(process.wait())
        print(f"ready after {time.monotonic() - begun:.0f} s")
        measure(Page(line.split()[0]), args.seconds)
    finally:
        process.send_signal(2)
        process.wait(timeout=60)
    print(f"Ctrl-C: exit code {process.returncode}")


if __name__ == "__main__":
    main()
