"""Attention: without a mask for bidirectional and cached forwards, flex_attention for whole block-causal sequences.

B batch, S queries, S' keys, N heads, K head dim; tensors [B, S, N, K].
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# cuDNN is 1.5x faster than flash on Hopper; it takes no float32, for which the next ones stand in.
_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
_compiled_flex = torch.compile(
    flex_attention, dynamic=False, fullgraph=True
)  # fullgraph: too many shapes is an error
FLEX_BLOCK = 128


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None = None) -> Tensor:
    """Softmax attention: q [B, S, N, K], k and v [B, S', N, K] -> [B, S, N, K]. mask: as `interval_mask` makes it."""
    length, (q, k, v) = q.shape[1], (x.transpose(1, 2) for x in (q, k, v))
    if isinstance(mask, BlockMask):
        q, k, v = (F.pad(x, (0, 0, 0, -length % FLEX_BLOCK)) for x in (q, k, v))
        return _compiled_flex(q, k, v, block_mask=mask)[:, :, :length].transpose(1, 2)
    with sdpa_kernel(_BACKENDS, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def interval_mask(intervals: Tensor) -> Tensor | BlockMask:
    """A mask under which each query sees at most two intervals of keys: [lo0, hi0) and [lo1, hi1).

    intervals: [S, 4] int tensor (lo0, hi0, lo1, hi1) in tokens; an empty interval has lo = hi; they never overlap.
    On CUDA it is a flex_attention BlockMask, built from the intervals by counting (never from the S x S matrix); on
    the CPU, where flex_attention has no backward, a boolean matrix.
    """
    return block_mask(intervals) if intervals.is_cuda else dense_mask(intervals)


def dense_mask(intervals: Tensor) -> Tensor:
    """Which key (column) a query (row) sees, [S, S]."""
    kv = torch.arange(len(intervals), device=intervals.device)
    lo0, hi0, lo1, hi1 = (x[:, None] for x in intervals.unbind(1))
    return ((kv >= lo0) & (kv < hi0)) | ((kv >= lo1) & (kv < hi1))


def block_mask(intervals: Tensor) -> BlockMask:
    """The same for flex_attention, S rounded up to whole blocks."""
    pad = -len(intervals) % FLEX_BLOCK
    rows = torch.arange(len(intervals), len(intervals) + pad, device=intervals.device)
    itself = torch.stack(
        [rows, rows + 1, rows, rows], 1
    )  # padded rows see themselves: no row without a key
    table = torch.cat([intervals, itself]).int()
    lo0, hi0, lo1, hi1 = (x.contiguous() for x in table.unbind(1))

    edges = torch.arange(0, len(table), FLEX_BLOCK, device=table.device)

    def common(lo, hi):  # keys of each block that an interval holds, [S, S / 128]
        return (hi[:, None].clamp(max=edges + FLEX_BLOCK) - lo[:, None].clamp(min=edges)).clamp(
            min=0
        )

    seen = (common(lo0, hi0) + common(lo1, hi1)).unflatten(0, (-1, FLEX_BLOCK)).sum(1)
    full = seen == FLEX_BLOCK * FLEX_BLOCK
    partial_ = (seen > 0) & ~full

    def indices(flags):
        order = flags.int().argsort(dim=1, descending=True, stable=True)
        return flags.sum(1).int()[None, None], order.int()[None, None].contiguous()

    def mask_mod(b, h, q, kv):
        return ((kv >= lo0[q]) & (kv < hi0[q])) | ((kv >= lo1[q]) & (kv < hi1[q]))

    return BlockMask.from_kv_blocks(
        *indices(partial_), *indices(full), BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask_mod
    )


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept is for forwards with grad too
def causal_mask(
    blocks: tuple[int, ...], p: int, window: int | None, teacher: bool, device: torch.device
):
    """The mask of a whole block-causal sequence (blocks in frames, p tokens a frame), built once per shape.

    Plain: a query sees from `window` frames before its block's end (or from 0) to that end. Teacher forcing (CausVid,
    arXiv 2412.07772; Self Forcing, 2506.08009, fig. 2): the sequence is [clean, noisy]; clean queries as above; noisy
    ones see their own noisy block and the clean blocks before it, within the same window.
    """
    frames, start, clean, noisy = sum(blocks), 0, [], []
    for size in blocks:
        end = start + size
        first = max(0, end - window) if window else 0
        clean += [(first * p, end * p, 0, 0)] * (size * p)
        noisy += [(min(first, start) * p, start * p, (frames + start) * p, (frames + end) * p)] * (
            size * p
        )
        start = end
    return interval_mask(torch.tensor(clean + noisy if teacher else clean, device=device))
