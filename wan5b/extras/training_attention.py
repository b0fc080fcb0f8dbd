"""Self-attention of training, from outside: `arrange(model, keep, split)`.

keep: checkpointing makes everything of a layer again in the backward, but for the results of its
self-attention, which are kept: 2 D bytes a token and layer in bfloat16, a tenth of the arithmetic
of a critic's step.

split: whole causal sequences (ar, ode) go chunk by chunk through attention without a mask, which is
faster on a GPU than flex_attention with one. Equal but for rounding.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
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

        # The innermost hooks are the ones that act, so checkpointing sees nothing of this. They
        # live as long as the graph does, so they know q, k and v by where they lie alone.
        places = [place(x) for x in qkv]
        with saved_tensors_hooks(partial(self._pack, places), self._unpack):
            out = attention(*qkv)
        if out.requires_grad:
            self.out = out.detach()
            self.strides = strides
        return out

    def _pack(self, places: list[tuple[int, int, int]], saved: Tensor) -> Tensor | tuple:
        """A saved tensor; of q, k or v, seen along other axes, only which one and how it lies."""
        if place(saved) in places:
            return places.index(place(saved)), saved.shape, saved.stride()
        return saved

    def _unpack(self, packed: Tensor | tuple) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        i, shape, strides = packed
        x = self.again.pop(i)  # each is asked for once; what stays here stays in memory
        return x.as_strided(shape, strides, x.storage_offset())


def place(x: Tensor) -> tuple[int, int, int]:
    """Where a tensor's values lie, in whatever order of its axes. Tensors without memory have it
    too.
    """
    return x.untyped_storage()._cdata, x.storage_offset(), x.numel()


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
        # Of the forward that is under way.
        self.layout: Layout | None = None
        self.keeping = False
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, model: WanDiT, args: tuple, options: Mapping) -> None:
        self.layout = self.layout_for(args[0], options)
        self.keeping = torch.is_grad_enabled() and self.keeps(args[0], options)

    def layout_for(self, x: Tensor, options: Mapping) -> Layout | None:
        """Of a whole causal sequence, if it is split. x, options: the forward's."""
        if not (self.split and is_masked(options)):
            return None
        tokens = self.model.cfg.tokens_per_frame(*x.shape[3:])
        teacher = options.get("clean") is not None
        return layout_of(tuple(options["chunks"]), options.get("window"), teacher, tokens)

    def keeps(self, x: Tensor, options: Mapping) -> bool:
        """Whether a forward with grad keeps its results; under a mask it does not."""
        unmasked = not is_masked(options) or self.layout_for(x, options) is not None
        return self.keep and self.model.checkpointing and unmasked

    def __call__(self, x, sigma, rope, frames, attend, context, text=None) -> Tensor:
        if self.layout is not None or self.keeping:
            kept = defaultdict(Kept) if self.keeping else None
            attend = partial(self.attend, attend, self.layout, kept)
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


def is_masked(options: Mapping) -> bool:
    """Whether a forward with these options goes over a whole causal sequence."""
    return bool(options.get("chunks")) and options.get("cache") is None


def keeps_results(model: WanDiT, x: Tensor, options: Mapping) -> bool:
    """Whether a forward with grad keeps the results of its self-attention for the backward."""
    return isinstance(model.compute, Arranged) and model.compute.keeps(x, options)
