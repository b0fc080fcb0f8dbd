"""What clips of the tiny world show, judged by their pixels against the nearest true picture.

A true picture is a background of the world, a shape of it at any place, a colour as the caption's
may be. Each frame that is judged is compared with the one that explains it best: is the shape all
there, and is anything painted beside it? Everything is a plain function and deterministic.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from world import COLOURS, DIRECTIONS, SHADE, SHAPES, SIZE, SPEED, Label, shape_mask

EVERY = 4  # frames that are judged: the last of each latent
LANE = 17  # pixels on each side of the middle row or column that a shape may cover
PAINTED = 0.5  # share of the colour from which on a pixel counts as the shape's
GHOST = 0.25  # ... beside the shape as painted by mistake
OFF = 0.35  # how far (RGB) a colour may be from all shades of its name
# A shape is right if its outline agrees so far (intersection over union) and so little is beside it
# (in areas of the shape).
AGREES = 0.75
BESIDE = 0.2


class Target(NamedTuple):
    """What captions ask of B clips."""

    colour: Tensor  # [B], index of COLOURS
    shape: Tensor  # [B], index of SHAPES
    step: Tensor  # [B, 2], pixels a frame
    beside: Tensor  # [B, n], numbers of the pixels that the shape never covers
    fit: Tensor  # [B, n, 5], from these pixels to the nearest background, heights of WAVES

    @staticmethod
    def of(labels: list[Label]) -> "Target":
        step = torch.tensor([DIRECTIONS[label.direction] for label in labels]).float()
        pixels = torch.arange(SIZE * SIZE).view(SIZE, SIZE)
        far = (torch.arange(SIZE) - SIZE // 2).abs() > LANE
        lanes = torch.stack([pixels.T[far].flatten(), pixels[far].flatten()])  # down, across
        fits = torch.linalg.pinv(waves()[:, lanes].transpose(0, 1))
        across = step[:, 1].abs().long()
        return Target(
            torch.tensor([list(COLOURS).index(label.colour) for label in labels]),
            torch.tensor([SHAPES.index(label.shape) for label in labels]),
            step,
            lanes[across],
            fits[across],
        )


def score(chunks: Iterable[Tensor], labels: list[Label]) -> dict[str, Tensor]:
    """Judge chunks [B, 3, T, 64, 64] of clips, the first one, then any -> [B, chunks] each.

    - colour, shape, direction: whether the chunk shows what its label says (1 or 0);
    - kind: whether its shape is nearest to what the label says, be it broken or doubled;
    - overlap: of what is painted with the nearest true shape, intersection over union;
    - ghosts: what is painted beside it, in areas of the shape; area: of what is painted, in pixels;
    - drift: how far the background has gone from the first chunk's, root mean square over pixels
      beside the shape's lane and colours, in [0, 2];
    - shade: how far the shape's colour has gone from the first chunk's, distance in RGB.
    """
    target = Target.of(labels)
    columns = {}
    first = None
    for chunk in chunks:
        frames = seen(chunk)
        ground = nearest_background(frames, target)
        paint = frames - ground
        gain, places = nearest_shapes(paint)
        which = gain.mean(1).argmax(1)  # [B], the chunk's shape
        place = places[torch.arange(len(which)), :, which]  # [B, T', 2]
        found = judge(paint, ground, which, place, target)
        found["direction"] = moves_as(place.float(), target.step)

        now = (beside(frames, target).mean(1), found.pop("rgb"))
        first = first or now
        found["drift"] = (now[0] - first[0]).square().mean((1, 2)).sqrt()
        found["shade"] = (now[1] - first[1]).norm(dim=1)
        for key, value in found.items():
            columns.setdefault(key, []).append(value.float())
    return {key: torch.stack(column, 1) for key, column in columns.items()}


def seen(chunk: Tensor) -> Tensor:
    """The frames of a chunk [B, 3, T, 64, 64] that are judged -> [B, T', 3, 64, 64]."""
    count = chunk.shape[2]
    return chunk[:, :, (count - 1) % EVERY :: EVERY].transpose(1, 2)


def beside(frames: Tensor, target: Target) -> Tensor:
    """The pixels [B, T, 3, n] that the shape never covers."""
    index = target.beside[:, None, None].expand(-1, *frames.shape[1:3], -1)
    return frames.flatten(3).gather(3, index)


def nearest_background(frames: Tensor, target: Target) -> Tensor:
    """The world's background that is nearest to what is beside the lane, [B, T, 3, 64, 64].

    A least-squares fit of a colour and waves of one period along rows and columns.
    """
    heights = torch.einsum("btcn,bnk->btck", beside(frames, target), target.fit)
    return (heights @ waves()).unflatten(3, (SIZE, SIZE))


def waves() -> Tensor:
    """What backgrounds are made of, [5, 64 * 64]."""
    angle = 2 * math.pi * torch.arange(SIZE) / SIZE
    sine = angle.sin().expand(SIZE, SIZE)
    cosine = angle.cos().expand(SIZE, SIZE)
    parts = [torch.ones(SIZE, SIZE), sine, cosine, sine.T, cosine.T]
    return torch.stack(parts).flatten(1)


def nearest_shapes(paint: Tensor) -> tuple[Tensor, Tensor]:
    """The best place of each shape on the torus, whatever its colour.

    paint [B, T, 3, 64, 64], what differs from the background -> how much of its square each shape
    explains [B, T, shapes], and where, pixels from the middle [B, T, shapes, 2].
    """
    spectrum = torch.fft.rfft2(paint)
    gains = []
    places = []
    for shape in SHAPES:
        template = shape_mask(shape)
        product = spectrum * torch.fft.rfft2(template).conj()
        response = torch.fft.irfft2(product, s=(SIZE, SIZE))
        gain = response.square().sum(2) / template.square().sum()  # [B, T, 64, 64]
        best, where = gain.flatten(2).max(2)
        gains.append(best)
        places.append(torch.stack([where // SIZE, where % SIZE], 2))
    return torch.stack(gains, 2), torch.stack(places, 2)


def judge(
    paint: Tensor, ground: Tensor, which: Tensor, place: Tensor, target: Target
) -> dict[str, Tensor]:
    """A chunk against its nearest true picture -> [B] each, and rgb [B, 3], its shape's colour."""
    mask = placed(which, place)[:, :, None]  # [B, T, 1, 64, 64]

    # The colour that is painted there, by least squares, and the nearest one that the caption may
    # mean.
    rgb = (paint * mask + ground * mask.square()).sum((3, 4)) / mask.square().sum((3, 4))
    rgb = rgb.mean(1)  # [B, 3]
    palette = torch.tensor(list(COLOURS.values()))
    shades = (palette - SHADE, palette + SHADE)  # [colours, 3] each
    distance = (rgb[:, None] - rgb[:, None].clamp(*shades)).norm(dim=2)  # [B, colours]
    off, named = distance.min(1)
    wanted = rgb.clamp(*(shade[target.colour] for shade in shades))  # [B, 3]

    # What share of it each pixel has, and of any other paint.
    step = wanted[:, None, :, None, None] - ground
    size = step.square().sum(2)
    share = (paint * step).sum(2) / size  # [B, T, 64, 64]
    other = paint.norm(dim=2) / size.sqrt()

    mask = mask[:, :, 0]
    painted = share > PAINTED
    true = mask > PAINTED
    both = (painted & true).sum((2, 3))
    either = (painted | true).sum((2, 3))
    area = true.sum((2, 3))
    overlap = (both / either).mean(1)
    ghosts = ((other > GHOST) & ~near(mask)).sum((2, 3)) / area
    ghosts = ghosts.mean(1)
    right = (which == target.shape) & (overlap > AGREES) & (ghosts < BESIDE)
    return {
        "colour": (named == target.colour) & (off < OFF),
        "kind": which == target.shape,
        "shape": right,
        "overlap": overlap,
        "ghosts": ghosts,
        "area": painted.float().sum((2, 3)).mean(1),
        "rgb": rgb,
    }


def placed(which: Tensor, place: Tensor) -> Tensor:
    """Coverage [B, T, 64, 64] of shapes [B] at places [B, T, 2], pixels from the middle."""
    templates = torch.stack([shape_mask(shape) for shape in SHAPES])
    pixels = torch.arange(SIZE)
    rows = (pixels - place[:, :, :1]) % SIZE  # [B, T, 64]
    columns = (pixels - place[:, :, 1:]) % SIZE
    return templates[which[:, None, None, None], rows[:, :, :, None], columns[:, :, None]]


def near(mask: Tensor, reach: int = 3) -> Tensor:
    """Whether a shape is within so many pixels, on the torus: there, edges are not ghosts."""
    padded = torch.nn.functional.pad(mask, (reach,) * 4, mode="circular")
    return torch.nn.functional.max_pool2d(padded, 2 * reach + 1, 1) > 0


def moves_as(path: Tensor, step: Tensor) -> Tensor:
    """Whether places [B, n, 2], EVERY frames apart, move by about step [B, 2] a frame -> [B]."""
    half = SIZE / 2
    moves = (path.diff(dim=1) + half) % SIZE - half  # the shorter way round
    frames = EVERY * moves.shape[1]
    way = moves.sum(1) / (SPEED * frames)  # 1 is the true speed
    along = (way * step).sum(1)
    across = (way * step.flip(1)).sum(1).abs()
    return (along > 0.5) & (along < 1.5) & (across < 0.5)


def summary(scores: dict[str, Tensor], chunks: list[int] | None = None) -> dict[str, float]:
    """Means over clips and some chunks (None: all); of area its change against the first one."""
    scores = dict(scores)
    area = scores.pop("area")
    scores["area_change"] = (area / area[:, :1].clamp(min=1) - 1).abs()
    chosen = slice(None) if chunks is None else chunks
    return {key: value[:, chosen].mean().item() for key, value in scores.items()}
