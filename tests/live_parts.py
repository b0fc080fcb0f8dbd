"""What the tests of the live page share: drawn frames in a model's place, whose colour says the
prompt and whose bar the time; a page served for a test; a window that is no browser.
"""

import http.client
import json
import struct
import threading
import time
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np

from wan5b.extras.server import Server
from wan5b.extras.studio import Studio

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 220)}
GRAY = (128, 128, 128)


def drawn(size=(96, 160), count=12, seconds=0.1, chunks=None, first=None):
    """make(wish) for a Studio: chunks of `count` frames, each made in so many seconds.

    A word of the prompt is the colour of the picture. A bar moves by one column a frame. With an
    image, the first piece is one frame of its mean colour. chunks: how many there are (None: no
    end). first: frames of the first chunk, if it is shorter.
    """
    height, width = size

    def make(wish):
        if wish.image is not None:
            mean = wish.image[0].mean((0, 1)).astype(np.uint8)
            yield np.broadcast_to(mean, (1, height, width, 3)).copy()
        number = 0
        made = 0
        while chunks is None or number < chunks:
            words = wish.prompt().lower().split()
            colour = next((COLOURS[word] for word in words if word in COLOURS), GRAY)
            if "nan" in words:
                raise FloatingPointError("a chunk is not finite (damaged weights?)")
            if "memory" in words:
                raise MemoryError("12 GiB of 8")
            if "bug" in words:
                raise KeyError("a fault of the model")
            time.sleep(seconds)
            length = first if first and number == 0 else count
            frames = np.empty((length, height, width, 3), np.uint8)
            frames[:] = colour
            for i in range(length):
                frames[i, :, (made + i) % width] = 255
            yield frames
            number += 1
            made += length

    return make


@contextmanager
def served(make=None, size=(96, 160), fps=24, grace=0.5, **options):
    """A page at an address of its own -> its Server, which has the `studio`."""
    with (
        Studio(make or drawn(size), size, fps, grace=grace, **options) as studio,
        Server() as server,
    ):
        server.studio = studio
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class Answer(NamedTuple):
    status: int
    headers: dict
    body: bytes

    @property
    def json(self) -> dict:
        return json.loads(self.body)


def ask(server: Server, method: str, path: str, body=None, **headers) -> Answer:
    """One request, by default as the page makes it; a header that is None is left out."""
    host = f"127.0.0.1:{server.server_port}"
    given = {"Host": host, "Origin": f"http://{host}"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    try:
        connection.putrequest(method, path, skip_host=True)
        if body is not None and "Content-Length" not in given:
            given["Content-Length"] = str(len(body))
        for name, value in given.items():
            if value is not None:
                connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return Answer(answer.status, dict(answer.getheaders()), answer.read())
    finally:
        connection.close()


def starting(who: str, prompt: str, seed: int | None = 1, image: bytes = b"") -> bytes:
    """The body of /start."""
    asked = json.dumps({"who": who, "prompt": prompt, "seed": seed}).encode()
    return struct.pack(">I", len(asked)) + asked + image


def start(server: Server, prompt: str, who: str = "window-a", **more) -> Answer:
    return ask(server, "POST", "/start", starting(who, prompt, **more))


def change(server: Server, prompt: str, who: str = "window-a") -> Answer:
    return ask(server, "POST", "/prompt", json.dumps({"who": who, "prompt": prompt}).encode())


def stop(server: Server, who: str = "window-a") -> Answer:
    return ask(server, "POST", "/stop", json.dumps({"who": who}).encode())


class Shown(NamedTuple):
    """A frame as a window gets it."""

    video: int
    index: int
    version: int
    due: float
    sent: float
    jpeg: bytes


class Watcher:
    """A window without a browser. A context manager; `read` gives what comes, one by one."""

    def __init__(self, server: Server, who: str = "window-a"):
        self.connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        self.who = who

    def __enter__(self) -> "Watcher":
        self.connection.request("GET", "/frames", headers={"X-Window": self.who})
        self.answer = self.connection.getresponse()
        assert self.answer.status == 200, self.answer.read()
        return self

    def __exit__(self, *_) -> None:
        self.answer.close()
        self.connection.close()

    def read(self) -> Shown | dict:
        (length,) = struct.unpack(">I", self.answer.read(4))
        content = self.answer.read(length)
        if content[0] == 0:
            return json.loads(content[1:])
        return Shown(*struct.unpack(">IIIdd", content[1:29]), content[29:])

    def frames(self, count: int) -> list[Shown]:
        found = []
        while len(found) < count:
            ready = self.read()
            if isinstance(ready, Shown):
                found.append(ready)
        return found

    def until(self, fits, seconds: float = 5):
        """The first state, or frame, of which fits(...) is true."""
        end = time.monotonic() + seconds
        while True:
            ready = self.read()
            if fits(ready):
                return ready
            assert time.monotonic() < end, f"not in {seconds} s; last {str(ready)[:300]}"


def state_where(**values):
    """For `Watcher.until`: a state with these values."""
    return lambda ready: isinstance(ready, dict) and values.items() <= ready.items()
