"""The VAE's decoder in float8 (e4m3) on Hopper: the convolutions of its residual blocks.

They are nine tenths of the decoder's arithmetic. Each one's input is silu(norm(x)), which is
written as float8 at once, and so are the frames that a stream remembers. The first and the last
convolution, the upsampling, the shortcuts and attention stay in bfloat16; so do the two blocks at
the start, whose errors go through all others: a seventieth of the arithmetic, and with random
weights two fifths of the squared error of decoded frames.
"""

import math

import torch
from torch import Tensor, nn

from wan5b.extras.fp8 import FP8, LARGEST
from wan5b.vae22 import VAE22, CausalConv3d, ResidualBlock, RMSNorm, Stream, pointwise

MULTIPLE = 64  # of which the widths must be: the kernels' smallest step
PAST = 2  # frames that a kernel of three sees beside its own


class Fp8Conv(nn.Module):
    """conv(silu(norm(x))) with input and weight rounded to float8; bfloat16 in and out.

    One scale for the whole input, so that a pixel comes out the same in whatever company: a value
    behind the norm is at most sqrt(C) * gamma, and what that gives becomes the largest float8. No
    value can be too large, and those of the usual size keep all bits of their mantissas. Weights
    have a scale for each output channel.
    """

    def __init__(self, norm: RMSNorm, conv: CausalConv3d):
        super().__init__()
        gamma = norm.gamma.detach().flatten()
        largest = math.sqrt(len(gamma)) * gamma.abs().max().item()
        self.gamma = nn.Parameter(gamma, requires_grad=False)
        self.input_scale = LARGEST / max(largest, 1e-12)

        weight, scale = round_weight(conv.weight.detach())
        self.weight = nn.Parameter(weight, requires_grad=False)  # [27 * N, C]
        self.scale = nn.Buffer(scale / self.input_scale, persistent=False)  # [N], of the result
        self.bias = conv.bias

    def forward(self, x: Tensor, state: Stream, residual: Tensor | None = None) -> Tensor:
        """x [B, T, H, W, C] -> [B, T, H, W, N], plus the residual; lines are W + 1 pixels apart."""
        from wan5b.extras import fp8_kernels  # needs Triton

        B, T, H, W, C = x.shape
        buffer = torch.empty(B, PAST + T, H, W + 1, C, dtype=FP8, device=x.device)
        buffer[:, :PAST] = state.history.get(self, 0)  # zeros before the video
        fp8_kernels.norm_silu(buffer[:, PAST:], x, self.gamma, self.input_scale)
        state.history[self] = buffer[:, -PAST:].clone()
        return fp8_kernels.convolve(buffer, self.weight, self.scale, self.bias, residual)


def round_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, C, 3, 3, 3] -> float8 [27 * N, C], tap by tap, and float32 scales [N]."""
    weight = weight.float()
    peak = weight.abs().amax((1, 2, 3, 4))
    scale = peak.clamp(min=1e-12) / LARGEST  # a channel of zeros
    weight = weight / scale.view(-1, 1, 1, 1, 1)
    taps = weight.permute(2, 3, 4, 0, 1)  # [3, 3, 3, N, C]
    return taps.flatten(0, 3).to(FP8, memory_format=torch.contiguous_format), scale


class Fp8ResidualBlock(nn.Module):
    """A ResidualBlock whose convolutions are in float8; the second one adds the input."""

    def __init__(self, block: ResidualBlock):
        super().__init__()
        norm1, conv1, norm2, conv2 = block.residual.values()
        self.conv1 = Fp8Conv(norm1, conv1)
        self.conv2 = Fp8Conv(norm2, conv2)
        self.shortcut = block.shortcut

    def forward(self, x: Tensor, state: Stream) -> Tensor:
        h = self.conv1(x, state)
        if self.shortcut is not None:
            x = pointwise(self.shortcut, x)
        return self.conv2(h, state, residual=x)


def quantize_decoder(vae: nn.Module) -> nn.Module:
    """Replace, in place, the residual blocks of a VAE decoder's up stages; the encoder stays.

    It must be a VAE22 where it is to run, in bfloat16: ValueError for other codecs, dtypes, widths
    and devices. What is replaced can't be moved to another dtype, exported or replaced again.
    """
    check(vae)
    for stage in vae.decoder["upsamples"]:
        for i, layer in enumerate(stage.upsamples):
            if isinstance(layer, ResidualBlock):
                stage.upsamples[i] = Fp8ResidualBlock(layer)
    return vae


def check(vae: nn.Module) -> None:
    """ValueError, in one line, unless this VAE's decoder can run in float8 where it is."""
    if not isinstance(vae, VAE22):
        wrong = f"--fp8-vae is for the Wan2.2 VAE, not a {type(vae).__name__}: leave it out"
        raise ValueError(wrong)
    weight = vae.decoder["conv1"].weight
    device = weight.device
    widths = [vae.cfg.dec_dim * factor for factor in (1, *vae.cfg.dim_mult)]
    wrong = ""
    if device.type != "cuda":
        wrong = f"needs a Hopper GPU (H100, H200), not {device}"
    elif torch.cuda.get_device_capability(device)[0] != 9:
        wrong = f"needs a Hopper GPU (H100, H200), not {torch.cuda.get_device_name(device)}"
    elif weight.dtype != torch.bfloat16:
        wrong = f"needs bfloat16, not {weight.dtype}"
    elif any(width % MULTIPLE for width in widths):
        wrong = f"needs widths that are multiples of {MULTIPLE}, not {widths}"
    if wrong:
        raise ValueError(f"a float8 decoder {wrong}: leave out --fp8-vae")
