"""The two Triton kernels of attention in float8 (fp8_attention.py). Only Hopper runs them, so
nothing may import this file where there is no such GPU.

What a tensor core's product leaves in a thread's registers is not in the order in which the next
product takes its left operand, if that is float8: of 16 columns a thread of four has two and two,
and must have four in a row. Nobody cares in which order keys come, so values lie in memory in that
order (`position`), and the weights of the softmax stay in the registers they are in.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Queries and keys of a tile. Three programs of so many run on a multiprocessor at a time, so that
# the products of one overlap the exponentials of another.
QUERIES, KEYS = 64, 128
WARPS, STAGES = 4, 2
ROWS = 64  # that a program of `round_kernel` works on
LARGEST = tl.constexpr(448.0)
LOG2_E = 1.4426950408889634


@triton.jit
def to_fp8(x):
    x = x.to(tl.float32)
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST).to(tl.float8e4nv)


@triton.jit(do_not_specialize=["first", "S", "groups", "q8_rows"])
def round_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q8_ptr,
    keys_ptr,
    values_ptr,
    first,
    S,
    groups,
    q8_rows,
    in_b,
    in_s,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    at = first // 16 * 16 + tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # in the memory
    rows = groups * 16  # so that the compiler knows where 16 bytes are in line
    channel = tl.arange(0, K)
    in_q = b * in_b + head * K + channel[None, :]

    row = (at - first)[:, None]
    mask = (row >= 0) & (row < S)
    q = to_fp8(tl.load(q_ptr + in_q + row.to(tl.int64) * in_s, mask=mask, other=0.0))
    to_q = (b * q8_rows + row) * (N * K) + head * K + channel[None, :]
    tl.store(q8_ptr + to_q, q, mask=mask)
    k = to_fp8(tl.load(k_ptr + in_q + row.to(tl.int64) * in_s, mask=mask, other=0.0))
    to_k = (b * rows + at[:, None]) * (N * K) + head * K + channel[None, :]
    tl.store(keys_ptr + to_k, k, mask=mask)

    # The row whose values lie there: at 4 c + 2 b + a those of 8 b + 2 c + a.
    n = at % 16
    row = at - n + n // 4 * 2 + n // 2 % 2 * 8 + n % 2 - first
    mask = (row >= 0) & (row < S)
    place = in_q + row[:, None].to(tl.int64) * in_s
    v = to_fp8(tl.load(v_ptr + place, mask=mask[:, None], other=0.0))
    to_v = ((b * N + head) * K + channel[:, None]) * rows + at[None, :]
    if WHOLE:  # groups are written or not: in one piece
        mask = at // 16 * 16 < first + S
    tl.store(values_ptr + to_v, v.T, mask=mask[None, :])


def round_into(q8: Tensor, keys: Tensor, values: Tensor, first: int, q, k, v) -> None:
    """q8 = q, and k and v into the memory from its row `first` on, all of them rounded.

    q8 [B, S, N, K], keys [B, R, N, K], values [B, N, K, R] float8, each in one piece (q8: of each
    b); q, k, v [B, S, N, K] bfloat16, of the same strides. R is a multiple of 16.
    """
    B, S, N, K = k.shape
    assert q.stride() == k.stride() == v.stride()
    assert k.stride()[2:] == (K, 1)
    assert q8.stride()[1:] == keys.stride()[1:] == (N * K, K, 1)
    grid = (triton.cdiv(first % 16 + S, ROWS), N, B)
    q8_rows = q8.stride(0) // (N * K)
    sizes = (first, S, keys.shape[1] // 16, q8_rows, k.stride(0), k.stride(1), N, K, ROWS)
    whole = first % 16 == 0 and S % 16 == 0
    with torch.cuda.device(q.device):
        round_kernel[grid](q, k, v, q8, keys, values, *sizes, whole, num_warps=4)


# --------------------------------------------------------------------------------------- attention


@triton.jit
def tile(
    q,
    k_tiles,
    v_tiles,
    k_row,
    v_row,
    head,
    start,
    length,
    largest,
    total,
    sums,
    scale,
    MASKED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    K: tl.constexpr,
):
    """A tile of keys more: the largest score so far, the weights' sum and the weighted values."""
    k = k_tiles.load([k_row + start, head * K])
    scores = tl.dot(q, k.T)
    if MASKED:
        seen = start + tl.arange(0, BN) < length
        scores = tl.where(seen[None, :], scores, -float("inf"))

    larger = tl.maximum(largest, tl.max(scores, 1) * scale)
    # Up to 256 in place of 1: what is 2^-17 of the largest weight is still told from 0.
    weights = tl.exp2(scores * scale - (larger - 8.0)[:, None])
    fade = tl.exp2(largest - larger)
    total = total * fade + tl.sum(weights, 1)

    weights = weights.to(tl.float8e4nv)
    weights = weights.reshape(BM, BN // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(BM, BN)
    v = v_tiles.load([v_row, start])
    # Added here, in float32: the tensor core's own sums of float8 products have some 13 bits.
    sums = sums * fade[:, None] + tl.dot(weights, v.T)
    return larger, total, sums


@triton.jit(do_not_specialize=["S", "length", "rows"])
def attend_kernel(
    q_tiles,
    k_tiles,
    v_tiles,
    out_ptr,
    S,
    length,
    rows,
    scale,
    N: tl.constexpr,
    K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    first = tl.program_id(0) * BM
    head = tl.program_id(1)
    b = tl.program_id(2)
    k_row = b * rows
    v_row = (b * N + head) * K

    q = q_tiles.load([b * S + first, head * K])
    largest = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM, K), tl.float32)
    whole = length // BN * BN
    for start in tl.range(0, whole, BN, num_stages=STAGES):
        largest, total, sums = tile(
            q, k_tiles, v_tiles, k_row, v_row, head, start, length, largest, total, sums, scale,
            False, BM, BN, K,
        )  # fmt: skip
    if whole < length:
        largest, total, sums = tile(
            q, k_tiles, v_tiles, k_row, v_row, head, whole, length, largest, total, sums, scale,
            True, BM, BN, K,
        )  # fmt: skip

    row = first + tl.arange(0, BM)
    place = (b * S + row[:, None]).to(tl.int64) * (N * K) + head * K + tl.arange(0, K)[None, :]
    tl.store(out_ptr + place, (sums / total[:, None]).to(tl.bfloat16), mask=(row < S)[:, None])


def attend(q8: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
    """Softmax attention over the first `length` rows of keys and values: [B, S, N, K] bfloat16.

    q8 [B, S, N, K], keys [B, R, N, K] and values [B, N, K, R] float8, the latter as `round_into`
    lays them; parts of a larger memory of the same strides. All R rows must be finite.
    """
    B, S, N, K = q8.shape
    rows = values.stride(2)  # of the memory
    out = torch.empty(B, S, N, K, dtype=torch.bfloat16, device=q8.device)
    q_tiles = TensorDescriptor.from_tensor(q8.view(B * S, N * K), [QUERIES, K])
    # What lies behind the last row is read as zeros.
    k_shape = [(B - 1) * rows + keys.shape[1], N * K]
    v_shape = [B * N * K, values.shape[3]]
    k_tiles = TensorDescriptor(keys, k_shape, [N * K, 1], [KEYS, K])
    v_tiles = TensorDescriptor(values, v_shape, [rows, 1], [K, KEYS])
    scale = K**-0.5 * LOG2_E
    grid = (triton.cdiv(S, QUERIES), N, B)
    sizes = (S, length, rows, scale, N, K, QUERIES, KEYS, STAGES)
    with torch.cuda.device(q8.device):
        attend_kernel[grid](
            q_tiles, k_tiles, v_tiles, out, *sizes, num_warps=WARPS, num_stages=STAGES
        )
    return out
