"""What people bring beside pictures: sizes, prompts, captions; and contact sheets for them."""

import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from wan5b.extras.framing import resize
from wan5b.t5 import Tokenizer, clean_prompt
from wan5b.util import nearest, replacing

# ------------------------------------------------------------------------------------------- sizes

SIDE = 32  # sides of a video are multiples of it: 16 pixels to a latent's, 2 of those to a token's


def parse_size(text: str) -> tuple[int, int]:
    """Text like 704x1280 -> (height, width) in pixels. ValueError unless multiples of 32."""
    wrong = f"size {text} is not HEIGHTxWIDTH in multiples of {SIDE}"
    if not re.fullmatch("[0-9]+x[0-9]+", text.lower()):
        raise ValueError(f"{wrong}; give one like 704x1280, without spaces")

    sides = [int(side) for side in text.lower().split("x")]
    valid = [side > 0 and side % SIDE == 0 for side in sides]
    if not all(valid):
        near = []
        for side, stays in zip(sides, valid, strict=True):
            near.append(str(side) if stays else nearest(side, SIDE, SIDE))
        raise ValueError(f"{wrong}; nearest valid: {' by '.join(near)}")
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


# ------------------------------------------------------------------------------- prompts, captions


def read_prompts(path: str | Path) -> list[str]:
    """One prompt a line, UTF-8; blank lines are dropped.

    ValueError if missing, not UTF-8, or without prompts.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompts {path}: {error}") from error

    prompts = []
    for line in lines:
        if line.strip():
            prompts.append(line.strip())
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


def caption_file(path: str | Path) -> Path:
    """Where the caption is of a video (fox.1.mp4: fox.1.txt) or of a folder (fox.1: fox.1.txt)."""
    path = Path(path)
    if path.is_dir():
        return path.with_name(path.name + ".txt")  # nothing in a folder's name is a suffix
    return path.with_suffix(".txt")


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

    rows = []
    for i in range(0, len(tiles), columns):
        row = tiles[i : i + columns]
        rows.append(np.concatenate(row, axis=1))
    with replacing(path) as partial:
        Image.fromarray(np.concatenate(rows)).save(partial, "PNG")
