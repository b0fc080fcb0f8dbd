"""Pixels in and out: sizes; images and videos from files, fitted to a size; mp4 as it is generated; contact sheets.

Frames are uint8 [T, H, W, 3] outside, pixels in [-1, 1] as [C, T, H, W] inside.
"""

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
import torch
from imageio.plugins.pillow import PillowPlugin
from PIL import Image, ImageOps
from torch import Tensor

UNREADABLE = (
    OSError,
    ValueError,
    IndexError,
)  # no such file, no backend reads it; PyAV: damaged, no picture in it
# PyAV: damaged otherwise, an unknown codec; Pillow: damaged, 180 megapixels or more.
UNREADABLE += (av.FFmpegError, AttributeError, SyntaxError, Image.DecompressionBombError)


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def read_image(path: str | Path) -> np.ndarray:
    """An image file (any format imageio reads; the first frame of an animation) as uint8 [1, H, W, 3], upright."""
    try:
        with iio.imopen(path, "r") as file:
            if not isinstance(file, PillowPlugin):
                return np.stack([*islice(video_frames(path), 1)])
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits gray, which Pillow would clip
                image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))[None]
    except UNREADABLE as error:
        raise ValueError(f"cannot read the image {path}: {first_line(error)}") from error


def video_frames(path: str | Path) -> Iterator[np.ndarray]:
    """The frames of a video file, uint8 [H, W, 3] each, upright: a phone stores them as its sensor lies."""
    with av.open(str(Path(path).absolute())) as file:  # a bare a:b.mp4 would be a URL
        file.streams.video[0].thread_type = "AUTO"
        for frame in file.decode(video=0):
            yield np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


def read_video(path: str | Path, last: int | None = None) -> np.ndarray:
    """The frames of a video file, or its `last` ones, as uint8 [T, H, W, 3]. ValueError if unreadable or shorter."""
    try:
        frames = deque(video_frames(path), maxlen=last)
    except UNREADABLE as error:
        raise ValueError(f"cannot read the video {path}: {first_line(error)}") from error
    if len(frames) < (last or 1):
        raise ValueError(f"{path} has {len(frames)} frames, {last or 1} are needed")
    return np.stack(frames)


def nearest(value: int, step: int, least: int) -> str:
    """The values of least, least + step, ... next to `value`, for error messages."""
    low = least + max((value - least) // step, 0) * step
    return f"{low} or {low + step}"


def latent_frames(frames: int) -> int:
    """How many latent frames that many pixel frames make. ValueError unless they are 4k + 1."""
    if frames < 1 or frames % 4 != 1:
        raise ValueError(f"{frames} frames are not 4k + 1; nearest valid: {nearest(frames, 4, 1)}")
    return (frames + 3) // 4


def parse_size(text: str) -> tuple[int, int]:
    """Text like 704x1280 -> (height, width) in pixels. ValueError unless both are multiples of 32."""
    sides = [int(side) if side.isdecimal() else 0 for side in text.lower().split("x")]
    if len(sides) != 2 or any(side < 1 or side % 32 for side in sides):
        valid = " by ".join(nearest(side, 32, 32) for side in sides)
        raise ValueError(
            f"size {text} is not HEIGHTxWIDTH in multiples of 32; nearest valid: {valid}"
        )
    return sides[0], sides[1]


def fitting_size(
    height: int, width: int, area: int = 704 * 1280, step: int = 32
) -> tuple[int, int]:
    """The (height, width) for a picture of this shape: multiples of step, at most `area`, nearest aspect ratio."""
    ratio = width / height
    ideal_width = min(
        max((area * ratio) ** 0.5, step), area / step
    )  # extreme shapes: at least one step high, wide

    def floor(x):
        return max(int(x // step * step), step)

    w1, h2 = floor(ideal_width), floor(area / ideal_width)
    sizes = [
        (floor(area / w1), w1),
        (h2, floor(area / h2)),
    ]  # width first; height first, which wins a tie
    return min(reversed(sizes), key=lambda s: max(ratio * s[0] / s[1], s[1] / s[0] / ratio))


def fit(frames: np.ndarray, height: int, width: int) -> Tensor:
    """uint8 [T, h, w, 3] -> pixels [3, T, height, width] in [-1, 1]: scaled to cover (Lanczos), centre-cropped."""
    h, w = frames.shape[1:3]
    scale = max(height / h, width / w)
    size = max(round(w * scale), width), max(round(h * scale), height)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    resized = (Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in frames)
    cropped = np.stack(
        [np.asarray(image)[top : top + height, left : left + width] for image in resized]
    )
    return torch.from_numpy(cropped).permute(3, 0, 1, 2).float() / 127.5 - 1


def to_frames(pixels: Tensor) -> Tensor:
    """Pixels [3, T, H, W], not clamped -> uint8 [T, H, W, 3], on the same device."""
    return (
        pixels.float()
        .clamp(-1, 1)
        .add(1)
        .mul(127.5)
        .round()
        .to(torch.uint8)
        .permute(1, 2, 3, 0)
        .contiguous()
    )


class VideoWriter:
    """An mp4 that grows by chunks of frames while the next ones are computed; encoding runs in a thread of its own.

    Written beside as *.partial.mp4 and renamed by `close`, which may be called at any time and leaves what was added.
    """

    def __init__(self, path: str | Path, fps: int = 24, keep: set[int] = frozenset()):
        """keep: indices of frames to remember for a contact sheet."""
        self.path, self.partial = Path(path), Path(path).with_suffix(".partial.mp4")
        self.count, self.keep, self.kept = 0, keep, []
        self.file = iio.imopen(self.partial, "w", plugin="pyav")
        self.file.init_video_stream("libx264", fps=fps, pixel_format="yuv420p")
        self.thread = ThreadPoolExecutor(1)
        self.pending = self.thread.submit(
            lambda: None
        )  # the encoding of the last chunk; none so far

    def add(self, frames: Tensor) -> None:
        """Append uint8 frames [T, H, W, 3]. Returns at once, unless the chunk before is still being encoded."""
        host = frames.to("cpu", non_blocking=True, copy=True)  # of a GPU's: into pinned memory
        ready = torch.cuda.current_stream().record_event() if frames.is_cuda else None
        self.pending.result()
        self.pending = self.thread.submit(self._encode, host, ready)

    def _encode(self, host: Tensor, ready) -> None:
        if ready:
            ready.synchronize()
        for frame in host.numpy():
            self.file.write_frame(frame)
            if self.count in self.keep:
                self.kept.append(frame.copy())  # a view would keep its whole chunk alive
            self.count += 1

    def close(self) -> None:
        """End the file; no frames, no file. Raises what encoding raised, and the name stays *.partial.mp4 then."""
        self.thread.shutdown(wait=True)
        self.file.close()
        self.pending.result()
        if self.count:
            os.replace(self.partial, self.path)
        else:
            self.partial.unlink()


def sheet_indices(frames: int, count: int = 16) -> set[int]:
    """Which frames of a clip a contact sheet shows: `count` of them, evenly spaced, first and last included."""
    return {round(i) for i in np.linspace(0, frames - 1, min(count, frames))}


def write_sheet(
    path: str | Path, frames: list[np.ndarray], columns: int = 4, width: int = 320
) -> None:
    """A PNG of frames side by side, each shrunk to `width` (or kept, if smaller)."""
    h, w = frames[0].shape[:2]
    size = (min(w, width), max(round(h * min(w, width) / w), 1))
    tiles = [
        np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))
        for frame in frames
    ]
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
    iio.imwrite(path, np.concatenate(rows), extension=".png")


def script(main: Callable) -> None:
    """Run a script: what a user got wrong is one line on stderr and exit code 2; after Ctrl-C the code is 130."""
    try:
        sys.exit(main())
    except (OSError, ValueError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
