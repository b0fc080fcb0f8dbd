"""Pixels out, and how frames are counted. Frames are uint8 [T, H, W, 3] outside, pixels in [-1, 1]
as [C, T, H, W] inside. pictures.py reads files, framing.py fits what they show to a size, mp4.py
writes them.
"""

import torch
from torch import Tensor

from wan5b.util import nearest

FPS = 24  # of the clips that the networks make


def latent_frames(frames: int) -> int:
    """How many latent frames that many pixel frames make. ValueError unless they are 4k + 1."""
    if frames < 1 or frames % 4 != 1:
        raise ValueError(f"{frames} frames are not 4k + 1; nearest valid: {nearest(frames, 4, 1)}")
    return (frames + 3) // 4


def to_frames(pixels: Tensor) -> Tensor:
    """Pixels [3, T, H, W], not clamped -> uint8 [T, H, W, 3], on the same device."""
    levels = pixels.float().clamp(-1, 1).add(1).mul(127.5)
    return levels.round().to(torch.uint8).permute(1, 2, 3, 0).contiguous()
