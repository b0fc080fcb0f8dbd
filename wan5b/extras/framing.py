"""A picture of any shape -> pixels of the size that a network is asked for."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def fit(frames: np.ndarray, height: int, width: int) -> Tensor:
    """uint8 [T, h, w, 3] -> pixels [3, T, height, width] in [-1, 1].

    Each frame is scaled (Lanczos) until it covers the size, then cut to its middle. ValueError if
    that leaves less than 1% of it.
    """
    h, w = frames.shape[1:3]
    scale = max(height / h, width / w)
    scaled_width = max(round(w * scale), width)
    scaled_height = max(round(h * scale), height)
    if scaled_height * scaled_width > 100 * height * width:
        raise ValueError(f"of {h}x{w} pixels {height}x{width} would show below 1%; crop them first")
    left = (scaled_width - width) // 2
    top = (scaled_height - height) // 2

    cropped = []
    for frame in frames:
        resized = resize(frame, (scaled_width, scaled_height))
        cropped.append(resized[top : top + height, left : left + width])
    pixels = torch.from_numpy(np.stack(cropped))  # [T, H, W, 3]
    return pixels.permute(3, 0, 1, 2).float() / 127.5 - 1  # [3, T, H, W]


def resize(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A frame [h, w, 3] scaled to size, which is (width, height) as Pillow has it."""
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))
