"""The tiny world: clips of a coloured shape that moves over a torus, and their captions.

A clip is [3, T, 64, 64] in [-1, 1]: a background that stands still and one shape of one colour, 1
pixel a frame in one of four directions along the middle row or column, leaving on one side and
entering on the other. Its period, 64 frames, exceeds the 33 frames of a training clip, and it can
go on for ever.

The caption names colour, shape and direction. What it does not name is drawn for each clip: the
shape's shade, the background's colour, and a wave of another colour over it. Only the frames before
tell it, so every chunk must copy it from the last one, with what the last one got wrong: here
errors can add up, as in a real video.

Everything is a plain function of its arguments.
"""

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

SIZE = 64  # pixels, height and width
SPEED = 1.0  # pixels a frame
PHASE = 4  # shapes start at multiples of it
COLOURS = {
    "red": (0.9, -0.6, -0.5),
    "green": (-0.6, 0.9, -0.5),
    "blue": (-0.6, -0.5, 0.9),
    "yellow": (0.75, 0.65, -0.65),
}
SHAPES = ("square", "ring", "cross")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # row, column
# What no caption names, and how far it goes from the palette's colour or from mid-grey.
SHADE = 0.15  # of the shape's colour, in each channel
GROUND = 0.2  # of the background's colour, in each channel
WAVE = 0.25  # height of the wave over the background, of one period


@dataclass(frozen=True)
class Label:
    """What a caption says."""

    colour: str
    shape: str
    direction: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape} moves {self.direction}"


LABELS = [Label(c, s, d) for c in COLOURS for s in SHAPES for d in DIRECTIONS]


def label_of(caption: str) -> Label:
    """The label whose caption this is."""
    _, colour, shape, _, direction = caption.split()
    return Label(colour, shape, direction)


@lru_cache
def shape_mask(shape: str, dy: float = 0.0, dx: float = 0.0) -> Tensor:
    """Coverage [64, 64] in [0, 1] of a shape, (dy, dx) < 1 pixel beside the middle.

    Its edges are two pixels wide.
    """
    rows = torch.arange(SIZE) - SIZE / 2 - dy
    columns = torch.arange(SIZE) - SIZE / 2 - dx
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    far = torch.maximum(x.abs(), y.abs())
    near = torch.minimum(x.abs(), y.abs())

    # The distance to the edge, in pixels, negative inside.
    if shape == "square":
        distance = far - 11
    elif shape == "ring":
        distance = ((x**2 + y**2).sqrt() - 10).abs() - 4
    else:
        assert shape == "cross", shape
        distance = torch.maximum(far - 14, near - 5)
    return (0.5 - distance / 2).clamp(0, 1)


def draw(labels: list[Label], frames: int, seed: int = 0, plain: bool = False) -> Tensor:
    """Clips [B, 3, frames, 64, 64] in [-1, 1] of the labels, from random places.

    plain: colours of the palette on mid-grey, with nothing that no caption names.
    """
    g = torch.Generator().manual_seed(seed)
    clips = torch.empty(len(labels), 3, frames, SIZE, SIZE)
    for clip, label in zip(clips, labels, strict=True):
        # Where the shape is in frame 0, against the middle of the picture: anywhere on its way.
        start = PHASE * int(torch.randint(SIZE // PHASE, (), generator=g)) - SIZE // 2
        colour = torch.tensor(COLOURS[label.colour])[:, None, None]
        ground = torch.zeros(3, SIZE, SIZE)
        if not plain:
            colour = (colour + SHADE * uniform(3, g)[:, None, None]).clamp(-1, 1)
            ground = background(g)
        for t in range(frames):
            mask = placed_mask(label, start, t)
            clip[:, t] = ground * (1 - mask) + colour * mask
    return clips


def uniform(count: int, g: torch.Generator) -> Tensor:
    """Numbers in [-1, 1)."""
    return 2 * torch.rand(count, generator=g) - 1


def background(g: torch.Generator) -> Tensor:
    """A drawn background [3, 64, 64]: a colour, and a wave of another one along rows or columns."""
    colour = GROUND * uniform(3, g)
    tint = torch.randn(3, generator=g)
    tint = WAVE * tint / tint.norm()
    phase = math.pi * uniform(1, g)
    wave = torch.sin(2 * math.pi * torch.arange(SIZE) / SIZE + phase).expand(SIZE, SIZE)
    if torch.rand((), generator=g) < 0.5:
        wave = wave.T
    return colour[:, None, None] + tint[:, None, None] * wave


def placed_mask(label: Label, start: int, t: int) -> Tensor:
    """Where the label's shape is in frame t, coverage [64, 64], if it was at `start` in frame 0."""
    down, right = DIRECTIONS[label.direction]
    y = (start if down else 0) + SPEED * t * down
    x = (start if right else 0) + SPEED * t * right
    # The mask is drawn at a fraction of a pixel and rolled by whole ones.
    whole = (math.floor(y), math.floor(x))
    return shape_mask(label.shape, y - whole[0], x - whole[1]).roll(whole, (0, 1))


def codec_basis(
    scale: float = 0.5, temporal_scale: float = 4.0, mean_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The codec in the VAE's place: a `LinearCodec`'s basis and its dual, [16, 1, 4, 16, 16] each.

    A patch of 4 frames x 16 x 16 pixels of one colour is its 16 lowest 3-D DCT coefficients (time +
    row + column frequency at most 3, time at most 1); those of time frequency 1 hold the motion
    inside a latent frame. The factors give latents a spread of about one. mean_scale: of the first
    one, a patch's mean, to which a coloured background gives most of the spread.
    """

    def dct(n: int) -> Tensor:
        """The orthogonal matrix [frequency, place] of the DCT-II."""
        k = torch.arange(n, dtype=torch.float64)[:, None]
        x = torch.arange(n, dtype=torch.float64)
        matrix = torch.cos(math.pi * (x + 0.5) * k / n)
        matrix = matrix * (2 / n) ** 0.5
        matrix[0] /= 2**0.5
        return matrix.float()

    time = dct(4)
    space = dct(16)
    waves = []
    factors = []
    for t, row, column in itertools.product(range(2), range(4), range(4)):
        if t + row + column <= 3:
            waves.append(torch.einsum("t,h,w->thw", time[t], space[row], space[column]))
            mean = t == row == column == 0
            factors.append(scale * temporal_scale**t * (mean_scale if mean else 1.0))
    basis = torch.stack(waves)[:, None]
    factors = torch.tensor(factors).view(-1, 1, 1, 1, 1)
    return basis * factors, basis / factors


def pixel_chunks(chunks: list[int]) -> list[int]:
    """Pixel frames of each chunk of latent frames: [3, 3] -> [9, 12]."""
    # The first latent frame of a video is one pixel frame, every other one is 4.
    pixels = [4 * latent for latent in chunks]
    pixels[0] -= 3
    return pixels
