"""Images and videos of any origin, local files only -> frames uint8 [T, H, W, 3].

All come upright, in square pixels, in sRGB, on white; frames of videos are chosen by their own
times. Whatever is wrong with a file is one ValueError: "cannot read the video PATH: REASON".
"""

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from wan5b.extras import videos
from wan5b.extras.stills import read_still
from wan5b.extras.videos import Shown
from wan5b.util import first_line, raise_interrupted


def read_image(path: str | Path) -> np.ndarray:
    """An image file as uint8 [1, H, W, 3]; of an animation or a video the first frame.

    ValueError if unreadable.
    """
    with _reading("image", path):
        picture = read_still(path)
        if picture is None:
            picture = next(videos.frames(path)).picture
        return picture[None]


def read_video(path: str | Path, last: int | None = None, fps: float | None = None) -> np.ndarray:
    """The frames of a video file, or its `last` ones, as uint8 [T, H, W, 3].

    fps: take the frames nearest in time at this rate, with `last` up to the very last; None for all
    that are there. ValueError if unreadable or shorter.
    """
    shown = video_frames(path)
    if fps is None:
        taken = deque((frame.picture for frame in shown), maxlen=last)
        rate = ""
    else:
        taken = _at_rate(shown, fps) if last is None else _last_at_rate(shown, fps, last)
        taken = list(taken)
        rate = f" at {fps:g} fps"

    needed = last or 1
    if len(taken) < needed:
        raise ValueError(f"{path} has {len(taken)} frames{rate}, {needed} are needed")
    return np.stack(taken)


def read_clips(path: str | Path, frames: int, fps: float) -> Iterator[np.ndarray]:
    """The consecutive clips of a video, read as they are asked for: uint8 [frames, H, W, 3] each.

    path: a video file, of which the frames nearest to the times k / fps are taken; or a folder of
    images of one size, sorted by length of name, then name, all taken. What is left over at the end
    is dropped. ValueError if unreadable, or too short for one clip.
    """
    source = _images(path) if Path(path).is_dir() else _at_rate(video_frames(path), fps)

    clip = []
    taken = 0  # over all clips
    for picture in source:
        clip.append(picture)
        taken += 1
        if len(clip) == frames:
            yield np.stack(clip)
            clip = []
    if taken < frames:
        raise ValueError(f"{path} has {taken} frames at {fps:g} fps, fewer than {frames}")


def video_frames(path: str | Path) -> Iterator[Shown]:
    """The frames of a video file and their times, one by one. ValueError if unreadable."""
    with _reading("video", path):
        yield from videos.frames(path)


def _images(folder: str | Path) -> Iterator[np.ndarray]:
    """The images of a folder, uint8 [H, W, 3] each. ValueError unless all are of one size."""
    with _reading("folder", folder):
        files = sorted(Path(folder).glob("[!.]*"), key=lambda file: (len(file.name), file.name))
    first = None
    for file in files:
        picture = read_image(file)[0]
        if first is None:
            first = picture.shape
        if picture.shape != first:
            sizes = f"{picture.shape[0]}x{picture.shape[1]}, {files[0].name} {first[0]}x{first[1]}"
            raise ValueError(f"the images of {folder} differ in size: {file.name} is {sizes}")
        yield picture


# ------------------------------------------------------------------------------------------ errors


@contextmanager
def _reading(what: str, path: str | Path) -> Iterator[None]:
    """Foreign readers raise what no list foresees: here all of it becomes one ValueError."""
    try:
        if not Path(path).exists():
            raise ValueError("there is no such file here (addresses are not opened)")
        if what != "folder" and not Path(path).is_file():
            raise ValueError("it is no file")
        yield
    except Exception as error:
        raise_interrupted(error)
        reason = first_line(error) or type(error).__name__
        if isinstance(error, OSError | av.FFmpegError) and error.strerror:
            reason = error.strerror
        raise ValueError(f"cannot read the {what} {path}: {reason}") from error


# -------------------------------------------------------------------------------------------- time


def _at_rate(shown: Iterator[Shown], fps: float) -> Iterator[np.ndarray]:
    """The frames nearest to the times k / fps; the later one if two are equally near."""
    interval = _interval(fps)
    k = 0
    for frame in shown:
        while k * interval < frame.until:
            yield frame.picture
            k += 1


def _last_at_rate(shown: Iterator[Shown], fps: float, count: int) -> list[np.ndarray]:
    """The frames nearest to the `count` times, 1 / fps apart, that end with the video."""
    interval = _interval(fps)
    kept = deque()
    for frame in shown:
        kept.append(frame)
        # Two more than enough: the last frame may be shown for long.
        while len(kept) > 2 and kept[0].until <= frame.start - count * interval:
            kept.popleft()
    if not kept:
        return []

    # A last frame that is shown for longer than the one before goes on to the video's end.
    end = kept[-1].start
    if len(kept) > 1:
        end = max(end, kept[-1].until - (kept[-1].start - kept[-2].start) / 2)

    taken = []
    for k in reversed(range(count)):
        time = end - k * interval
        if time >= -interval / 2:
            # Of damaged videos two frames may have one time, and the end be no frame's.
            taken.append(next((frame for frame in kept if time < frame.until), kept[-1]))
    return [frame.picture for frame in taken]


def _interval(fps: float) -> Fraction:
    if not 0 < fps < math.inf:
        raise ValueError(f"{fps} frames a second: it must be a number above 0")
    return 1 / Fraction(fps)
