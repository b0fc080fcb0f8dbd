"""The arithmetic of wan5b/extras/fp8_kernels.py in plain torch, for CPUs: in float64, but for the
roundings that the kernels make.

It takes the place of that file, under the same names.
"""

import torch.nn.functional as F


def norm_silu(out, x, gamma, scale):
    normed = F.rms_norm(x.double(), x.shape[-1:], gamma.double(), eps=1e-24)
    out[:, :, :, :-1] = (F.silu(normed) * scale).float().to(out.dtype)
    out[:, :, :, -1] = 0


def convolve(x, weight, scale, bias, residual):
    """As one product over 27 taps: to each belong the rows at a constant distance."""
    B, past_and_T, H, line, C = x.shape
    T = past_and_T - 2
    taps = weight.double().unflatten(0, (27, -1))  # [27, N, C]
    rows = x.double().flatten(2, 3)  # [B, T + 2, H * (W + 1), C]
    rows = F.pad(rows, (0, 0, line + 1, line + 1))  # what lies outside of a frame is read as 0
    size = H * line

    sums = 0
    for tap in range(27):
        time, row, column = tap // 9, tap // 3 % 3, tap % 3
        start = row * line + column  # of the first pixel's neighbour, in the padded rows
        sums = sums + rows[:, time : time + T, start : start + size] @ taps[tap].T

    y = sums * scale.double() + bias.double()
    y = y.unflatten(2, (H, line))[:, :, :, :-1]
    if residual is not None:
        y = y + residual.double()
    return y.to(bias.dtype)
