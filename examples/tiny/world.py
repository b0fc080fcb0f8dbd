"""The tiny world: clips of a coloured shape that moves over a torus, captions, a scorer on pixels.

A clip is [3, T, 64, 64] in [-1, 1]: mid-grey background, one shape of one colour, 1 pixel a frame
in one of four directions along the middle row or column, leaving on one side and entering on the
other. Its period, 64 frames, exceeds the 33 frames of a training clip, and it can go on for ever.
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
EVERY = 4  # the scorer looks for the shape in every 4th frame: the last of each latent
COLOURS = {
    "red": (0.9, -0.6, -0.5),
    "green": (-0.6, 0.9, -0.5),
    "blue": (-0.6, -0.5, 0.9),
    "yellow": (0.75, 0.65, -0.65),
}
SHAPES = ("square", "ring", "cross")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # row, column


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


def draw(labels: list[Label], frames: int, seed: int = 0) -> Tensor:
    """Clips [B, 3, frames, 64, 64] in [-1, 1] of the labels, from random places."""
    g = torch.Generator().manual_seed(seed)
    clips = torch.empty(len(labels), 3, frames, SIZE, SIZE)
    for clip, label in zip(clips, labels, strict=True):
        down, right = DIRECTIONS[label.direction]
        colour = torch.tensor(COLOURS[label.colour])[:, None, None]

        # Where the shape is in frame 0, against the middle of the picture: anywhere on its way.
        start = PHASE * int(torch.randint(SIZE // PHASE, (), generator=g)) - SIZE // 2
        row = start if down else 0
        column = start if right else 0

        for t in range(frames):
            y = row + SPEED * t * down
            x = column + SPEED * t * right
            # The mask is drawn at a fraction of a pixel and rolled by whole ones.
            whole = (math.floor(y), math.floor(x))
            mask = shape_mask(label.shape, y - whole[0], x - whole[1])
            clip[:, t] = colour * mask.roll(whole, (0, 1))
    return clips


def codec_basis(scale: float = 0.5, temporal_scale: float = 4.0) -> tuple[Tensor, Tensor]:
    """The codec in the VAE's place: a `LinearCodec`'s basis and its dual, [16, 1, 4, 16, 16] each.

    A patch of 4 frames x 16 x 16 pixels of one colour is its 16 lowest 3-D DCT coefficients (time +
    row + column frequency at most 3, time at most 1); those of time frequency 1 hold the motion
    inside a latent frame. The factors give latents a spread of about one.
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
            factors.append(scale * temporal_scale**t)
    basis = torch.stack(waves)[:, None]
    factors = torch.tensor(factors).view(-1, 1, 1, 1, 1)
    return basis * factors, basis / factors


def pixel_chunks(chunks: list[int]) -> list[int]:
    """Pixel frames of each chunk of latent frames: [3, 3] -> [9, 12]."""
    # The first latent frame of a video is one pixel frame, every other one is 4.
    pixels = [4 * latent for latent in chunks]
    pixels[0] -= 3
    return pixels


# ------------------------------------------------------------------------------------------ scores


def score(video: Tensor, labels: list[Label], chunks: list[int]) -> dict[str, Tensor]:
    """Judge clips [B, 3, T, 64, 64] by their pixels, chunk by chunk -> [B, chunks] each.

    chunks: pixel frames of each. colour, shape, direction: whether the chunk shows what its label
    says. area: mean count of pixels that differ from the background by more than half of the
    colour. Deterministic.
    """
    palette = torch.tensor(list(COLOURS.values()))
    names = list(COLOURS)
    wanted_colour = torch.tensor([names.index(label.colour) for label in labels])
    wanted_shape = torch.tensor([SHAPES.index(label.shape) for label in labels])
    wanted_step = torch.tensor([DIRECTIONS[label.direction] for label in labels]).float()

    # The pixels that are the shape's, and the sum of their colours.
    half = palette.norm(dim=1).mean() / 2
    mask = (video.norm(dim=1) > half).float()  # [B, T, 64, 64]
    area = mask.sum((2, 3))  # [B, T]
    total = (video * mask[:, None]).sum((3, 4)).transpose(1, 2)  # [B, T, 3]
    match, place = find_shapes(video[:, :, ::EVERY])

    columns = {key: [] for key in ("colour", "shape", "direction", "area")}
    end = 0
    for n in chunks:
        start = end
        end += n
        columns["area"].append(area[:, start:end].mean(1))

        colour = total[:, start:end].sum(1, keepdim=True)  # [B, 1, 3]
        cosine = torch.cosine_similarity(colour, palette, dim=2)  # [B, colours]
        best, which = cosine.max(1)
        columns["colour"].append((which == wanted_colour) & (best > 0.9))

        # The frames of the chunk that the filter saw are first .. last.
        first = math.ceil(start / EVERY)
        last = math.ceil(end / EVERY)
        best, which = match[:, first:last].mean(1).max(1)
        columns["shape"].append((which == wanted_shape) & (best > 0.8))

        # The way of the best shape since the last frame of the chunk before.
        seen = place[:, max(first - 1, 0) : last]  # [B, n', shapes, 2]
        path = seen[torch.arange(len(labels)), :, which].float()  # [B, n', 2]
        columns["direction"].append(moves_as(path, wanted_step))
    return {key: torch.stack(column, 1).float() for key, column in columns.items()}


def find_shapes(video: Tensor) -> tuple[Tensor, Tensor]:
    """The best place of each shape in each frame, by matched filter on the torus.

    video [B, 3, T, 64, 64] -> how well it matches [B, T, shapes], and where [B, T, shapes, 2].
    """
    strength = video.norm(dim=1)  # [B, T, 64, 64]
    spectrum = torch.fft.rfft2(strength)
    match = []
    place = []
    for shape in SHAPES:
        template = shape_mask(shape)
        product = spectrum * torch.fft.rfft2(template).conj()
        response = torch.fft.irfft2(product, s=(SIZE, SIZE))
        best, where = response.flatten(2).max(2)
        norms = template.norm() * strength.flatten(2).norm(dim=2)
        match.append(best / norms.clamp(min=1e-6))
        place.append(torch.stack([where // SIZE, where % SIZE], 2))
    return torch.stack(match, 2), torch.stack(place, 2)


def moves_as(path: Tensor, step: Tensor) -> Tensor:
    """Whether places [B, n, 2], EVERY frames apart, move by about step [B, 2] a frame -> [B]."""
    half = SIZE / 2
    moves = (path.diff(dim=1) + half) % SIZE - half  # the shorter way round
    frames = EVERY * moves.shape[1]
    way = moves.sum(1) / (SPEED * frames)  # 1 is the true speed
    along = (way * step).sum(1)
    across = (way * step.flip(1)).sum(1).abs()
    return (along > 0.5) & (along < 1.5) & (across < 0.5)


def summary(scores: dict[str, Tensor]) -> dict[str, float]:
    """Means over clips and chunks: accuracies, change of area against each clip's first chunk."""
    means = {key: scores[key].mean().item() for key in ("colour", "shape", "direction")}
    area = scores["area"]
    first = area[:, :1].clamp(min=1)
    change = (area[:, 1:] / first - 1).abs()
    means["area_change"] = change.mean().item() if change.numel() else 0.0
    return means
