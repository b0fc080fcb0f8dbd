"""One live video at a time, made for ever under a prompt that may change, and who watches it.

`make(wish)` gives its frames chunk by chunk; a thread asks for them, no further ahead of the
display than the next chunk needs (pace.py), turns them into JPEGs, keeps what was shown
(recording.py), and lays it out for the windows that watch. server.py is what they speak to.

All that threads share is changed under one lock, and every wait has an end.
"""

import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from wan5b.extras.cli import is_out_of_memory
from wan5b.extras.pace import Pace
from wan5b.extras.recording import Recording
from wan5b.util import first_line

QUALITY = 85  # of JPEGs: at 95 twice the bytes, and no difference to see on moving pictures
WAITING = 240  # frames that may wait for one window; then the oldest are dropped for it
LATE = 0.5  # seconds behind its time at which a frame is not worth sending
GRACE = 5.0  # seconds that a window may be gone: a reload takes one
WINDOWS = 16
CHANGES = 10_000  # of one video's prompt
BEAT = 0.5  # seconds, at most, between two words to a window
ENCODERS = 4  # threads


class Busy(ValueError):
    """Somebody else is at it."""


class Frame(NamedTuple):
    """What is sent to a window of one frame."""

    video: int
    index: int
    version: int  # of the prompt that it was made under
    due: float  # when it is shown, by time.monotonic
    jpeg: bytes


class Window:
    """One that watches. Its connection's thread takes from here what the studio lays out."""

    def __init__(self, who: str):
        self.who = who
        self.frames: deque[Frame] = deque()
        self.news = True  # whether the state has changed since it was told
        self.told = 0.0  # when it was, last
        self.dropped = 0
        self.open = True


class Wish:
    """What a video is to show: its seed, its first frame, and a prompt that changes.

    make(wish) calls `prompt()` when it begins a chunk.
    """

    def __init__(self, prompt: str, seed: int, image: np.ndarray | None, lock: threading.Condition):
        self.seed = seed
        self.image = image  # uint8 [1, H, W, 3], of any size
        self.lock = lock
        self.prompts = [prompt]  # the version of a prompt is its place here
        self.arrived = {0: time.monotonic()}  # version -> when
        self.in_force = 0
        self.version = 0  # that the frames handed out last were made under: an earlier one, maybe
        self.stopped = False

    def prompt(self, ready: Callable[[str], bool] = lambda text: True) -> str:
        """The prompt in force from here on: the newest, or the newest of which `ready` is true."""
        with self.lock:
            newer = list(enumerate(self.prompts))[self.in_force + 1 :]
        for version, text in reversed(newer):
            if ready(text):
                with self.lock:
                    self.in_force = self.version = version
                break
        return self.prompts[self.in_force]


class Video:
    """A wish that is being made, and what there is to know of it."""

    def __init__(self, number: int, wish: Wish, who: str, recording: Recording):
        self.number = number
        self.wish = wish
        self.who = who  # controls it
        self.recording = recording
        self.frames = 0  # that are made
        self.first: float | None = None  # seconds from its start to its first frame's display
        self.sent: float | None = None  # seconds from the last change's arrival to its frame's ...
        self.shown: float | None = None  # ... being sent first, and its display
        self.measured = 0  # the last version that these are of
        self.left_since: float | None = None  # since when nobody watches


class Studio:
    """See above. A context manager: its thread, and its folder of temporary files, end with it."""

    def __init__(
        self,
        make: Callable[[Wish], Iterator[np.ndarray]],
        size: tuple[int, int],
        fps: int,
        seconds: float | None = None,
        memory: Callable[[], dict[str, int]] = dict,
        heard: Callable[[str], None] = lambda prompt: None,
        is_ahead: bool = False,
        grace: float = GRACE,
        example: str = "A red fox in deep snow, morning light",
    ):
        """make(wish) -> uint8 frames [T, H, W, 3], chunk by chunk, always called in one thread.

        size: height and width. seconds: what a chunk takes, if known. memory: bytes in use, by
        name. heard: called with each prompt as it comes, so that what it needs can be begun.
        is_ahead: see Pace. grace: seconds that windows may be gone. example: of a prompt, for who
        has none yet.
        """
        self.make = make
        self.size = size
        self.fps = fps
        self.memory = memory
        self.heard = heard
        self.grace = grace
        self.example = example
        self.pace = Pace(fps, seconds, is_ahead)
        self.changed = threading.Condition()  # the lock, and word that something has changed
        self.windows: list[Window] = []
        self.gone: dict[str, float] = {}  # who -> when their last window went
        self.video: Video | None = None  # being made, or the last one
        self.last: Frame | None = None  # laid out, of whichever video
        self.running = False
        self.error = ""
        self.closing = False
        self.started = 0  # videos so far

    def __enter__(self) -> "Studio":
        self.folder = Path(tempfile.mkdtemp(prefix="wan5b-live-"))
        self.encoders = ThreadPoolExecutor(ENCODERS, "encode")
        self.deliverer = ThreadPoolExecutor(1, "deliver")
        self.thread = threading.Thread(target=self._work, name="studio", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_) -> None:
        with self.changed:
            self.closing = True
            self._stop()
            self._tell()
        try:
            # A chunk at work is finished first: a thread that is inside a GPU's library can't be
            # ended.
            self.thread.join(timeout=60)
            self.deliverer.shutdown(cancel_futures=True)
            self.encoders.shutdown(cancel_futures=True)
            if self.video:
                self.video.recording.close()
        finally:  # a second Ctrl-C comes here at once
            shutil.rmtree(self.folder, ignore_errors=True)

    # ----------------------------------------------------------------------------------- control

    def start(self, who: str, prompt: str, seed: int, image: np.ndarray | None = None) -> int:
        """A new video, in place of the one at work -> its number. Busy if that is another's."""
        with self.changed:
            self._check_control(who)
            self._stop()
            self.started += 1
            old = self.video
            wish = Wish(prompt, seed, image, self.changed)
            self.heard(prompt)
            recording = Recording(self.folder / f"video-{self.started}", self.fps)
            self.video = Video(self.started, wish, who, recording)
            self.running = True
            self.error = ""
            self._tell()
            number = self.started
        if old:
            old.recording.close()
            shutil.rmtree(old.recording.folder, ignore_errors=True)
        return number

    def change(self, who: str, prompt: str) -> int:
        """Another prompt, from the next chunk on -> its version. Busy if the video is another's."""
        with self.changed:
            if not self.running:
                raise ValueError("no video is running: start one")
            self._check_control(who)
            wish = self.video.wish
            if len(wish.prompts) > CHANGES:
                raise ValueError(f"the prompt has changed {CHANGES} times: start a new video")
            self.heard(prompt)
            self.video.who = who
            wish.prompts.append(prompt)
            wish.arrived[len(wish.prompts) - 1] = time.monotonic()
            self._tell()
            return len(wish.prompts) - 1

    def stop(self, who: str) -> None:
        """End the video. Busy if it is another's."""
        with self.changed:
            self._check_control(who)
            self._stop()
            self._tell()

    def _check_control(self, who: str) -> None:
        if self.running and not self._may(who):
            raise Busy("another window directs this video: watch it, or wait until it has ended")

    def _may(self, who: str) -> bool:
        """Who started a video controls it; anybody does when that one's windows are gone."""
        owner = self.video.who
        if who == owner:
            return True
        here = any(window.who == owner for window in self.windows)
        return not here and time.monotonic() - self.gone.get(owner, 0.0) > self.grace

    def _stop(self) -> None:
        if self.running:
            self.running = False
            self.video.wish.stopped = True
            self.video.recording.stop()
            for window in self.windows:
                window.frames.clear()

    # ---------------------------------------------------------------------------------- watching

    def enter(self, who: str) -> Window:
        """A window opens. Busy if there are too many."""
        with self.changed:
            if len(self.windows) >= WINDOWS:
                raise Busy(f"{WINDOWS} windows watch already")
            window = Window(who)
            self.windows.append(window)
            if self.last:
                window.frames.append(self.last._replace(due=time.monotonic()))
            self._tell()
            return window

    def leave(self, window: Window) -> None:
        with self.changed:
            window.open = False
            self.windows.remove(window)
            self.gone.pop(window.who, None)  # so that the newest stand last
            self.gone[window.who] = time.monotonic()
            while len(self.gone) > 100:
                self.gone.pop(next(iter(self.gone)))
            self._tell()

    def next(self, window: Window) -> Frame | dict:
        """What a window is to be sent now: a frame, or its state, which it gets at least each BEAT
        seconds.
        """
        with self.changed:
            self.changed.wait_for(lambda: window.news or window.frames or self.closing, BEAT)
            now = time.monotonic()
            while window.frames and not window.news and now - window.told < BEAT:
                frame = window.frames.popleft()
                if frame.due > now - LATE:
                    return frame
                window.dropped += 1
            window.news = False
            window.told = now
            return self.state(window)

    def was_sent(self, frame: Frame) -> None:
        """Measure, at the first frame of a video and at the first one under each new prompt."""
        with self.changed:
            video = self.video
            if frame.video != video.number or self._measured(frame):
                return
            now = time.monotonic()
            shown = max(frame.due, now)
            if video.first is None:
                video.first = shown - video.wish.arrived[0]
            if frame.version > 0:
                video.sent = now - video.wish.arrived[frame.version]
                video.shown = shown - video.wish.arrived[frame.version]
            video.measured = frame.version
            self._tell()

    def _measured(self, frame: Frame) -> bool:
        video = self.video
        return video.first is not None and frame.version <= video.measured

    def state(self, window: Window) -> dict:
        """What a window shows beside frames."""
        with self.changed:
            video = self.video
            now = time.monotonic()
            figures = self.pace.figures()
            figures |= {"ahead": round(self.pace.ahead(now), 3) if self.running else 0}
            figures |= {"memory": self.memory(), "dropped": window.dropped}
            state = {"size": self.size, "fps": self.fps, "error": self.error}
            state |= {"running": self.running, "windows": len(self.windows), "figures": figures}
            state |= {"video": 0, "yours": True, "now": now, "example": self.example}
            if video is None:
                return state

            recording = video.recording
            state |= {"video": video.number, "seed": video.wish.seed, "frames": video.frames}
            state |= {"prompt": video.wish.prompts[-1], "version": len(video.wish.prompts) - 1}
            state |= {"yours": not self.running or self._may(window.who)}
            state |= {"owner": video.who == window.who, "image": video.wish.image is not None}
            state |= {"kept": recording.count, "full": recording.full, "lost": recording.error}
            figures |= {"first": video.first, "sent": video.sent, "shown": video.shown}
            return state

    def save(self) -> tuple[Path, str]:
        """An mp4 of what was shown so far, which is the caller's to remove, and a name for it.

        ValueError if there is nothing; OSError if the disk is full.
        """
        with self.changed:
            video = self.video
        path = video.recording.save() if video else None
        if path is None:
            raise ValueError("nothing has been shown yet that could be saved")
        return path, f"wan5b-{video.number}-seed-{video.wish.seed}.mp4"

    def _tell(self) -> None:
        """Every window has news."""
        for window in self.windows:
            window.news = True
        self.changed.notify_all()

    # ------------------------------------------------------------------------------------ making

    def _work(self) -> None:
        """The thread: video after video."""
        while not self.closing:
            with self.changed:
                self.changed.wait_for(lambda: self.running or self.closing, timeout=1)
                video = self.video if self.running else None
            if video is not None and not self.closing:
                self._watch_over(video)

    def _watch_over(self, video: Video) -> None:
        """Make a video; what goes wrong is a line on the page, and the studio is ready again."""
        error = ""
        try:
            self._make(video)
        except Exception as wrong:  # the studio goes on, whatever a model raises
            error = self._line(wrong)
        with self.changed:
            if video is self.video:
                if error:
                    self.error = error
                self._stop()
            self._tell()

    def _line(self, wrong: Exception) -> str:
        """What is said of it on the page; of a fault of the program the terminal has the rest."""
        line = first_line(wrong) or type(wrong).__name__
        if is_out_of_memory(wrong):
            return f"out of memory; take a smaller size ({line})"
        if isinstance(wrong, ValueError | OSError | FloatingPointError):
            return line
        traceback.print_exception(wrong, file=sys.stderr)
        return f"{type(wrong).__name__}: {line}"

    def _make(self, video: Video) -> None:
        """Until it is stopped, or nobody watches, or `make` has no more."""
        with self.changed:
            self.pace.start()
        chunks = iter(self.make(video.wish))
        delivered: Future | None = None
        try:
            while True:
                begun = time.monotonic()
                frames = next(chunks, None)
                if frames is None or video.wish.stopped:
                    break
                with self.changed:
                    now = time.monotonic()
                    dues = self.pace.place(len(frames), now - begun, now)
                    first = video.frames
                    video.frames += len(frames)
                if delivered is not None:
                    delivered.result()
                delivered = self.deliverer.submit(
                    self._deliver, video, frames, first, video.wish.version, dues
                )
                video.recording.add(frames, dues)
                if not self._may_go_on(video):
                    break
        finally:
            if hasattr(chunks, "close"):
                chunks.close()
        if delivered is not None:
            delivered.result()
        self._show_rest(video)

    def _show_rest(self, video: Video) -> None:
        """Where `make` has come to its end: what it made is shown before the video is over."""
        with self.changed:
            left = self.pace.ahead(time.monotonic())
            self.changed.wait_for(lambda: video.wish.stopped, timeout=left)

    def _may_go_on(self, video: Video) -> bool:
        """Wait until the next chunk is to be begun -> whether it is."""
        with self.changed:
            while not video.wish.stopped:
                now = time.monotonic()
                if self.windows:
                    video.left_since = None
                elif video.left_since is None:
                    video.left_since = now
                elif now - video.left_since > self.grace:
                    return False
                wait = self.pace.wait(now)
                if wait <= 0:
                    return True
                self.changed.wait(min(wait, 1.0))
            return False

    def _deliver(self, video: Video, frames, first: int, version: int, dues: list[float]) -> None:
        """Turn a chunk into JPEGs, by several threads, and lay them out in order."""
        jpegs = self.encoders.map(self._jpeg, frames)
        for i, (jpeg, due) in enumerate(zip(jpegs, dues, strict=True)):
            with self.changed:
                if video.wish.stopped:
                    return
                frame = self.last = Frame(video.number, first + i, version, due, jpeg)
                for window in self.windows:
                    window.frames.append(frame)
                    if len(window.frames) > WAITING:
                        window.frames.popleft()
                        window.dropped += 1
                self.changed.notify_all()

    def _jpeg(self, frame: np.ndarray) -> bytes:
        # Into a file, since Pillow lets other threads run only while it writes to one.
        with tempfile.TemporaryFile(dir=self.folder) as file:
            Image.fromarray(frame).save(file, "JPEG", quality=QUALITY)
            file.seek(0)
            return file.read()
