"""The live page without a browser: when frames are shown, who may do what, what is refused."""

import io
import json
import socket
import struct
import threading
import time

import numpy as np
import pytest
from live_parts import (
    COLOURS,
    Shown,
    Watcher,
    ask,
    change,
    drawn,
    served,
    start,
    starting,
    state_where,
    stop,
)
from PIL import Image

from wan5b.extras import server as serving
from wan5b.extras import studio as studios
from wan5b.extras.pace import LEAD, Pace

# ---------------------------------------------------------------------------------------- the pace


def run(seconds, chunks=40, count=12, fps=24, first=None):
    """Pace a model by itself: seconds(chunk) that each takes -> its pace, and for each chunk when
    it was begun and its frames' times.
    """
    pace = Pace(fps)
    now = 0.0
    made = []
    for chunk in range(chunks):
        begun = now
        now += seconds(chunk)
        dues = pace.place(first if first and chunk == 0 else count, seconds(chunk), now)
        made.append((begun, dues))
        now += pace.wait(now)
    return pace, made


@pytest.mark.parametrize("seconds", [0.05, 0.3, 0.42])
def test_a_faster_model_is_shown_at_the_videos_rate_and_waits(seconds):
    pace, made = run(lambda chunk: seconds, first=9)
    times = np.concatenate([dues for _, dues in made])
    steps = np.diff(times[24:])
    assert np.allclose(steps, 1 / 24)
    assert pace.stalls == 0
    # It is never much more ahead than a chunk takes, so a new prompt is soon to be seen: whoever
    # asks right behind a chunk's beginning waits for the next one, and that for its turn.
    begun = np.array([at for at, _ in made[10:]])
    shown = np.array([dues[0] for _, dues in made[10:]])
    assert (shown[1:] - begun[:-1]).max() < 0.5 + 1.1 * seconds + LEAD + 0.1
    assert pace.made() == pytest.approx(12 / seconds)


def test_a_prompt_is_seen_within_1100_ms_where_a_chunk_takes_300():
    _, made = run(lambda chunk: 0.3)
    worst = max(
        later[1][0] - earlier[0] for earlier, later in zip(made[5:], made[6:], strict=False)
    )
    assert worst < 1.1


@pytest.mark.parametrize("seconds", [0.7, 3.0])
def test_a_slower_model_is_shown_evenly_at_its_own_rate(seconds):
    pace, made = run(lambda chunk: seconds, first=9)
    steps = np.diff(np.concatenate([dues for _, dues in made])[24:])
    assert steps.max() - steps.min() < 0.1 * seconds / 12
    assert steps.mean() == pytest.approx(seconds / 12, rel=0.02)
    assert pace.stalls == 0


def test_a_chunk_that_comes_late_is_a_stall_and_the_next_ones_are_even_again():
    pace, made = run(lambda chunk: 2.0 if chunk == 20 else 0.3)
    assert pace.stalls == 1
    assert 0.9 < pace.stalled < 2.0
    times = np.concatenate([dues for _, dues in made])
    assert np.allclose(np.diff(times[30 * 12 :]), 1 / 24)


def test_short_first_chunks_do_not_tell_how_long_others_take():
    pace = Pace(24)
    pace.place(1, 0.01, 0.0)
    pace.place(12, 0.6, 1.0)
    assert pace.seconds == pytest.approx(0.6)
    pace.start()
    pace.place(1, 0.01, 2.0)
    assert pace.seconds == pytest.approx(0.6)


# --------------------------------------------------------------------------------------- the video


def colour(frame: Shown) -> str:
    """The name of a frame's colour, by its pixels."""
    picture = np.asarray(Image.open(io.BytesIO(frame.jpeg)).convert("RGB")).astype(int)
    middle = np.median(picture, (0, 1))
    return min(COLOURS, key=lambda name: abs(middle - COLOURS[name]).sum())


def test_frames_come_in_order_and_a_new_prompt_with_the_next_chunk():
    with served(drawn(seconds=0.02)) as server, Watcher(server) as window:
        assert start(server, "a red ball").json == {"video": 1, "version": 0}
        frames = window.frames(14)
        assert [frame.index for frame in frames] == list(range(14))
        assert np.allclose(np.diff([frame.due for frame in frames]), 1 / 24, atol=0.02)
        assert {colour(frame) for frame in frames[::6]} == {"red"}

        asked = time.monotonic()
        assert change(server, "a blue ball").json == {"version": 1}
        first = window.until(lambda ready: isinstance(ready, Shown) and ready.version == 1)
        assert colour(first) == "blue"
        assert first.index % 12 == 0
        state = window.until(lambda ready: isinstance(ready, dict) and ready["figures"]["shown"])
        assert state["figures"]["sent"] == pytest.approx(first.sent - asked, abs=0.1)
        assert state["figures"]["shown"] == pytest.approx(first.due - asked, abs=0.1)
        assert 0 < state["figures"]["first"] < 0.5
        assert stop(server).status == 200
        window.until(state_where(running=False, error=""))


def test_prompts_are_heard_when_they_come_and_their_number_is_bounded(monkeypatch):
    monkeypatch.setattr(studios, "CHANGES", 2)
    heard = []
    with served(drawn(seconds=0.01), heard=heard.append) as server, Watcher(server):
        assert change(server, "too early").status == 400
        start(server, "red")
        answers = [change(server, text) for text in ("green", "blue", "gray")]
        assert [answer.status for answer in answers] == [200, 200, 400]
        assert heard == ["red", "green", "blue"]
        start(server, "red again")
        assert change(server, "green").json == {"version": 1}


def test_an_image_is_the_first_frame():
    green = io.BytesIO()
    Image.new("RGB", (50, 30), COLOURS["green"]).save(green, "PNG")
    with served() as server, Watcher(server) as window:
        assert start(server, "a red ball", image=green.getvalue()).status == 200
        frames = window.frames(2)
        assert [colour(frame) for frame in frames] == ["green", "red"]


@pytest.mark.parametrize(
    ("prompt", "line"),
    [
        ("nan", "a chunk is not finite (damaged weights?)"),
        ("memory", "out of memory; take a smaller size (12 GiB of 8)"),
        ("bug", "KeyError: 'a fault of the model'"),
    ],
)
def test_what_goes_wrong_is_a_line_and_the_next_video_runs(prompt, line, capfd):
    with served(drawn(seconds=0.01)) as server, Watcher(server) as window:
        start(server, prompt)
        window.until(state_where(running=False, error=line))
        start(server, "a red ball")
        assert colour(window.frames(1)[0]) == "red"
        assert window.until(lambda ready: isinstance(ready, dict))["error"] == ""
    assert ("Traceback" in capfd.readouterr().err) == (prompt == "bug")


def test_who_started_a_video_directs_it_until_the_window_is_gone():
    with served(drawn(seconds=0.02), grace=0.3) as server:
        with Watcher(server, "window-b") as other:
            with Watcher(server, "window-a"):
                start(server, "a red ball")
                state = other.until(state_where(running=True, video=1, windows=2))
                assert (state["yours"], state["owner"]) == (False, False)
                for refused in (
                    start(server, "a blue ball", "window-b"),
                    change(server, "a blue ball", "window-b"),
                    stop(server, "window-b"),
                ):
                    assert refused.status == 409
                    assert "another window" in refused.json["error"]
                assert other.frames(1)[0].video == 1

            # A reload comes back in time; later it is anybody's.
            assert change(server, "a blue ball", "window-b").status == 409
            other.until(state_where(windows=1, yours=True, running=True))
            assert change(server, "a blue ball", "window-b").status == 200
            assert other.until(state_where(owner=True))["prompt"] == "a blue ball"


def test_the_last_window_that_closes_ends_the_video_after_a_while():
    with served(drawn(seconds=0.01), grace=0.3) as server:
        with Watcher(server) as window:
            start(server, "a red ball")
            window.frames(1)
        time.sleep(0.1)
        with Watcher(server) as window:  # a reload
            assert window.until(lambda ready: isinstance(ready, dict))["running"]
            window.frames(12)
        end = time.monotonic() + 5
        while server.studio.running:
            assert time.monotonic() < end
            time.sleep(0.02)
        with Watcher(server) as window:  # its last picture is still there
            assert window.frames(1)[0].video == 1


def test_a_window_that_does_not_read_loses_its_own_frames_alone(monkeypatch):
    monkeypatch.setattr(studios, "WAITING", 24)
    monkeypatch.setattr(serving, "SEND_BUFFER", 2048)
    noise = np.random.default_rng(0).integers(0, 255, (12, 96, 160, 3)).astype(np.uint8)

    def make(wish):
        while True:
            yield noise

    with served(make, fps=96) as server, Watcher(server) as window:
        lazy = socket.create_connection(("127.0.0.1", server.server_port))
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        head = f"GET /frames HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\n"
        lazy.sendall(f"{head}X-Window: window-lazy\r\n\r\n".encode())
        start(server, "noise")
        frames = window.frames(60)
        assert [frame.index for frame in frames] == list(range(60))
        (slow,) = (window for window in server.studio.windows if window.who == "window-lazy")
        assert slow.dropped > 10
        assert len(slow.frames) <= 24
        lazy.close()


# ------------------------------------------------------------------------------- strange requests


@pytest.fixture(scope="module")
def page():
    with served(drawn(seconds=0.01)) as server:
        yield server


def test_the_page_and_nothing_else_of_the_disk(page):
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/player.js", "javascript")):
        answer = ask(page, "GET", path, Origin=None)
        assert answer.status == 200
        assert kind in answer.headers["Content-Type"]
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert "unsafe" not in answer.headers["Content-Security-Policy"]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        text = answer.body.decode().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text  # no address of another place
    for path in (
        "/../server.py",
        "/page/page.js",
        "//etc/passwd",
        "/%2e%2e/server.py",
        "/page.js/",
    ):
        assert ask(page, "GET", path).status == 404


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/", {"Host": "evil.example"}, 421),
        ("GET", "/", {"Host": "evil.example:8000"}, 421),
        ("GET", "/", {"Host": None}, 421),
        ("GET", "/", {"Host": "127.0.0.1:x"}, 421),
        ("GET", "/", {"Host": "localhost:9000", "Origin": None}, 200),
        ("GET", "/", {"Host": "[::1]:8000", "Origin": None}, 200),
        ("GET", "/", {"Origin": None, "Sec-Fetch-Site": "cross-site"}, 200),  # a link
        ("GET", "/frames", {"Origin": None, "Sec-Fetch-Site": "cross-site"}, 403),
        ("GET", "/frames", {}, 400),
        ("GET", "/frames", {"X-Window": "short"}, 400),
        ("GET", "/frames", {"X-Window": "w" * 65}, 400),
        ("GET", "/video.mp4", {"Sec-Fetch-Site": "same-site"}, 403),
        ("POST", "/start", {"Origin": "http://evil.example"}, 403),
        ("POST", "/start", {"Origin": "null"}, 403),
        ("POST", "/start", {"Origin": None}, 403),
        ("POST", "/start", {"Sec-Fetch-Site": "cross-site"}, 403),
        ("POST", "/nothing", {}, 404),
        ("DELETE", "/start", {}, 501),
        ("OPTIONS", "/start", {"Origin": "http://evil.example"}, 501),
        ("POST", "/start", {"Content-Length": "-1"}, 411),
        ("POST", "/start", {"Content-Length": "1e3"}, 411),
        ("POST", "/start", {"Content-Length": "999999999"}, 413),
        ("POST", "/start", {"Content-Length": "9" * 50}, 413),
        ("POST", "/prompt", {"Content-Length": "20000"}, 413),
        ("POST", "/start", {"Transfer-Encoding": "chunked"}, 411),
        ("GET", "/", {"X-Long": "x" * 20000}, 431),
        ("GET", "/" + "x" * 20000, {}, 431),
    ],
)
def test_requests_that_are_refused_before_anything_is_done(page, method, path, headers, status):
    answer = ask(page, method, path, **headers)
    assert answer.status == status
    if status != 200:
        assert len(answer.json["error"].splitlines()) == 1
    assert page.studio.started == 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\0\0",
        b"\0\0\0\2{}",
        b"\xff\xff\xff\xff{}",
        b"\0\0\0\2[]",
        b"\0\0\0\4null",
        b"\0\0\0\3{\xff}",
        struct.pack(">I", 9000) + b"[" * 9000,
        starting("window-a", ""),
        starting("window-a", " \n\0 "),
        starting("window-a", "x" * 2001),
        starting("", "a red ball"),
        starting("w" * 65, "a red ball"),
        starting("window-a", "a red ball", seed=-1),
        starting("window-a", "a red ball", seed=2**32),
        starting("window-a", "a red ball", seed=1.5),
        starting("window-a", "a red ball", seed=True),
        starting("window-a", "a red ball", image=b"no picture"),
        starting("window-a", "a red ball", image=b"\x89PNG\r\n\x1a\n" + bytes(100)),
        starting("window-a", "a red ball", image=b"ffconcat version 1.0\nfile /etc/passwd\n"),
    ],
)
def test_bodies_that_are_refused(page, body):
    answer = ask(page, "POST", "/start", body)
    assert answer.status == 400
    (line,) = answer.json["error"].splitlines()
    assert str(page.studio.folder) not in line
    assert page.studio.started == 0


def test_prompts_of_any_unicode():
    texts = [
        "日本語 \U0001f98a",
        "e\u0301\u202e\u0000x",
        "<script>alert(1)</script>",
        "\ud800 lone",
    ]
    with served() as server, Watcher(server) as window:
        for text in texts:
            assert start(server, text).status == 200
            there = lambda ready: isinstance(ready, dict) and ready["running"]  # noqa: E731
            prompt = window.until(there)["prompt"]
            assert prompt == text.encode("utf-8", "replace").decode().replace("\0", " ")
            stop(server)
            window.until(state_where(running=False))


def raw(server, content: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=5) as connection:
        connection.sendall(content)
        parts = []
        while part := connection.recv(4096):
            parts.append(part)
        return b"".join(parts)


@pytest.mark.parametrize(
    "content",
    [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(60, 120)) + b"\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_no_request_of_http(page, content):
    answer = raw(page, content)
    assert not answer or answer.startswith(b"HTTP/1.1 4") or answer.startswith(b"HTTP/1.1 5")
    assert ask(page, "GET", "/").status == 200


def test_slow_requests_and_too_many(monkeypatch, capfd):
    monkeypatch.setattr(serving, "ASKING", 0.3)
    monkeypatch.setattr(serving, "CONNECTIONS", 4)
    with served() as server:
        begun = time.monotonic()
        held = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(4)]
        for connection in held:
            connection.sendall(b"GET / HTTP/1.1\r\nX: ")
        time.sleep(0.05)
        assert b"503" in raw(server, b"")
        # One byte at a time does not help: the whole request has one limit.
        while time.monotonic() < begun + 0.25:
            held[0].sendall(b"y")
            time.sleep(0.02)
        for connection in held:
            connection.settimeout(5)
            assert connection.recv(100) == b""
            connection.close()
        assert time.monotonic() - begun < 2
        assert ask(server, "GET", "/").status == 200
    assert "Traceback" not in capfd.readouterr().err


def test_threads_end_with_their_windows():
    before = threading.active_count()
    with served(drawn(seconds=0.01)) as server:
        for _ in range(5):
            with Watcher(server) as window:
                start(server, "a red ball")
                window.frames(1)
        assert json.loads(ask(server, "GET", "/nothing").body)["error"]
    end = time.monotonic() + 5
    while threading.active_count() > before:
        assert time.monotonic() < end, threading.enumerate()
        time.sleep(0.02)
