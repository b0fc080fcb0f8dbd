"""What is measured of every frame of a video, one by one: no picture is kept for long.

Fine detail needs the full size. All else is measured on the picture reduced to about 64 pixels at
its shorter side, by averages over squares, which hide grain and the marks of encoders.

Legend: H, W the picture's size, h, w the reduced one's. Levels are 0 .. 255, as sRGB codes them.
"""

from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from PIL import Image

from wan5b.extras.videos import Shown

SIDE = 64  # pixels at the shorter side of the reduced picture, or up to twice that
LUMA = (0.2126, 0.7152, 0.0722, 0)  # of BT.709, from red, green and blue
LAG = Fraction(3, 4)  # seconds over which motion is measured: long enough to rise above noise
BLOCK = 8  # reduced pixels at a side of the squares in which motion is measured
FASTEST = 0.05  # the share of the squares that counts
FAINT = 8.0  # levels: a contrast below is taken for none where pictures are compared
FLAT = 3.0  # levels a pixel: a slope below is taken for this where motion is measured
GROUP = 4  # frames that come from one latent frame
AHEAD = 4  # frames that threads look at while the one before is compared
NAMES = ("luma", "spread", "saturation", "sharpness", "change", "jump", "leap", "motion")


class Series(NamedTuple):
    """A number for each frame, float64 [T]; NaN where there is none.

    - luma: its mean, in levels. BT.709's weights on the sRGB codes.
    - spread: the standard deviation of luma over the picture, in levels.
    - saturation: the sum over pixels of (largest - smallest channel), over the sum of the largest;
      0 to 1. HSV's, in which pixels weigh as much as they shine: exposure does not change it.
    - sharpness: the root mean square of luma's Laplacian (four neighbours) at full size, over
      `spread`, so that neither brightness nor contrast change it. It depends on the subject and on
      the video's size. NaN where the spread is below 1 level.
    - change: the mean absolute difference of luma to the frame before, in levels. VBench's temporal
      flickering is 1 - change / 255, at full size (Huang et al. 2023, arXiv 2311.17982).
    - jump: `unlikeness` to the frame before. leap: to the frame a latent's four frames before.
    - motion: see `speed`; in percent of the shorter side a second.
    - similarity: 1 - the smallest `unlikeness` to one of the first frames: 1 is the same picture, 0
      one that has nothing to do with it.
    """

    size: tuple[int, int]  # H, W
    seconds: float  # from the first frame's start to the last one's
    luma: np.ndarray
    spread: np.ndarray
    saturation: np.ndarray
    sharpness: np.ndarray
    change: np.ndarray
    jump: np.ndarray
    leap: np.ndarray
    motion: np.ndarray
    similarity: np.ndarray


class Small(NamedTuple):
    """A reduced picture."""

    start: Fraction  # seconds
    pixel: float  # the side of its pixels, in percent of the picture's shorter side
    luma: np.ndarray  # float32 [h, w]
    slope: np.ndarray  # float32 [h, w]: how steep luma is, in levels a pixel
    centred: np.ndarray  # float32 [h w 3]: all channels, less their common mean
    variance: float  # of `centred`
    saturation: float


def measure(shown: Iterable[Shown], first: int) -> Series:
    """Everything that is measured, of all frames of a video.

    first: how many frames `similarity` looks back to. ValueError if there are no frames.
    """
    rows = {name: array("d") for name in (*NAMES, "similarity")}
    opening = []  # the first frames
    # From the newest frame that is LAG old, or the first, to the one before; 128 of them at most,
    # since the times of a damaged file may stand still.
    lately = deque(maxlen=128)
    start = Fraction(0)
    size = None
    for looked in _look_ahead(shown):
        small = looked.small
        if size is None:
            size = looked.size
            start = small.start
        if len(opening) < first:
            opening.append(small)
        values = looked.values | _beside(lately, small)
        values["similarity"] = 1 - float(unlikeness(opening, small).min())
        for name, row in rows.items():
            row.append(values[name])
        lately.append(small)
    if size is None:
        raise ValueError("there are no frames in it")

    # A video that is shorter than LAG has one number for motion, at its end.
    series = {name: np.array(row) for name, row in rows.items()}
    last = lately.pop()
    if np.isnan(series["motion"]).all() and lately:
        series["motion"][-1] = speed(lately, last)
    return Series(size, float(last.start - start), **series)


class Looked(NamedTuple):
    """What a frame is found to be by itself."""

    size: tuple[int, int]  # H, W
    small: Small
    values: dict[str, float]  # of Series, those that need no other frame


def _look_ahead(shown: Iterable[Shown]) -> Iterator[Looked]:
    """The frames in their order; a few of them are looked at by threads at once."""
    with ThreadPoolExecutor(2) as pool:
        pending = deque()
        for frame in shown:
            pending.append(pool.submit(_look, frame))
            if len(pending) > AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _look(frame: Shown) -> Looked:
    image = Image.fromarray(np.ascontiguousarray(frame.picture))
    small = reduced(image, frame.start)

    gray = image.convert("L", LUMA)
    counts = np.array(gray.histogram(), np.float64)
    levels = np.arange(256)
    mean = counts @ levels / counts.sum()
    spread = np.sqrt(counts @ (levels - mean) ** 2 / counts.sum())
    detail = sharpness(np.asarray(gray), spread)

    values = {"luma": mean, "spread": spread, "saturation": small.saturation, "sharpness": detail}
    return Looked(frame.picture.shape[:2], small, values)


def _beside(lately: deque[Small], small: Small) -> dict[str, float]:
    """What is measured of a frame beside those before it. Drops what is too old for later ones."""
    values = dict.fromkeys(("change", "jump", "leap", "motion"), np.nan)
    if lately:
        values["change"] = float(np.abs(small.luma - lately[-1].luma).mean())
        values["jump"] = float(unlikeness([lately[-1]], small)[0])
        if len(lately) >= GROUP:
            values["leap"] = float(unlikeness([lately[-GROUP]], small)[0])
        while len(lately) > 1 and lately[1].start <= small.start - LAG:
            lately.popleft()
        if lately[0].start <= small.start - LAG:
            values["motion"] = speed(lately, small)
    return values


def reduced(image: Image.Image, start: Fraction) -> Small:
    """The picture [h, w], each pixel the mean of a square."""
    side = min(image.size)
    factor = max(side // SIDE, 1)
    rgb = np.asarray(image.reduce(factor), np.float32)  # [h, w, 3]
    red, green, blue = np.ascontiguousarray(rgb.transpose(2, 0, 1))
    luma = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    slope = np.hypot(*(_slope(luma, axis) for axis in (0, 1)))

    largest = np.maximum(np.maximum(red, green), blue)
    smallest = np.minimum(np.minimum(red, green), blue)
    shine = float(largest.sum())
    saturation = float((largest - smallest).sum()) / shine if shine else 0.0

    centred = (rgb - rgb.mean()).ravel()
    variance = float(centred @ centred) / len(centred)
    return Small(start, 100 * factor / side, luma, slope, centred, variance, saturation)


def _slope(luma: np.ndarray, axis: int) -> np.ndarray:
    return np.gradient(luma, axis=axis) if luma.shape[axis] > 1 else np.zeros_like(luma)


def sharpness(luma: np.ndarray, spread: float) -> float:
    """Of a picture uint8 [H, W]: see Series. NaN if it is flat, or below 3 pixels at a side."""
    if spread < 1 or min(luma.shape) < 3:
        return np.nan
    x = luma.astype(np.int16)
    laplacian = 4 * x[1:-1, 1:-1]
    for neighbours in (x[:-2, 1:-1], x[2:, 1:-1], x[1:-1, :-2], x[1:-1, 2:]):
        laplacian -= neighbours
    flat = laplacian.astype(np.float32).ravel()
    return float(np.sqrt(flat @ flat / len(flat)) / spread)


def unlikeness(others: list[Small], small: Small) -> np.ndarray:
    """How far each of some pictures differs from this one in what it shows: 0 not at all, about 1
    if they have nothing in common, 2 if one is the other's negative.

    The variance of their difference over the sum of their variances, all channels and pixels taken
    together. So a change of brightness alone is none. Contrasts below FAINT count little: black is
    not unlike nearly black.
    """
    values = []
    for other in others:
        shared = float(other.centred @ small.centred) / len(small.centred)
        total = other.variance + small.variance
        values.append(max(total - 2 * shared, 0) / (total + FAINT**2))
    return np.array(values)


def speed(lately: Sequence[Small], small: Small) -> float:
    """How fast the fastest parts of a picture move, in percent of its shorter side a second; too
    little for what moves by more than its own size from frame to frame.

    The greatest of: the shift since the oldest frame over the time between, which is right for what
    is slow; and how much farther it is to an older frame than to a newer one, over the time between
    those, for what has shifted beyond its size since then. Grain alone is as far from all frames.
    The frames are the one before, that of GROUP frames ago and the oldest. NaN if no time has
    passed.
    """
    others = [lately[-1], lately[0]]
    if len(lately) > GROUP:
        others.insert(1, lately[-GROUP])
    ages = [float(small.start - other.start) for other in others]
    if not 0 < ages[0] <= ages[-1]:
        return np.nan
    shifts = [shift(other, small) for other in others]
    speeds = [shifts[-1] / ages[-1]]
    for i in range(1, len(others)):
        if ages[i] > ages[i - 1]:
            speeds.append((shifts[i] - shifts[i - 1]) / (ages[i] - ages[i - 1]))
    return max(speeds)


def shift(a: Small, b: Small) -> float:
    """How far the fastest parts have moved from one picture to the other, in percent of the shorter
    side; right for less than the size of what is seen, which it does not surpass.

    In each square, the mean change of luma over its mean slope: a picture that shifts by d pixels
    changes by d times its slope along the way. What brightness and contrast of the whole picture do
    is taken out first. Of the squares the fastest 5% count, in which edges stand across the way;
    they do in VBench's dynamic degree, too, which has optical flow in this place.
    """
    # The second picture as far as it is not the first one, brighter or of more contrast.
    x = a.luma - a.luma.mean()
    y = b.luma - b.luma.mean()
    gain = float((x * y).sum() / max(float((x * x).sum()), 1e-6))
    change = np.abs(y - gain * x)

    ratio = _squares(change) / np.maximum(_squares((a.slope + b.slope) / 2), FLAT)
    count = max(round(FASTEST * ratio.size), 1)
    return float(np.partition(ratio, -count, axis=None)[-count:].mean()) * a.pixel


def _squares(x: np.ndarray) -> np.ndarray:
    """The means of [h, w] over squares of BLOCK pixels; what is left over at the ends is not seen,
    unless a side is shorter than that.
    """
    sides = [min(BLOCK, side) for side in x.shape]
    rows, columns = (length // side for length, side in zip(x.shape, sides, strict=True))
    x = x[: rows * sides[0], : columns * sides[1]]
    return x.reshape(rows, sides[0], columns, sides[1]).mean((1, 3))
