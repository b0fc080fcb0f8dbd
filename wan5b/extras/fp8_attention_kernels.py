"""The two kernels of attention in float8 (fp8_attention.py), in Triton and Gluon, which is Triton
with layouts and barriers written out. Only Hopper runs them, so nothing may import this file where
there is no such GPU.

What a tensor core's product leaves in a thread's registers is not in the order in which the next
product takes its left operand, if that is float8: of 16 columns a thread of four has two and two,
and must have four in a row. Nobody cares in which order keys come, so values lie in memory in that
order (`position`), and the weights of the softmax stay in the registers they are in.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

ROWS = 64  # that a program of `round_kernel` works on
LARGEST = tl.constexpr(448.0)

# Queries of a warpgroup (what its products take), keys of a tile, tiles in shared memory.
QUERIES, KEYS, STAGES = 64, 128, 2
# Triton 3.9 knows the new name alone, 3.6 and 3.7 the old one.
load_tile = getattr(tma, "async_load", tma.async_copy_global_to_shared)
CONSUMERS = gl.constexpr(3)  # warpgroups that multiply: as many as the registers are enough for
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
    assert q.stride()[1:] == k.stride()[1:] == v.stride()[1:]
    assert k.stride()[2:] == (K, 1)
    assert B == 1 or q.stride(0) == k.stride(0) == v.stride(0)
    assert q8.stride()[1:] == keys.stride()[1:] == (N * K, K, 1)
    grid = (triton.cdiv(first % 16 + S, ROWS), N, B)
    q8_rows = q8.stride(0) // (N * K)
    sizes = (first, S, keys.shape[1] // 16, q8_rows, k.stride(0), k.stride(1), N, K, ROWS)
    whole = first % 16 == 0 and S % 16 == 0
    with torch.cuda.device(q.device):
        round_kernel[grid](q, k, v, q8, keys, values, *sizes, whole, num_warps=4)


# --------------------------------------------------------------------------------------- attention


@gluon.jit
def weigh(scores, largest, total, scale):
    """A tile more of the softmax: its weights, and what fades the sums of the tiles before."""
    larger = gl.maximum(largest, gl.max(scores, 1) * scale)
    # Up to 256 in place of 1: what is 2^-17 of the largest weight is still told from 0.
    weights = gl.exp2(scores * scale - (larger - 8.0)[:, None])
    fade = gl.exp2(largest - larger)
    total = total * fade + gl.sum(weights, 1)
    return weights, fade, larger, total


@gluon.jit
def as_left_operand(weights, layout: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr):
    """In float8, each in the thread it is in (`position`)."""
    weights = weights.reshape(BM, BN // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(BM, BN)
    weights = gl.convert_layout(weights, layout, assert_trivial=True)
    # Four at once: one by one they are packed and unpacked, in a third more instructions a tile.
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }
        """,
        "=r,r,r,r,r",
        [weights],
        dtype=gl.float8e4nv,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def times_tile(left, tiles, full, empty, i, zeros):
    """left @ the i-th tile's transpose, shaped like zeros. full, empty: the tiles' barriers."""
    stage = i % tiles.shape[0]
    mbarrier.wait(full.index(stage), (i // tiles.shape[0]) & 1)
    right = tiles.index(stage).permute((1, 0))
    running = warpgroup_mma(left, right, zeros, use_acc=False, is_async=True)
    product = warpgroup_mma_wait(0, deps=(running,))
    mbarrier.arrive(empty.index(stage), count=1)
    return product


@gluon.jit
def consume(group: gl.constexpr, memory, full, empty, out_ptr, scale, S, length, N: gl.constexpr):
    """The queries of one of the groups over all keys.

    group: of CONSUMERS. memory: q [CONSUMERS, BM, K], k [STAGES, BN, K], v [STAGES, K, BN], shared.
    full: their barriers, behind which a tile has come. empty: those of k and v, behind which every
    group has read a tile, so that the next may take its place.
    """
    q, k, v = memory
    q_full, k_full, v_full = full
    k_empty, v_empty = empty
    BN: gl.constexpr = k.shape[1]
    BM: gl.constexpr = q.shape[1]
    K: gl.constexpr = q.shape[2]
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 32])
    left: gl.constexpr = gl.DotOperandLayout(0, sums_layout, k_width=4)
    of_scores: gl.constexpr = gl.SliceLayout(1, scores_layout)
    of_sums: gl.constexpr = gl.SliceLayout(1, sums_layout)
    q = q.index(group)
    no_scores = gl.zeros((BM, BN), gl.float32, scores_layout)
    no_sums = gl.zeros((BM, K), gl.float32, sums_layout)
    largest = gl.full((BM,), -float("inf"), gl.float32, of_scores)
    total = gl.zeros((BM,), gl.float32, of_scores)
    sums = no_sums
    tiles = gl.cdiv(length, BN)

    # The last tile comes first, so that no other needs a mask.
    mbarrier.wait(q_full, 0)
    scores = times_tile(q, k, k_full, k_empty, 0, no_scores)
    column = (tiles - 1) * BN + gl.arange(0, BN, gl.SliceLayout(0, scores_layout))
    scores = gl.where((column < length)[None, :], scores, -float("inf"))

    for i in range(1, tiles):
        weights, fade, largest, total = weigh(scores, largest, total, scale)
        weights = as_left_operand(weights, left, BM, BN)
        part = times_tile(weights, v, v_full, v_empty, i - 1, no_sums)
        # Added here, in float32: the tensor core's own sums of float8 products have some 13 bits.
        sums = sums * gl.convert_layout(fade, of_sums)[:, None] + part
        scores = times_tile(q, k, k_full, k_empty, i, no_scores)

    weights, fade, largest, total = weigh(scores, largest, total, scale)
    weights = as_left_operand(weights, left, BM, BN)
    part = times_tile(weights, v, v_full, v_empty, tiles - 1, no_sums)
    sums = sums * gl.convert_layout(fade, of_sums)[:, None] + part

    out = sums / gl.convert_layout(total, of_sums)[:, None]
    row = (gl.program_id(0) * CONSUMERS + group) * BM + gl.arange(0, BM, of_sums)
    channel = gl.program_id(1) * K + gl.arange(0, K, gl.SliceLayout(0, sums_layout))
    place = (gl.program_id(2) * S + row).to(gl.int64)[:, None] * (N * K) + channel[None, :]
    gl.store(out_ptr + place, out.to(gl.bfloat16), mask=(row < S)[:, None])


@gluon.jit
def produce(q_tiles, k_tiles, v_tiles, memory, full, empty, rows, S, length, N: gl.constexpr):
    """Load what the others consume, each tile when its place is empty: see `consume`."""
    head = gl.program_id(1)
    b = gl.program_id(2)
    q, k, v = memory
    q_full, k_full, v_full = full
    k_empty, v_empty = empty
    STAGES: gl.constexpr = k.shape[0]
    BN: gl.constexpr = k.shape[1]
    BM: gl.constexpr = q.shape[1]
    K: gl.constexpr = q.shape[2]

    mbarrier.expect(q_full, CONSUMERS * q_tiles.block_type.nbytes)
    for group in gl.static_range(CONSUMERS):
        row = b * S + (gl.program_id(0) * CONSUMERS + group) * BM
        load_tile(q_tiles, [row, head * K], q_full, q.index(group))

    tiles = gl.cdiv(length, BN)
    for i in range(tiles):
        start = (i + tiles - 1) % tiles * BN
        stage = i % STAGES
        phase = (i // STAGES & 1) ^ 1  # in the first round a wait for this ends at once
        mbarrier.wait(k_empty.index(stage), phase)
        mbarrier.expect(k_full.index(stage), k_tiles.block_type.nbytes)
        place = [b * rows + start, head * K]
        load_tile(k_tiles, place, k_full.index(stage), k.index(stage))

        mbarrier.wait(v_empty.index(stage), phase)
        mbarrier.expect(v_full.index(stage), v_tiles.block_type.nbytes)
        place = [(b * N + head) * K, start]
        load_tile(v_tiles, place, v_full.index(stage), v.index(stage))


@gluon.jit(do_not_specialize=["S", "length", "rows"])
def attend_kernel(
    q_tiles,
    k_tiles,
    v_tiles,
    out_ptr,
    S,
    length,
    rows,
    scale,
    N: gl.constexpr,
    K: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Three groups of BM queries of a head over all its keys, BN at a time.

    Each group is a warpgroup's; a warp beside them brings the tiles into shared memory. While one
    group multiplies the others take exponentials, and the tiles serve all three: a program of one
    group alone is held up by what it reads.
    """
    q = gl.allocate_shared_memory(gl.float8e4nv, [CONSUMERS, BM, K], q_tiles.layout)
    k = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BN, K], k_tiles.layout)
    v = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, K, BN], v_tiles.layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    mbarrier.init(q_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=CONSUMERS)
        mbarrier.init(v_empty.index(stage), count=CONSUMERS)

    memory = (q, k, v)
    full = (q_full, k_full, v_full)
    empty = (k_empty, v_empty)
    gl.warp_specialize(
        [
            (consume, (0, memory, full, empty, out_ptr, scale, S, length, N)),
            (consume, (1, memory, full, empty, out_ptr, scale, S, length, N)),
            (consume, (2, memory, full, empty, out_ptr, scale, S, length, N)),
            (produce, (q_tiles, k_tiles, v_tiles, memory, full, empty, rows, S, length, N)),
        ],
        [4, 4, 1],  # warps of all but the first
        [160, 160, 24],  # their registers a thread
    )


def tiles_of(x: Tensor, shape: list[int], stride: int, tile: list[int]) -> TensorDescriptor:
    """x as rows, to be read tile by tile; what lies behind them is read as zeros."""
    layout = gl.NVMMASharedLayout.get_default_for(tile, gl.float8e4nv)
    return TensorDescriptor(x, shape, [stride, 1], tile, layout)


def attend(q8: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
    """Softmax attention over the first `length` rows of keys and values: [B, S, N, K] bfloat16.

    q8 [B, S, N, K], keys [B, R, N, K] and values [B, N, K, R] float8, the latter as `round_into`
    lays them; parts of a larger memory of the same strides. All R rows must be finite.
    """
    B, S, N, K = q8.shape
    assert q8.is_contiguous()
    assert 0 < length <= keys.shape[1], f"{length} of {keys.shape[1]} rows"
    rows = values.stride(2)  # of the memory
    out = torch.empty(B, S, N, K, dtype=torch.bfloat16, device=q8.device)
    q_tiles = tiles_of(q8, [B * S, N * K], N * K, [QUERIES, K])
    k_tiles = tiles_of(keys, [(B - 1) * rows + keys.shape[1], N * K], N * K, [KEYS, K])
    v_tiles = tiles_of(values, [B * N * K, values.shape[3]], rows, [K, KEYS])
    scale = K**-0.5 * LOG2_E
    grid = (triton.cdiv(S, CONSUMERS.value * QUERIES), N, B)
    sizes = (S, length, rows, scale, N, K, QUERIES, KEYS, STAGES)
    with torch.cuda.device(q8.device):
        attend_kernel[grid](q_tiles, k_tiles, v_tiles, out, *sizes, num_warps=4)
    return out
