"""Self-attention of training, from outside: `arrange(model, keep, split)`.

keep: checkpointing makes everything of a layer again in the backward, but for the results of its
self-attention, which are kept: 2 D bytes a token and layer in bfloat16, a tenth of the arithmetic
of a critic's step.

split: whole causal sequences (ar, ode) go chunk by chunk through attention without a mask, which is
faster on a GPU than flex_attention with one. Equal but for rounding.
"""

from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache, partial
from itertools import accumulate

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from wan5b.attention import attention
from wan5b.dit import WanDiT
from wan5b.kvcache import CachedAttention

Part = tuple[Tensor, Tensor, Tensor]  # queries, and all keys and values that they see


class Kept:
    """One attention inside of what checkpointing runs again; its second call gives what the first
    one made.

    torch's own attention keeps q, k, v and its result for the backward. Here it keeps the result
    alone: by the time of its backward the second call has brought the same q, k and v again.
    """

    def __init__(self):
        self.out: Tensor | None = None
        self.again: dict[int, Tensor] = {}  # q, k, v as the second call has them
        self.strides: list[tuple[int, ...]] = []

    def __call__(self, *qkv: Tensor) -> Tensor:
        """q [B, S, N, K], k and v [B, S', N, K] -> [B, S, N, K]"""
        strides = [x.stride() for x in qkv]
        if self.out is not None:
            assert strides == self.strides, f"{strides}, were {self.strides}"
            self.again = {i: x.detach() for i, x in enumerate(qkv)}
            out = self.out
            self.out = None
            return out.requires_grad_()

        # The innermost hooks are the ones that act, so checkpointing sees nothing of this.
        with saved_tensors_hooks(partial(self._pack, qkv), self._unpack):
            out = attention(*qkv)
        if out.requires_grad:
            self.out = out.detach()
            self.strides = strides
        return out

    def _pack(self, qkv: tuple[Tensor, ...], saved: Tensor) -> Tensor | tuple:
        """A saved tensor; of q, k or v, seen along other axes, only which one and how it lies."""
        for i, x in enumerate(qkv):
            if saved.data_ptr() == x.data_ptr() and saved.numel() == x.numel():
                return i, saved.shape, saved.stride()
        return saved

    def _unpack(self, packed: Tensor | tuple) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        i, shape, strides = packed
        x = self.again.pop(i)  # each is asked for once; what stays here stays in memory
        return x.as_strided(shape, strides, x.storage_offset())


class Layout:
    """What the chunks of a whole causal sequence see, as in `causal_mask`.

    sizes: tokens of each piece of the sequence, a chunk of the clean or of the noisy half. sees:
    for each piece, the pieces that it sees.
    """

    def __init__(self, chunks: tuple[int, ...], window: int | None, teacher: bool, p: int):
        ends = list(accumulate(chunks))
        self.sizes = [size * p for size in chunks]
        self.sees = []
        noisy = []
        for i, end in enumerate(ends):
            first = max(0, end - window) if window else 0
            past = [j for j in range(i) if ends[j] > first]
            self.sees.append([*past, i])
            noisy.append([*past, len(chunks) + i])
        if teacher:
            self.sizes += self.sizes
            self.sees += noisy

    def parts(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Part]:
        # Split, not sliced, so that the backward joins gradients and adds up no large zeros.
        keys = k.split(self.sizes, 1)
        values = v.split(self.sizes, 1)
        for piece, sees in zip(q.split(self.sizes, 1), self.sees, strict=True):
            seen_k = torch.cat([keys[i] for i in sees], 1)
            seen_v = torch.cat([values[i] for i in sees], 1)
            yield piece, seen_k, seen_v


@lru_cache(maxsize=32)
def layout_of(chunks: tuple[int, ...], window: int | None, teacher: bool, p: int) -> Layout | None:
    """None where the window cuts through chunks: that takes the mask."""
    ends = [0, *accumulate(chunks)]
    if window and any(end > window and end - window not in ends for end in ends):
        return None
    return Layout(chunks, window, teacher, p)


def cached_parts(attend: CachedAttention, layer: int, q, k, v) -> Iterator[Part]:
    """As `CachedAttention` calls attention."""
    sizes = [span.frames * attend.cache.tokens_per_frame for span in attend.spans]
    pieces = (x.split(sizes, 1) for x in (q, k, v))
    for span, q_own, k_own, v_own in zip(attend.spans, *pieces, strict=True):
        yield q_own, *attend.cache.extend(layer, k_own, v_own, span)


class Arranged:
    """Stands in the place of `WanDiT.compute` and takes its arguments."""

    def __init__(self, model: WanDiT, keep: bool, split: bool):
        self.model = model
        self.compute = model.compute
        self.keep = keep
        self.split = split
        self.layout: Layout | None = None  # of the forward that is under way
        if split:
            model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, model: WanDiT, args: tuple, options: dict) -> None:
        self.layout = None
        if options.get("chunks") and options.get("cache") is None:
            x = args[0]
            tokens = model.cfg.tokens_per_frame(*x.shape[3:])
            teacher = options.get("clean") is not None
            chunks = tuple(options["chunks"])
            self.layout = layout_of(chunks, options.get("window"), teacher, tokens)

    def __call__(self, x, sigma, rope, frames, attend, context, text=None) -> Tensor:
        kept = self.keep and self.model.checkpointing and torch.is_grad_enabled()
        masked = not isinstance(attend, CachedAttention) and attend.args[0] is not None
        if self.layout is not None or (kept and not masked):
            attend = partial(self.attend, attend, self.layout, defaultdict(Kept) if kept else None)
        return self.compute(x, sigma, rope, frames, attend, context, text)

    def attend(self, attend, layout, kept, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Self-attention of a layer in its parts. kept: by layer and part."""
        if layout is not None:
            parts = layout.parts(q, k, v)
        elif isinstance(attend, CachedAttention):
            parts = cached_parts(attend, layer, q, k, v)
        else:
            parts = [(q, k, v)]
        out = []
        for i, part in enumerate(parts):
            out.append(attention(*part) if kept is None else kept[layer, i](*part))
        return out[0] if len(out) == 1 else torch.cat(out, 1)


def arrange(model: WanDiT, keep: bool = False, split: bool = False) -> None:
    """Run the model's self-attention like this from now on; with neither, as it is."""
    if keep or split:
        model.compute = Arranged(model, keep, split)
