"""A fixed linear codec with the Wan2.2 VAE's geometry and interface, for the tiny world: no weights, nothing to learn.

A patch of 4 frames x 16 x 16 pixels of one colour is its 16 lowest 3-D DCT coefficients (time + row + column
frequency at most 3, time at most 1); three colours give the 48 channels. The coefficients of time frequency 1 hold the
motion inside a latent frame. The basis is orthonormal, so decoding is encoding transposed.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class CodecConfig:
    """scale: factor from DCT coefficients to latents; temporal_scale: further factor on those of time frequency 1."""

    scale: float = 0.5
    temporal_scale: float = 3.0
    z_dim: int = 48
    spatial_stride: int = 16
    temporal_stride: int = 4


@dataclass(eq=False)
class Stream:
    """How far one decoding has come."""

    frames: int = 0  # latent frames fed so far


def dct_matrix(n: int) -> Tensor:
    """The orthonormal DCT-II: [n frequencies, n samples] float32."""
    k, x = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi * (x + 0.5) * k / n) * (2 / n) ** 0.5
    matrix[0] /= 2**0.5
    return matrix.float()


class DCTCodec(nn.Module):
    """Its only state is the config. Computes in float32; nothing carries grad."""

    def __init__(self, cfg: CodecConfig):
        super().__init__()
        self.cfg = cfg
        time, space = dct_matrix(cfg.temporal_stride), dct_matrix(cfg.spatial_stride)
        orders = [(t, y, x) for t in range(2) for y in range(4) for x in range(4) if t + y + x <= 3]
        if 3 * len(orders) != cfg.z_dim:
            raise ValueError(f"the codec has {3 * len(orders)} channels, not z_dim {cfg.z_dim}")
        basis = torch.stack([torch.einsum("t,h,w->thw", time[t], space[y], space[x]) for t, y, x in orders])
        factors = torch.tensor([cfg.scale * cfg.temporal_scale**t for t, _, _ in orders])
        self.register_buffer("basis", basis[:, None], persistent=False)  # [16, 1, 4, 16, 16]
        self.register_buffer("factors", factors.view(-1, 1, 1, 1), persistent=False)  # [16, 1, 1, 1]

    def stream(self) -> Stream:
        """State for one video through `decode_chunk`."""
        return Stream()

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Pixels in [-1, 1], [B, 3, 1 + 4k, H, W] -> latents [B, 48, 1 + k, H/16, W/16]; frame 0 counts as 4 copies."""
        stride = self.cfg.temporal_stride
        if video.shape[2] % stride != 1 or any(size % self.cfg.spatial_stride for size in video.shape[3:]):
            raise ValueError(f"video must be [B, 3, 4k + 1, 16h, 16w], got {list(video.shape)}")
        video = torch.cat([video[:, :, :1].expand(-1, -1, stride - 1, -1, -1), video], 2).float()
        z = F.conv3d(video.flatten(0, 1)[:, None], self.basis, stride=self.basis.shape[2:])  # [B*3, 16, T, H, W]
        return (z * self.factors).unflatten(0, (-1, 3)).flatten(1, 2)

    def decode(self, latent: Tensor) -> Tensor:
        """Latents [B, 48, T, H, W] -> pixels [B, 3, 1 + 4(T - 1), 16H, 16W], about [-1, 1], not clamped, float32."""
        return self.decode_chunk(latent, self.stream())

    @torch.no_grad()
    def decode_chunk(self, latent: Tensor, state: Stream) -> Tensor:
        """The next pixels of a stream from its next latents [B, 48, n, H, W]: 4n frames, 1 + 4(n - 1) at the start."""
        z = latent.float().unflatten(1, (3, -1)).flatten(0, 1) / self.factors  # [B*3, 16, n, H, W]
        video = F.conv_transpose3d(z, self.basis, stride=self.basis.shape[2:]).unflatten(0, (-1, 3))[:, :, 0]
        if state.frames == 0:
            stride = self.cfg.temporal_stride
            video = torch.cat([video[:, :, :stride].mean(2, keepdim=True), video[:, :, stride:]], 2)
        state.frames += latent.shape[2]
        return video
