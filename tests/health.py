"""Draws clips whose faults are known, for the tests of reports. Frames are float [T, H, W, 3]."""

import json
from fractions import Fraction
from functools import lru_cache

import numpy as np
from PIL import Image

from wan5b.extras import report
from wan5b.extras.measures import measure
from wan5b.extras.videos import Shown

H, W = 64, 112
FRAMES = 157


@lru_cache
def landscape(seed=0, height=500, width=1100):
    """A large coloured picture of blobs with grain on them, in 40 .. 215: [height, width, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (36, 78, 3), dtype=np.uint8)
    blobs = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    grain = np.random.default_rng(seed + 1).normal(0, 24, (height, width, 1))
    grain = (grain + np.roll(grain, 1, 0) + np.roll(grain, 1, 1)) / 3
    return np.clip(0.6 * np.asarray(blobs) + 50 + grain, 40, 215).astype(np.float32)


def journey(frames=FRAMES, seed=0, speed=2.0):
    """A camera that wanders over a landscape, by `speed` pixels a frame, less where it turns."""
    land = landscape(seed)
    clip = []
    for i in range(frames):
        y = int(200 + 190 * np.sin(i * speed / 600))
        x = int(470 + 460 * np.sin(i * speed / 500))
        clip.append(land[y : y + H, x : x + W])
    return np.stack(clip)


def still(frames=FRAMES):
    return np.repeat(landscape()[None, :H, :W], frames, 0)


def sawtooth(frames=FRAMES, period=12):
    """From 0 to 1 over each chunk, the first of which is 3 frames shorter: [T, 1, 1, 1]."""
    phase = (np.arange(frames, dtype=np.float32) + 3) % period
    return (phase / (period - 1))[:, None, None, None]


def softened(clip):
    """Each pixel averaged with its four neighbours."""
    total = clip.copy()
    for axis in (1, 2):
        total += np.roll(clip, 1, axis) + np.roll(clip, -1, axis)
    return total / 5


def dissolve(a, b, start, frames):
    """From clip a to clip b: the first frame with something of b is start + 1."""
    share = np.clip((np.arange(len(a)) - start) / frames, 0, 1).astype(np.float32)
    share = share[:, None, None, None]
    return a * (1 - share) + b * share


def as_pictures(clip):
    return np.clip(np.round(clip), 0, 255).astype(np.uint8)


def shown(clip, fps=24):
    """As from a file, one by one."""
    for i, frame in enumerate(as_pictures(clip)):
        yield Shown(Fraction(i, fps), Fraction(2 * i + 1, 2 * fps), frame)


def described(clip, chunk=3, fps=24):
    """The report of a clip, without a file. It must be strict JSON, and have a line."""
    series = measure(shown(clip, fps), 12)
    found = report.describe(series, "a.mp4", chunk, None, 12, [])
    json.dumps(found, allow_nan=False)
    assert report.line(found).startswith("a.mp4: ")
    return found
