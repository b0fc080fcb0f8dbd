"""What the live page keeps of a video: while it runs and after, when full, on a full disk."""

import io
import resource
import time

import av
import numpy as np
from live_parts import Watcher, ask, drawn, served, start, starting, state_where, stop

from wan5b.extras.recording import Recording


def decoded(content) -> list[tuple[float, np.ndarray]]:
    with av.open(content) as file:
        return [(frame.time, frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]


def test_a_video_is_saved_while_it_runs_and_after(tmp_path):
    with served(drawn(seconds=0.01), fps=96) as server, Watcher(server) as window:
        assert ask(server, "GET", "/video.mp4").status == 404
        start(server, "a red ball", seed=7)
        window.until(lambda ready: isinstance(ready, dict) and ready.get("kept", 0) >= 24)
        running = ask(server, "GET", "/video.mp4")
        assert running.headers["Content-Disposition"] == 'attachment; filename="wan5b-1-seed-7.mp4"'
        window.frames(24)
        stop(server)
        state = window.until(state_where(running=False))
        time.sleep(0.3)
        whole = ask(server, "GET", "/video.mp4")

        shorter, longer = (decoded(io.BytesIO(answer.body)) for answer in (running, whole))
        assert len(shorter) >= 24
        assert len(shorter) + 6 < len(longer) <= state["frames"]
        assert np.allclose([at for at, _ in longer], np.arange(len(longer)) / 96, atol=1e-3)
        for i, (_, picture) in enumerate(longer):
            bar = picture[:, :, 1].mean(0).argmax()  # red has little green, the bar much
            assert abs(int(bar) - i) <= 1
        folder = server.studio.folder
        assert not list(folder.rglob("saved*"))
    assert not folder.exists()


def test_a_recording_ends_where_it_is_full_or_stopped(tmp_path):
    frames = np.zeros((12, 32, 32, 3), np.uint8)
    now = time.monotonic()
    full = Recording(tmp_path / "full", 24, seconds=0.75)
    for _ in range(3):
        full.add(frames, [now] * 12)
    cut = Recording(tmp_path / "cut", 24)
    cut.add(frames, [now] * 5 + [now + 60] * 7)
    cut.stop()
    for recording, count in ((full, 18), (cut, 5)):
        recording.close()
        assert recording.count == count
        assert len(decoded(str(recording.save()))) == count
    assert full.full
    assert not cut.full


def test_a_full_disk_ends_the_recording_alone(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wan5b.extras.recording.VideoWriter", full)
    with served(drawn(seconds=0.01), fps=96) as server, Watcher(server) as window:
        start(server, "a red ball")
        lost = lambda ready: isinstance(ready, dict) and ready.get("lost")  # noqa: E731
        assert "No space left" in window.until(lost)["lost"]
        window.frames(12)
        assert ask(server, "GET", "/video.mp4").status == 404


def test_what_a_full_disk_has_kept_can_be_saved(tmp_path):
    """Without an error that would end the studio, and as far as it was written."""
    frames = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), np.uint8)
    recording = Recording(tmp_path / "video", 24)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, limits[1]))
    try:
        end = time.monotonic() + 20
        while not recording.error and time.monotonic() < end:
            recording.add(frames, [0.0] * 12)
        recording.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert recording.error.startswith("what is shown is no longer kept: ")
    shown = decoded(str(recording.save()))
    assert 12 < len(shown) <= recording.count
    assert np.allclose([at for at, _ in shown], np.arange(len(shown)) / 24, atol=1e-3)


def test_a_disk_without_room_is_said(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with served(drawn(seconds=0.01), fps=96) as server, Watcher(server):
        monkeypatch.setattr(server.studio, "save", full)
        answer = ask(server, "GET", "/video.mp4")
        assert answer.status == 507
        assert b"No space left" in answer.body
        monkeypatch.setattr("wan5b.extras.studio.Recording", full)
        answer = ask(server, "POST", "/start", starting("window-a", "a red ball"))
        assert answer.status == 507
        assert b"No space left" in answer.body
