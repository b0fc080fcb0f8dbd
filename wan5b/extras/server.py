"""The live page over HTTP: files of the page, requests to the studio, and frames as they are made.

Frames go to each window in one answer that never ends, to a fetch() that reads it as it grows:
records of a length, a kind and content, all numbers big-endian (`frame_record`, `state_record`).

It is meant for one machine, or for people who trust one another: whoever reaches the address may
use it. So what comes is taken from this page alone (Host and Origin are looked at), and bounded:
sizes before they are read, connections, and the time that each may take.
"""

import io
import ipaddress
import json
import os
import socket
import socketserver
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from secrets import randbelow
from typing import BinaryIO
from urllib.parse import urlsplit

import numpy as np

from wan5b.extras.pictures import read_image
from wan5b.extras.studio import Busy, Frame, Studio
from wan5b.util import first_line

PAGE = Path(__file__).parent / "page"
# What a path of the page is: the file, and its type. Nothing else of the disk is ever sent.
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/player.js": ("player.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
POLICY = "; ".join(
    [
        *("default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'"),
        *("img-src 'self' blob:", "base-uri 'none'", "form-action 'none'"),
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Connection": "close",
}

CONNECTIONS = 64
HEADER_BYTES = 16 << 10
JSON_BYTES = 16 << 10
IMAGE_BYTES = 32 << 20
PROMPT = 2000  # characters
WHO = 64  # characters
ASKING = 10.0  # seconds that a request may take to come in
UPLOADING = 60.0  # seconds, of one with a picture
SENDING = 10.0  # seconds that a window may take no data before it counts as gone
SAVING = 2  # at a time: each has a copy of the video on the disk
DECODING = 2  # pictures at a time
SEND_BUFFER = 1 << 18  # bytes that the kernel may hold for a window, so that late frames wait here


class Refused(Exception):
    """A request that is answered by a status and one line."""

    def __init__(self, status: HTTPStatus, line: str):
        super().__init__(line)
        self.status = status


@contextmanager
def needing_room() -> Iterator[None]:
    """Inside, files are written: Refused where that can't be, on a full disk say."""
    try:
        yield
    except OSError as wrong:
        raise Refused(HTTPStatus.INSUFFICIENT_STORAGE, first_line(wrong)) from wrong


class Bounded(io.RawIOBase):
    """What a connection sends, up to a number of bytes and a point in time."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self.allow(HEADER_BYTES, ASKING)

    def allow(self, size: int, seconds: float) -> None:
        self.left = size
        self.end = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        if self.left <= 0:
            raise Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "too large a request")
        self.connection.settimeout(max(self.end - time.monotonic(), 0.001))
        count = self.connection.recv_into(memoryview(buffer)[: self.left])
        self.left -= count
        return count


def frame_record(frame: Frame) -> bytes:
    """Length of the rest, kind 1, video, index, version, due and now in seconds, JPEG."""
    head = (frame.video, frame.index, frame.version, frame.due, time.monotonic())
    content = struct.pack(">BIIIdd", 1, *head) + frame.jpeg
    return struct.pack(">I", len(content)) + content


def state_record(state: dict) -> bytes:
    """Length of the rest, kind 0, JSON."""
    content = b"\0" + json.dumps(state).encode()
    return struct.pack(">I", len(content)) + content


class Handler(BaseHTTPRequestHandler):
    """One connection, which has one request."""

    protocol_version = "HTTP/1.1"
    server_version = "wan5b"
    sys_version = ""

    def setup(self) -> None:
        super().setup()
        self.source = Bounded(self.connection)
        self.rfile = io.BufferedReader(self.source)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)

    def handle(self) -> None:
        try:
            self.handle_one_request()
        except Refused as refused:
            self.refuse(refused.status, str(refused))
        except OSError:  # it is gone, or too slow
            pass

    def log_message(self, *_) -> None:
        """Nothing: the terminal is for what matters."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server finds wrong with a request: a line, like all that is refused."""
        self.refuse(code, message or HTTPStatus(code).phrase)

    def refuse(self, status: int, line: str) -> None:
        # http.server may not have come so far as to know these.
        self.request_version = "HTTP/1.1"
        self.requestline = getattr(self, "requestline", "")
        with suppress(OSError):  # it may be gone already
            self.answer({"error": line}, status)
            # What is still coming in would reset the connection, and the line with it.
            self.connection.settimeout(0.2)
            self.connection.shutdown(socket.SHUT_WR)
            for _ in range(16):
                if not self.connection.recv(1 << 16):
                    break

    def head(self, status: int, kind: str, length: int | None, **more: str) -> None:
        self.close_connection = True
        self.connection.settimeout(SENDING)
        self.send_response_only(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        for name, value in more.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()

    def answer(self, value: dict, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.head(status, "application/json", len(body))
        self.wfile.write(body)

    # ----------------------------------------------------------------------------------- requests

    def do_GET(self) -> None:
        path = self.check_origin()
        if path in FILES:
            name, kind = FILES[path]
            body = (PAGE / name).read_bytes()
            self.head(200, kind, len(body))
            self.wfile.write(body)
        elif path == "/frames":
            self.frames()
        elif path == "/video.mp4":
            self.video()
        else:
            raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here")

    def do_POST(self) -> None:
        path = self.check_origin()
        actions = {"/start": self.start, "/prompt": self.prompt, "/stop": self.stop}
        if path not in actions:
            raise Refused(HTTPStatus.NOT_FOUND, "there is nothing here")
        try:
            self.answer(actions[path]())
        except Busy as busy:
            raise Refused(HTTPStatus.CONFLICT, str(busy)) from busy
        except ValueError as wrong:
            raise Refused(HTTPStatus.BAD_REQUEST, str(wrong)) from wrong

    def check_origin(self) -> str:
        """The path that is asked for. Refused unless the page itself, or its address, asks."""
        hosts = self.headers.get_all("Host") or []
        if len(hosts) != 1 or not self.server.knows(hosts[0]):
            raise Refused(
                HTTPStatus.MISDIRECTED_REQUEST,
                "unknown host: use the printed address, or start with --host",
            )
        origin = self.headers.get("Origin")
        if origin is None and self.command == "POST":
            raise Refused(HTTPStatus.FORBIDDEN, "only the page itself may ask for that")
        if origin is not None and origin not in (f"http://{hosts[0]}", f"https://{hosts[0]}"):
            raise Refused(HTTPStatus.FORBIDDEN, "another site's page may not use this one")
        ours = self.headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin")
        if not ours and self.path != "/":  # a link to the page is all right
            raise Refused(HTTPStatus.FORBIDDEN, "another site's page may not use this one")
        return self.path

    def body(self, limit: int, seconds: float) -> bytes:
        """The whole body of a request. Refused before it is read if it is larger than the limit."""
        if "Transfer-Encoding" in self.headers:
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "the length of the request must be given")
        lengths = self.headers.get_all("Content-Length") or []
        if len(lengths) != 1 or not (lengths[0].isascii() and lengths[0].isdecimal()):
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "the length of the request must be given")
        if len(lengths[0]) > 12 or int(lengths[0]) > limit:
            wrong = f"too large: {limit >> 10} kB are taken"
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, wrong)
        length = int(lengths[0])
        self.source.allow(length, seconds)
        body = self.rfile.read(length) if length else b""
        if len(body) < length:
            raise Refused(HTTPStatus.BAD_REQUEST, "the request breaks off")
        return body

    def start(self) -> dict:
        """Body: length of a JSON, big-endian; the JSON; an image, if any."""
        body = self.body(JSON_BYTES + IMAGE_BYTES, UPLOADING)
        length = int.from_bytes(body[:4])
        if len(body) < 4 or length > min(JSON_BYTES, len(body) - 4):
            raise ValueError("the request is not of this page")
        asked = parse(body[4 : 4 + length])
        who = text(asked, "who", WHO)
        prompt = text(asked, "prompt", PROMPT)
        seed = asked.get("seed")
        if seed is None:
            seed = randbelow(2**32)
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise ValueError(f"the seed must be a number from 0 to {2**32 - 1}")
        content = body[4 + length :]
        with needing_room():
            image = self.server.picture(content) if content else None
            number = self.server.studio.start(who, prompt, seed, image)
        return {"video": number, "version": 0}

    def prompt(self) -> dict:
        asked = parse(self.body(JSON_BYTES, ASKING))
        who = text(asked, "who", WHO)
        return {"version": self.server.studio.change(who, text(asked, "prompt", PROMPT))}

    def stop(self) -> dict:
        self.server.studio.stop(text(parse(self.body(JSON_BYTES, ASKING)), "who", WHO))
        return {}

    # ---------------------------------------------------------------------------- what never ends

    def frames(self) -> None:
        """Frames and states, until the window is gone."""
        who = self.headers.get("X-Window", "")
        if not 8 <= len(who) <= WHO:  # other sites' pages can't send it without being asked first
            raise Refused(HTTPStatus.BAD_REQUEST, "this address is for the page alone")
        studio = self.server.studio
        try:
            window = studio.enter(who)
        except Busy as busy:
            raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, str(busy)) from busy
        try:
            self.head(200, "application/octet-stream", None)
            while not (studio.closing or self.gone()):
                ready = studio.next(window)
                if isinstance(ready, Frame):
                    self.wfile.write(frame_record(ready))
                    studio.was_sent(ready)
                else:
                    self.wfile.write(state_record(ready))
        finally:
            studio.leave(window)

    def gone(self) -> bool:
        """Whether the other side has closed. What else it sends has no meaning, so is looked at
        only for that.
        """
        self.connection.settimeout(0)
        try:
            return self.connection.recv(4096) == b""
        except BlockingIOError:
            return False
        finally:
            self.connection.settimeout(SENDING)

    def video(self) -> None:
        """What was shown so far, as a file to keep."""
        if not self.server.saving.acquire(blocking=False):
            raise Refused(HTTPStatus.CONFLICT, f"{SAVING} windows save already: try again soon")
        try:
            file, name = self.saved()
            with file:
                size = os.fstat(file.fileno()).st_size
                disposition = f'attachment; filename="{name}"'
                self.head(200, "video/mp4", size, Content_Disposition=disposition)
                while part := file.read(1 << 18):
                    self.wfile.write(part)
        finally:
            self.server.saving.release()

    def saved(self) -> tuple[BinaryIO, str]:
        """An mp4, open, which has no name on the disk any more, and a name for it."""
        try:
            with needing_room():
                path, name = self.server.studio.save()
                file = path.open("rb")
                path.unlink()
        except ValueError as wrong:
            raise Refused(HTTPStatus.NOT_FOUND, str(wrong)) from wrong
        return file, name


def parse(body: bytes) -> dict:
    """The JSON object that a request is to be. ValueError if it is something else."""
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError("the request is not JSON") from error
    if not isinstance(asked, dict):
        raise ValueError("the request is not a JSON object")
    return asked


def text(asked: dict, name: str, limit: int) -> str:
    """An entry that is a text, as UTF-8 can hold it. ValueError if it is none, or too long."""
    value = asked.get(name)
    if not isinstance(value, str):
        raise ValueError(f"the request has no {name}")
    if len(value) > limit:
        raise ValueError(f"the {name} has {len(value)} characters; {limit} are taken")
    value = value.encode("utf-8", "replace").decode().replace("\0", " ").strip()
    if not value:
        raise ValueError(f"the {name} is empty: write one first")
    return value


class Server(socketserver.ThreadingMixIn, HTTPServer):
    """The studio at an address; `serve_forever` until `shutdown`."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 32

    studio: Studio  # set before `serve_forever`

    def __init__(self, host: str = "127.0.0.1", port: int = 0):
        """port 0: any that is free. OSError if the address can't be had."""
        self.free = threading.BoundedSemaphore(CONNECTIONS)
        self.decoding = threading.BoundedSemaphore(DECODING)
        self.saving = threading.BoundedSemaphore(SAVING)
        if ":" in host:
            self.address_family = socket.AF_INET6
        name = socket.gethostname().lower()
        self.names = {"localhost", host.lower(), name, f"{name}.local"}
        super().__init__((host, port), Handler)

    def server_bind(self) -> None:
        """Without http.server's look-up of the machine's name, which may take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def address(self) -> str:
        """What to open."""
        host, port = self.server_address[:2]
        if host in ("0.0.0.0", "::"):
            host = socket.gethostname()
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"

    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        return ipaddress.ip_address(self.server_address[0]).is_loopback

    def knows(self, host: str) -> bool:
        """Whether a Host header is one of ours.

        An address is: only a name can be bound to it anew by somebody else (DNS rebinding).
        """
        try:
            address = urlsplit(f"//{host}")
            name = address.hostname or ""
            address.port  # noqa: B018 (raises for what is no number)
        except ValueError:
            return False
        with suppress(ValueError):
            ipaddress.ip_address(name)
            return True
        return name in self.names

    def process_request(self, request, client_address) -> None:
        """A thread for each connection, as long as there are not too many."""
        if not self.free.acquire(blocking=False):
            request.setblocking(False)
            with suppress(OSError):
                request.send(b"HTTP/1.1 503 Too many connections\r\nConnection: close\r\n\r\n")
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no more threads
            self.free.release()
            raise

    def process_request_thread(self, request, client_address) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()

    def picture(self, content: bytes) -> np.ndarray:
        """An uploaded image, uint8 [1, H, W, 3]. ValueError, which names no file, if it is none."""
        with self.decoding, tempfile.NamedTemporaryFile(dir=self.studio.folder) as file:
            file.write(content)
            file.flush()
            try:
                return read_image(file.name)
            except ValueError as error:
                raise ValueError(str(error).replace(f" {file.name}", "")) from error
