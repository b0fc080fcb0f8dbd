"""The two Triton kernels of the float8 decoder (fp8_vae.py). Only Hopper runs them, so nothing may
import this file where there is no such GPU.

A frame [H, W, C] has a column of zeros behind it here, [H, W + 1, C], and is a matrix of
H * (W + 1) rows. So the neighbours of a pixel are the rows at a constant distance: the column is
the zero padding on the right of one line and on the left of the next, and what lies above and below
the frame the tensor memory accelerator reads as zeros. A 3x3x3 convolution is then one matrix
product over 27 * C, for which only the rows of the left operand move from tap to tap.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# A tile of the convolution: pixels, and at most so many output and input channels at a time. Beside
# half a tile of results Hopper's shared memory holds four stages, or three and half a residual.
PIXELS, OUT, IN = 128, 256, 128
WARPS, STAGES, STAGES_WITH_RESIDUAL = 8, 4, 3
NORM_VALUES = 4096  # that a program of the norm works on


# -------------------------------------------------------------------------------------------- norm


@triton.jit(do_not_specialize=["rows", "T", "H", "W"])
def norm_silu_kernel(
    x_ptr,
    gamma_ptr,
    out_ptr,
    scale,
    rows,
    T,
    H,
    W,
    x_b,
    x_t,
    x_h,
    x_w,
    out_b,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)

    # Where the rows lie: b, t, h, w of row = ((b * T + t) * H + h) * (W + 1) + w.
    w = row % (W + 1)
    h = row // (W + 1) % H
    frame = row // ((W + 1) * H)
    b = (frame // T).to(tl.int64)
    t = (frame % T).to(tl.int64)
    start = b * x_b + t * x_t + (h * x_h + w * x_w)

    inside = (row < rows) & (w < W)  # the column behind the frame becomes zeros
    valid = column < C
    mask = inside[:, None] & valid[None, :]
    x = tl.load(x_ptr + start[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
    gamma = tl.load(gamma_ptr + column, mask=valid, other=0.0).to(tl.float32)

    square = tl.sum(x * x, axis=1) / C
    x = x * tl.rsqrt(square + 1e-24)[:, None] * gamma[None, :]
    x = x * tl.sigmoid(x) * scale

    place = b * out_b + ((t * H + h) * (W + 1) + w) * C
    mask = (row < rows)[:, None] & valid[None, :]
    tl.store(out_ptr + place[:, None] + column[None, :], x.to(tl.float8e4nv), mask=mask)


def norm_silu(out: Tensor, x: Tensor, gamma: Tensor, scale: float) -> None:
    """out = silu(x / rms(x) * gamma) * scale, and 0 in the last column.

    out [B, T, H, W + 1, C] float8: a part of a larger buffer, in one piece for each b;
    x [B, T, H, W, C] bfloat16: any strides but the last.
    """
    B, T, H, W, C = x.shape
    assert x.stride(4) == 1
    columns = triton.next_power_of_2(C)
    rows_each = max(NORM_VALUES // columns, 1)
    rows = B * T * H * (W + 1)
    grid = (triton.cdiv(rows, rows_each),)
    sizes = (scale, rows, T, H, W, *x.stride()[:4], out.stride(0))
    with torch.cuda.device(x.device):
        norm_silu_kernel[grid](x, gamma, out, *sizes, C, columns, rows_each, num_warps=4)


# ------------------------------------------------------------------------------------- convolution


@triton.jit(do_not_specialize=["frames", "T", "H", "W"])
def convolve_kernel(
    x,
    weight,
    y,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    frames,
    T,
    H,
    W,
    residual_b,
    residual_t,
    residual_h,
    residual_w,
    C: tl.constexpr,
    N: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    steps: tl.constexpr = C // BK
    columns: tl.constexpr = N // BN
    half: tl.constexpr = BN // 2
    line = W + 1
    tiles = tl.cdiv(H * line, BM)
    # Flattened, the next tile's inputs are on their way while this one's results are written.
    for tile in tl.range(tl.program_id(0), frames * tiles * columns, PROGRAMS, flatten=True):
        n = tile % columns * BN
        m = tile // columns % tiles * BM
        frame = tile // columns // tiles
        first = frame + frame // T * 2  # of the three frames that it sees: each b has T + 2

        # The product over all taps: (time, row, column) of the kernel, then channels.
        sums = tl.zeros((BM, BN), tl.float32)
        for k in range(27 * steps):
            tap = k // steps
            c = k % steps * BK
            shift = (tap // 3 % 3 - 1) * line + tap % 3 - 1
            a = x.load([first + tap // 9, m + shift, c]).reshape(BM, BK)
            b = weight.load([tap * N + n, c])
            sums = tl.dot(a, b.T, sums)

        # The result in two halves, which need half the registers and shared memory.
        left, right = sums.reshape(BM, 2, half).permute(0, 2, 1).split()
        for i in tl.static_range(2):
            part = left if i == 0 else right
            column = n + i * half + tl.arange(0, half)
            scale = tl.load(scale_ptr + column)
            bias = tl.load(bias_ptr + column).to(tl.float32)
            part = part * scale[None, :] + bias[None, :]
            if HAS_RESIDUAL:
                row = m + tl.arange(0, BM)
                h = row // line
                w = row % line
                start = (frame // T).to(tl.int64) * residual_b
                start += (frame % T).to(tl.int64) * residual_t
                start += h.to(tl.int64) * residual_h + w * residual_w
                inside = (h < H) & (w < W)
                place = residual_ptr + start[:, None] + column[None, :]
                part += tl.load(place, mask=inside[:, None], other=0.0).to(tl.float32)
            y.store([frame, m, n + i * half], part.to(tl.bfloat16).reshape(1, BM, half))


def convolve(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, residual: Tensor | None
) -> Tensor:
    """The causal convolution of x, times scale, plus bias and residual.

    x [B, T + 2, H, W + 1, C] float8, two frames of past in front and zeros in the last column;
    weight [27 * N, C] float8, tap by tap; scale [N] float32; bias [N] and residual
    [B, T, H, W, N] bfloat16, of any strides but the last -> [B, T, H, W, N] bfloat16, a view of
    lines of W + 1. C and N are multiples of 64.
    """
    B, past_and_T, H, line, C = x.shape
    T = past_and_T - 2
    N = len(scale)
    channels_in = IN if C % IN == 0 else 64
    channels_out = OUT if N % OUT == 0 else 64

    y = torch.empty(B, T, H, line, N, dtype=torch.bfloat16, device=x.device)
    frames_in = x.view(-1, H * line, C)
    frames_out = y.view(-1, H * line, N)
    x_tiles = TensorDescriptor.from_tensor(frames_in, [1, PIXELS, channels_in])
    weight_tiles = TensorDescriptor.from_tensor(weight, [channels_out, channels_in])
    y_tiles = TensorDescriptor.from_tensor(frames_out, [1, PIXELS, channels_out // 2])

    strides = (0, 0, 0, 0)
    if residual is not None:
        assert residual.stride(4) == 1
        strides = residual.stride()[:4]
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count
    tensors = (x_tiles, weight_tiles, y_tiles, scale, bias, bias if residual is None else residual)
    sizes = (B * T, T, H, line - 1, *strides, C, N, residual is not None, programs)
    tile = (PIXELS, channels_out, channels_in)
    stages = STAGES if residual is None else STAGES_WITH_RESIDUAL
    with torch.cuda.device(x.device):
        grid = (programs,)
        convolve_kernel[grid](*tensors, *sizes, *tile, num_warps=WARPS, num_stages=stages)
    return y[:, :, :, :-1]
