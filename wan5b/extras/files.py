"""What people bring: images and videos of any origin, sizes, prompts; contact sheets.

Frames are uint8 [T, H, W, 3].
"""

import sys
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
from imageio.plugins.pillow import PillowPlugin
from PIL import Image, ImageOps

from wan5b.media import resize
from wan5b.t5 import Tokenizer, clean_prompt
from wan5b.util import first_line, nearest, replacing

# What the libraries below raise for a file that they can't read.
UNREADABLE = (
    OSError,  # there is no such file, or no library knows its format
    ValueError,  # PyAV: damaged
    IndexError,  # PyAV: no picture in it
    av.FFmpegError,  # PyAV: damaged otherwise
    AttributeError,  # PyAV: an unknown codec
    SyntaxError,  # Pillow: damaged
    Image.DecompressionBombError,  # Pillow: 180 megapixels or more
)

# ------------------------------------------------------------------------------------------ reading


def read_image(path: str | Path) -> np.ndarray:
    """An image file as uint8 [1, H, W, 3], upright; of an animation or a video the first frame.

    Any format that imageio reads. ValueError if unreadable.
    """
    try:
        with iio.imopen(path, "r") as file:
            if isinstance(file, PillowPlugin):
                return _read_picture(path)[None]
            return np.stack(list(islice(video_frames(path), 1)))
    except UNREADABLE as error:
        raise ValueError(f"cannot read the image {path}: {first_line(error)}") from error


def _read_picture(path: str | Path) -> np.ndarray:
    """What Pillow reads, as uint8 [H, W, 3]. Transparency is dropped."""
    with Image.open(path) as image:
        if image.mode.startswith("I"):  # 16 bits of gray, which Pillow would clip at 255
            gray = np.asarray(image) / 257
            image = Image.fromarray(gray.round().astype(np.uint8))
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def video_frames(path: str | Path) -> Iterator[np.ndarray]:
    """The frames of a video file, uint8 [H, W, 3] each, upright: a phone stores them as it lies."""
    with av.open(str(Path(path).absolute())) as file:  # a relative a:b.mp4 would be taken for a URL
        file.streams.video[0].thread_type = "AUTO"
        for frame in file.decode(video=0):
            yield np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


def read_video(path: str | Path, last: int | None = None) -> np.ndarray:
    """The frames of a video file, or its `last` ones, as uint8 [T, H, W, 3].

    ValueError if unreadable or shorter.
    """
    try:
        frames = deque(video_frames(path), maxlen=last)
    except UNREADABLE as error:
        raise ValueError(f"cannot read the video {path}: {first_line(error)}") from error

    needed = last or 1
    if len(frames) < needed:
        raise ValueError(f"{path} has {len(frames)} frames, {needed} are needed")
    return np.stack(frames)


def read_clips(path: str | Path, frames: int, fps: float) -> Iterator[np.ndarray]:
    """The consecutive clips of a video, read as they are asked for: uint8 [frames, H, W, 3] each.

    path: a video file, of which the frames nearest to the times k / fps are taken (its own rate
    must be constant); or a folder of images, sorted by length of name, then name, all taken. What
    is left over at the end is dropped. One of `UNREADABLE` if unreadable, ValueError if too
    short for one clip.
    """
    if Path(path).is_dir():
        files = sorted(Path(path).glob("[!.]*"), key=lambda file: (len(file.name), file.name))
        source = (read_image(file)[0] for file in files)
        ratio = 1.0  # frames of the source to one of the clip
    else:
        source = video_frames(path)
        ratio = iio.immeta(path, plugin="pyav")["fps"] / fps

    clip = [None] * frames
    k = 0  # frames taken so far, over all clips
    for i, frame in enumerate(source):
        # One frame of the source may be nearest to several times, or to none.
        while int(k * ratio + 0.5) == i:
            clip[k % frames] = frame
            k += 1
            if k % frames == 0:
                yield np.stack(clip)
    if k < frames:
        raise ValueError(f"{path} has {k} frames at {fps:g} fps, fewer than {frames}")


# ------------------------------------------------------------------------------- sizes, prompts

SIDE = 32  # sides of a video are multiples of it: 16 pixels to a latent's, 2 of those to a token's


def parse_size(text: str) -> tuple[int, int]:
    """Text like 704x1280 -> (height, width) in pixels. ValueError unless multiples of 32."""
    sides = []
    for side in text.lower().split("x"):
        sides.append(int(side) if side.isdecimal() else 0)

    if len(sides) != 2 or any(side < 1 or side % SIDE for side in sides):
        valid = " by ".join(nearest(side, SIDE, SIDE) for side in sides)
        raise ValueError(
            f"size {text} is not HEIGHTxWIDTH in multiples of 32; nearest valid: {valid}"
        )
    return sides[0], sides[1]


def fitting_size(height: int, width: int, area: int = 704 * 1280) -> tuple[int, int]:
    """The (height, width) for a picture of this shape.

    Both are multiples of 32, their product is at most `area`, and their ratio is nearest to the
    picture's: of two candidates, whose width or whose height is rounded down first.
    """
    ratio = width / height
    # A very wide picture is still 32 pixels high, a very tall one 32 pixels wide.
    ideal_width = min(max((area * ratio) ** 0.5, SIDE), area / SIDE)

    def floor(side: float) -> int:
        return max(int(side // SIDE * SIDE), SIDE)

    w = floor(ideal_width)
    width_first = (floor(area / w), w)
    h = floor(area / ideal_width)
    height_first = (h, floor(area / h))

    def distortion(size: tuple[int, int]) -> float:
        """How far the ratio is from the picture's, as a factor >= 1."""
        return max(ratio * size[0] / size[1], size[1] / size[0] / ratio)

    return min(height_first, width_first, key=distortion)  # the first of them wins a tie


def read_prompts(path: str | Path) -> list[str]:
    """One prompt a line, UTF-8; blank lines are dropped.

    ValueError if missing, not UTF-8, or without prompts.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompts {path}: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompts; it should have one a line")
    return prompts


def note_cut(tokenizer: Tokenizer, prompts: list[str]) -> None:
    """A line for each prompt that has more tokens than the network takes: its end has no effect."""
    for prompt in prompts:
        tokens = len(tokenizer.encode(clean_prompt(prompt))) + 1  # and the end of the text
        if tokens > tokenizer.length:
            named = f"a prompt of {tokens} tokens is cut to {tokenizer.length}: {prompt[:40]!r} ..."
            print(f"note: {named}", file=sys.stderr)


# ------------------------------------------------------------------------------------------ sheets


def sheet_indices(frames: int, count: int = 16) -> set[int]:
    """The frames of a clip that a contact sheet shows: evenly spaced, first and last included."""
    return {round(i) for i in np.linspace(0, frames - 1, min(count, frames))}


def write_sheet(path: str | Path, frames: list[np.ndarray], columns: int = 4) -> None:
    """A PNG of frames side by side, each shrunk to a width of 320 (or kept, if smaller)."""
    h, w = frames[0].shape[:2]
    width = min(w, 320)
    size = (width, max(round(h * width / w), 1))
    tiles = [resize(frame, size) for frame in frames]

    # The last row is filled up with black.
    while len(tiles) % columns:
        tiles.append(np.zeros_like(tiles[0]))

    rows = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
    with replacing(path) as partial:
        iio.imwrite(partial, np.concatenate(rows), extension=".png")
