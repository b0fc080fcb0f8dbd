"""Attention, masks of whole block-causal sequences, and rotary positions (RoPE).

Bidirectional and cached forwards need no mask; whole block-causal sequences go to flex_attention.
B batch, S queries, S' keys, N heads, K head dim; tensors are [B, S, N, K].
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# In this order: cuDNN is 1.5x faster than flash on Hopper, but takes no float32.
_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
# fullgraph makes it an error, not a slow fallback, when there are too many shapes.
_compiled_flex = torch.compile(flex_attention, dynamic=False, fullgraph=True)
FLEX_BLOCK = 128  # flex_attention skips or computes blocks of 128 queries x 128 keys


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None = None) -> Tensor:
    """Softmax attention: q [B, S, N, K], k and v [B, S', N, K] -> [B, S, N, K].

    mask: as `interval_mask` makes it.
    """
    length = q.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, N, S, K]
    if not isinstance(mask, BlockMask):
        with sdpa_kernel(_BACKENDS, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    padding = (0, 0, 0, -length % FLEX_BLOCK)
    q, k, v = (F.pad(x, padding) for x in (q, k, v))
    y = _compiled_flex(q, k, v, block_mask=mask)
    return y[:, :, :length].transpose(1, 2)


def interval_mask(intervals: Tensor) -> Tensor | BlockMask:
    """A mask under which each query sees at most two intervals of keys, [lo0, hi0) and [lo1, hi1).

    intervals: [S, 4] int tensor (lo0, hi0, lo1, hi1) in tokens; an empty interval has lo = hi; the
    two never overlap. On CUDA the mask is a BlockMask for flex_attention; on the CPU, where that
    has no backward, a boolean matrix.
    """
    return block_mask(intervals) if intervals.is_cuda else dense_mask(intervals)


def dense_mask(intervals: Tensor) -> Tensor:
    """Which key (column) a query (row) sees, bool [S, S]."""
    keys = torch.arange(len(intervals), device=intervals.device)
    lo0, hi0, lo1, hi1 = intervals.unsqueeze(-1).unbind(1)  # [S, 1] each
    first = (keys >= lo0) & (keys < hi0)
    second = (keys >= lo1) & (keys < hi1)
    return first | second


def block_mask(intervals: Tensor) -> BlockMask:
    """The same for flex_attention, with S rounded up to whole blocks of 128.

    It is built by counting the keys that each block shows, never from the S x S matrix.
    """
    # Padded queries see themselves, since no row may be without a key.
    pad = -len(intervals) % FLEX_BLOCK
    rows = torch.arange(len(intervals), len(intervals) + pad, device=intervals.device)
    itself = torch.stack([rows, rows + 1, rows, rows], 1)
    table = torch.cat([intervals, itself]).int()
    lo0, hi0, lo1, hi1 = (column.contiguous() for column in table.unbind(1))

    # How many of its 128 x 128 pairs each block shows, [S / 128, S / 128].
    edges = torch.arange(0, len(table), FLEX_BLOCK, device=table.device)

    def common(lo: Tensor, hi: Tensor) -> Tensor:
        """Keys that each block of keys has in common with each query's interval, [S, S / 128]."""
        end = hi[:, None].clamp(max=edges + FLEX_BLOCK)
        start = lo[:, None].clamp(min=edges)
        return (end - start).clamp(min=0)

    seen = common(lo0, hi0) + common(lo1, hi1)
    seen = seen.unflatten(0, (-1, FLEX_BLOCK)).sum(1)
    full = seen == FLEX_BLOCK * FLEX_BLOCK
    partly = (seen > 0) & ~full

    def listed(flags: Tensor) -> tuple[Tensor, Tensor]:
        """Per row: how many blocks are flagged, and all blocks, flagged ones first."""
        order = flags.int().argsort(dim=1, descending=True, stable=True)
        return flags.sum(1).int()[None, None], order.int()[None, None].contiguous()

    def mask_mod(b, h, q, kv):
        return ((kv >= lo0[q]) & (kv < hi0[q])) | ((kv >= lo1[q]) & (kv < hi1[q]))

    return BlockMask.from_kv_blocks(
        *listed(partly), *listed(full), BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask_mod
    )


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # a mask made in inference mode would be of no use in training
def causal_mask(
    chunks: tuple[int, ...], p: int, window: int | None, teacher: bool, device: torch.device
) -> Tensor | BlockMask:
    """The mask of a whole block-causal sequence of chunks (in frames, of p tokens each).

    Plain: a query sees from `window` frames before its chunk's end (or from frame 0) to that end.
    Teacher forcing (CausVid, arXiv 2412.07772; Self Forcing, 2506.08009, fig. 2): the sequence is
    [clean, noisy]; clean queries see as above, noisy ones their own noisy chunk and the clean
    chunks before it, within the same window. Built once per shape.
    """
    frames = sum(chunks)
    clean = []
    noisy = []
    start = 0
    for size in chunks:
        end = start + size
        first = max(0, end - window) if window else 0
        tokens = size * p
        clean += [(first * p, end * p, 0, 0)] * tokens
        own = ((frames + start) * p, (frames + end) * p)
        noisy += [(min(first, start) * p, start * p, *own)] * tokens
        start = end
    intervals = clean + noisy if teacher else clean
    return interval_mask(torch.tensor(intervals, device=device))


# --------------------------------------------------------------------------------------------- RoPE


def frequencies(n: int, device: torch.device) -> Tensor:
    """The n geometric frequencies from 1 towards 1 / 10000, float64."""
    return 10000.0 ** -(torch.arange(n, dtype=torch.float64, device=device) / n)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # the table is kept, and later forwards may carry grad
def rope_table(
    head_dim: int, start: int, frames: int, height: int, width: int, device: torch.device
) -> Tensor:
    """Rotations of frames start .. start + frames (RoFormer, arXiv 2104.09864), [2, 1, S, 1, K]
    float32.

    They are (cos, cos) and (-sin, sin) of each channel pair's angle. Angles are float64, of the
    very positions asked for, so no length limit. The K/2 pairs are split over (time, row, column),
    each axis with a frequency table of its own.
    """
    spatial = head_dim // 6
    pairs = (head_dim // 2 - 2 * spatial, spatial, spatial)
    ranges = ((start, start + frames), (0, height), (0, width))
    axes = [torch.arange(*ends, dtype=torch.float64, device=device) for ends in ranges]

    angles = []
    for positions, n in zip(torch.meshgrid(axes, indexing="ij"), pairs, strict=True):
        angles.append(positions.reshape(-1, 1, 1) * frequencies(n, device))
    angle = torch.cat(angles, -1)[None]  # [1, S, 1, K/2]
    # [1, S, 1, K] each, with no constant from the host, for which the host would wait.
    cos = angle.cos().repeat_interleave(2, -1)
    sin = torch.stack([-angle.sin(), angle.sin()], -1).flatten(-2)
    return torch.stack([cos, sin]).float()


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate adjacent channel pairs of x [B, S, N, K] in float32; the result has the dtype of x."""
    cos, sin = rope
    # A flip compiles to one kernel, where a stack of the two halves takes two.
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (x.float() * cos + swapped.float() * sin).to(x.dtype)
