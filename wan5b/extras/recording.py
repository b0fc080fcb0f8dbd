"""What was shown of a live video, on the disk as it grows, for saving at any time as an mp4.

It lies in parts: whoever saves ends the part at work and joins all of them without encoding anew.
"""

import threading
import time
from collections import deque
from pathlib import Path

import av
import numpy as np
import torch

from wan5b.extras import remux
from wan5b.extras.mp4 import VideoWriter
from wan5b.util import first_line

SECONDS = 600  # that are kept, at the video's rate
WAITING = 6  # chunks that may wait to be written; then the model waits
FAULTS = (OSError, ValueError, av.FFmpegError)  # of writing: a full disk, say


class Recording:
    """One video's. A thread of its own writes each chunk when it has been shown."""

    def __init__(self, folder: Path, fps: int, seconds: float = SECONDS):
        folder.mkdir()
        self.folder = folder
        self.fps = fps
        self.room = round(seconds * fps)  # frames that may still be kept
        self.count = 0  # that are written
        self.error = ""  # why it has ended early, if it has
        self.parts: list[Path] = []
        self.writer: VideoWriter | None = None
        self.files = threading.Lock()  # of parts and writer
        self.waiting: deque[tuple[np.ndarray, list[float]]] = deque()
        self.stopped: float | None = None  # since when nothing is shown any more
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, name="recording", daemon=True)
        self.thread.start()

    @property
    def full(self) -> bool:
        return self.room <= 0

    def add(self, frames: np.ndarray, dues: list[float]) -> None:
        """Frames uint8 [T, H, W, 3] and when each is shown, by time.monotonic.

        Waits while too much waits to be written; it never waits for more than a second.
        """
        with self.changed:
            self.changed.wait_for(lambda: len(self.waiting) < WAITING, timeout=1)
            if len(self.waiting) < WAITING:
                self.waiting.append((frames, dues))
            elif not self.error:
                self.error = "the disk or the processor is too slow to keep it"
            self.changed.notify_all()

    def stop(self) -> None:
        """Nothing is shown from now on. What was before is still written."""
        with self.changed:
            if self.stopped is None:
                self.stopped = time.monotonic()
            self.changed.notify_all()

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(self._ready, timeout=0.1)
                if not self.waiting and self.stopped is not None:
                    return
                if not self._ready():
                    continue
                frames, dues = self.waiting.popleft()
                if self.stopped is not None:
                    frames = frames[: sum(due <= self.stopped for due in dues)]
                self.changed.notify_all()
            self._write(frames[: max(self.room, 0)])

    def _ready(self) -> bool:
        """Whether the next chunk has been shown, or will never be to its end."""
        if not self.waiting:
            return False
        _, dues = self.waiting[0]
        return self.stopped is not None or dues[-1] <= time.monotonic()

    def _write(self, frames: np.ndarray) -> None:
        if self.error or not len(frames):
            return
        try:
            with self.files:
                if self.writer is None:
                    path = self.folder / f"part-{len(self.parts)}.mp4"
                    self.writer = VideoWriter(path, self.fps)
                self.writer.add(torch.from_numpy(frames))
            self.room -= len(frames)
            self.count += len(frames)
        except FAULTS as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.error = self.error or f"what is shown is no longer kept: {first_line(error)}"

    def save(self) -> Path | None:
        """An mp4 of what has been shown and written so far, or None if that is nothing.

        It is the caller's to remove. OSError if the disk is full.
        """
        with self.files:
            self._end_part()
            if not self.parts:
                return None
            target = self.folder / f"saved-{time.monotonic_ns()}.mp4"
            try:
                join(self.parts, target)
            except FAULTS as error:
                target.unlink(missing_ok=True)
                raise OSError(f"cannot save the video: {first_line(error)}") from error
            return target

    def close(self) -> None:
        """End the thread and the part at work. It raises nothing: what goes wrong is in `error`."""
        self.stop()
        self.thread.join(timeout=10)
        with self.files:
            self._end_part()

    def _end_part(self) -> None:
        """It becomes one of the parts; where the disk was full, as far as it is there."""
        writer = self.writer
        if writer is None:
            return
        self.writer = None
        try:
            writer.close()
        except FAULTS as error:
            self._give_up(error)
            if not has_header(writer.where):
                return
        self.parts.append(writer.where)


def has_header(path: Path) -> bool:
    """Whether so much of an mp4 is there that it can be read at all."""
    try:
        with av.open(str(path)):
            return True
    except (OSError, av.FFmpegError):
        return False


def join(parts: list[Path], target: Path) -> None:
    """One mp4 of several by the same encoder, packet by packet: no picture changes.

    A part may break off, where the disk was full.
    """
    with av.open(str(target), "w", options={"movflags": "+faststart"}) as out:
        stream = None
        start = 0  # of the part, in units of the stream's time
        for part in parts:
            with av.open(str(part)) as file:
                source = file.streams.video[0]
                if stream is None:
                    stream = out.add_stream_from_template(source)
                    stream.time_base = source.time_base
                end = start
                for packet in remux.whole_packets(file):
                    packet.pts += start
                    packet.dts += start
                    end = max(end, packet.pts + packet.duration)
                    packet.stream = stream
                    out.mux(packet)
                start = end
