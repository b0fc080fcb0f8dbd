"""The tiny world: clips of one coloured shape that moves over a torus, their captions, and a scorer on pixels.

A clip is [3, T, 64, 64] in [-1, 1]: mid-grey background, one shape of one colour, 1 pixel a frame in one of four
directions along the middle row or column, leaving on one side and entering on the other. Its period, 64 frames, exceeds
the 33 frames of a training clip, and it can go on for ever. Everything is a plain function of its arguments.
"""

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
    return Label(*(caption.split()[i] for i in (1, 2, 4)))


@lru_cache
def shape_mask(shape: str, dy: float = 0.0, dx: float = 0.0) -> Tensor:
    """Coverage [64, 64] in [0, 1] of a shape, (dy, dx) < 1 beside the middle; its edges are two pixels wide."""
    y, x = torch.meshgrid(*(torch.arange(SIZE) - SIZE / 2 - d for d in (dy, dx)), indexing="ij")
    far = torch.maximum(x.abs(), y.abs())
    near = torch.minimum(x.abs(), y.abs())
    distance = {  # signed, in pixels; negative inside
        "square": far - 11,
        "ring": ((x**2 + y**2).sqrt() - 10).abs() - 4,
        "cross": torch.maximum(far - 14, near - 5),
    }[shape]
    return (0.5 - distance / 2).clamp(0, 1)


def draw(labels: list[Label], frames: int, seed: int = 0) -> Tensor:
    """Clips [B, 3, frames, 64, 64] in [-1, 1] of the labels, from random places."""
    g = torch.Generator().manual_seed(seed)
    clips = torch.empty(len(labels), 3, frames, SIZE, SIZE)
    for clip, label in zip(clips, labels, strict=True):
        step = DIRECTIONS[label.direction]
        phase = PHASE * int(torch.randint(SIZE // PHASE, (), generator=g))
        start = [
            phase if moving else SIZE // 2 for moving in step
        ]  # where the middle of the shape is
        colour = torch.tensor(COLOURS[label.colour])[:, None, None]
        for t in range(frames):
            places = [a - SIZE // 2 + SPEED * t * b for a, b in zip(start, step, strict=True)]
            whole = [math.floor(place) for place in places]
            mask = shape_mask(label.shape, *(a - b for a, b in zip(places, whole, strict=True)))
            clip[:, t] = colour * mask.roll(whole, (0, 1))
    return clips


def codec_basis(scale: float = 0.5, temporal_scale: float = 4.0) -> tuple[Tensor, Tensor]:
    """The codec in the VAE's place, as a `LinearCodec`'s basis and its dual, [16, 1, 4, 16, 16] each.

    A patch of 4 frames x 16 x 16 pixels of one colour is its 16 lowest 3-D DCT coefficients (time + row + column
    frequency at most 3, time at most 1); those of time frequency 1 hold the motion inside a latent frame. The factors
    give latents a spread of about one.
    """

    def dct(n):
        k, x = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
        matrix = torch.cos(math.pi * (x + 0.5) * k / n) * (2 / n) ** 0.5
        matrix[0] /= 2**0.5
        return matrix.float()

    time, space = dct(4), dct(16)
    orders = [(t, y, x) for t in range(2) for y in range(4) for x in range(4) if t + y + x <= 3]
    basis = torch.stack(
        [torch.einsum("t,h,w->thw", time[t], space[y], space[x]) for t, y, x in orders]
    )[:, None]
    factors = torch.tensor([scale * temporal_scale**t for t, _, _ in orders]).view(-1, 1, 1, 1, 1)
    return basis * factors, basis / factors


def pixel_chunks(latent_blocks: list[int], stride: int = 4) -> list[int]:
    """Pixel frames of each chunk of latent frames: [3, 3] -> [9, 12]."""
    return [stride * n - (stride - 1) * (i == 0) for i, n in enumerate(latent_blocks)]


def score(video: Tensor, labels: list[Label], chunks: list[int]) -> dict[str, Tensor]:
    """Judge clips [B, 3, T, 64, 64] by their pixels, chunk by chunk (`chunks`: pixel frames each) -> [B, chunks] each.

    colour, shape, direction: whether the chunk shows what its label says. area: mean count of pixels that differ from
    the background by more than half of the colour. Deterministic.
    """
    palette = torch.tensor(list(COLOURS.values()))
    # 1. pixels that are the shape's, and their colour
    norm = palette.norm(dim=1).mean()
    mask = (video.norm(dim=1) > norm / 2).float()  # [B, T, 64, 64]
    area = mask.sum((2, 3))  # [B, T]
    mean = (video * mask[:, None]).sum((3, 4)).transpose(1, 2)  # [B, T, 3]
    # 2. the best place of each shape in every 4th frame, by matched filter on the torus
    strength = video[:, :, ::EVERY].norm(dim=1)  # [B, T', 64, 64]
    spectrum = torch.fft.rfft2(strength)
    match, place = [], []
    for shape in SHAPES:
        template = shape_mask(shape)
        response = torch.fft.irfft2(
            spectrum * torch.fft.rfft2(template).conj(), s=(SIZE, SIZE)
        ).flatten(2)
        best, where = response.max(2)
        match.append(best / (template.norm() * strength.flatten(2).norm(dim=2)).clamp(min=1e-6))
        place.append(torch.stack([where // SIZE, where % SIZE], 2))
    match, place = (
        torch.stack(match, 2),
        torch.stack(place, 2),
    )  # [B, T', shapes], [B, T', shapes, 2]

    results = {
        key: torch.zeros(len(labels), len(chunks))
        for key in ("colour", "shape", "direction", "area")
    }
    wanted_colour = torch.tensor([list(COLOURS).index(label.colour) for label in labels])
    wanted_shape = torch.tensor([SHAPES.index(label.shape) for label in labels])
    wanted_step = torch.tensor([DIRECTIONS[label.direction] for label in labels]).float()
    rows, end = torch.arange(len(labels)), 0
    for b, n in enumerate(chunks):
        start, end = end, end + n
        results["area"][:, b] = area[:, start:end].mean(1)
        cosine = torch.cosine_similarity(
            mean[:, start:end].sum(1)[:, None], palette, dim=2
        )  # [B, colours]
        best, which = cosine.max(1)
        results["colour"][:, b] = ((which == wanted_colour) & (best > 0.9)).float()
        first, last = -(-start // EVERY), -(-end // EVERY)  # of the frames that the filter saw
        best, which = match[:, first:last].mean(1).max(1)
        results["shape"][:, b] = ((which == wanted_shape) & (best > 0.8)).float()
        # way since the last frame of the chunk before, along the label's direction and across it
        path = place[rows, max(first - 1, 0) : last, which].float()  # [B, n', 2]
        moves = (path.diff(dim=1) + SIZE / 2) % SIZE - SIZE / 2
        way = moves.sum(1) / (SPEED * EVERY * moves.shape[1])
        along, across = (way * wanted_step).sum(1), (way * wanted_step.flip(1)).sum(1).abs()
        results["direction"][:, b] = ((along > 0.5) & (along < 1.5) & (across < 0.5)).float()
    return results


def summary(scores: dict[str, Tensor]) -> dict[str, float]:
    """Means over clips and chunks: accuracies, and the change of area against each clip's first chunk."""
    area = scores["area"]
    change = (area[:, 1:] / area[:, :1].clamp(min=1) - 1).abs()
    out = {key: scores[key].mean().item() for key in ("colour", "shape", "direction")}
    return out | {"area_change": change.mean().item() if change.numel() else 0.0}
