"""Keys and values of committed frames, with window and sink; the partition of a video into blocks.

Contract: committed memory is read-only. A forward puts its own keys behind the committed frames, where the next
forward replaces them; `commit` makes the last ones permanent by moving an integer. Past the capacity the frames
beyond the sink form a ring: the oldest are replaced in place. Nothing is ever moved, since attention does not care
about the order of its keys (RoPE is already in them).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from wan5b.fuse import Graphs


def block_sizes(frames: int, size: int = 3, first: int | None = None) -> list[int]:
    """Partition of latent frames into causal blocks: (21, 3) -> [3]*7; (31, 3, first=1) -> [1] + [3]*10.

    Raises ValueError with the nearest valid frame counts when they do not come out even.
    """
    head = first or 0
    if size < 1 or head < 0:
        raise ValueError(f"block sizes must be positive, got size {size}, first {first}")
    whole, rest = divmod(frames - head, size)
    if rest or frames < max(head, 1):
        below = head + max(whole, 0) * size
        nearest = " or ".join(str(n) for n in (below, below + size) if n > 0)
        plan = f"a first block of {head} and blocks of {size}" if head else f"blocks of {size}"
        raise ValueError(f"{frames} latent frames do not divide into {plan}; nearest valid: {nearest}")
    return [head] * (head > 0) + [size] * whole


class Span(NamedTuple):
    """Where a forward reads and writes: Python integers, so that a recomputation reads the same memory."""

    start: int  # committed frames at the time of the forward
    past: list[tuple[int, int]]  # runs of slots that hold the committed frames it sees
    seen: list[tuple[int, int]]  # the same, current frames included
    own: list[tuple[int, int]]  # runs of slots for the current frames, in order


class KVCache:
    """Rotated keys and values of all layers, one tensor [layers, 2, B, frames * P, N, K] (P tokens a frame).

    frames: how many frames the memory holds. window: the frames that a block sees, itself and the first `sink`
    frames of the video included; with a window the video may be longer than the memory, and frames = window is
    enough. A rollout that carries grad needs frames >= the whole video: nothing it has read may be replaced.
    """

    def __init__(self, cfg, batch, frames, tokens_per_frame, window=None, sink=0, device=None, dtype=None):
        if sink and not 0 < sink < (window or 0):
            raise ValueError(f"a sink must be smaller than the window: sink {sink}, window {window}")
        shape = (cfg.num_layers, 2, batch, frames * tokens_per_frame, cfg.num_heads, cfg.head_dim)
        self.memory = torch.empty(shape, device=device, dtype=dtype)
        self.capacity, self.tokens_per_frame = frames, tokens_per_frame
        self.window, self.sink = window, sink
        self.text, self.graphs = None, Graphs()
        self.reset()

    def check(self, layers: int, batch: int, tokens_per_frame: int) -> None:
        """ValueError unless the cache was made for this model, batch and frame size."""
        made, asked = (*self.memory.shape[:3:2], self.tokens_per_frame), (layers, batch, tokens_per_frame)
        if made != asked:
            raise ValueError(f"the cache was made for (layers, batch, tokens a frame) {made}, the forward has {asked}")

    def reset(self) -> None:
        """Forget everything; also needed when the weights have changed."""
        self.frames = 0  # committed
        self.written = 0  # end of the last forward's frames
        self.context = None  # the text whose keys and values are kept

    def commit(self, n_frames: int) -> None:
        """Make the keys of the first n_frames of the last forward permanent."""
        pending = self.written - self.frames
        if not 0 < n_frames <= pending:
            raise ValueError(f"commit({n_frames}) of {pending} frames run behind {self.frames} committed ones")
        self.frames += n_frames

    def rewind(self, frames: int) -> None:
        """Forget all but the first `frames` committed frames, which must still be in memory."""
        assert frames <= self.frames <= self.capacity, (frames, self.frames, self.capacity)
        self.frames = self.written = frames

    def text_of(self, context: Tensor) -> tuple[Tensor, bool]:
        """Where forwards without grad keep the text's keys and values, [layers, 2, B, L, N, K]; whether they are there.

        They are if this context tensor (the same object) was the last one; the forward must fill them in otherwise.
        """
        layers, two, batch, _, *heads = self.memory.shape
        shape = (layers, two, batch, context.shape[1], *heads)
        if self.text is None or self.text.shape != shape:
            self.text, self.context = self.memory.new_empty(shape), None
        return self.text, self.context is context

    def span(self, n_frames: int) -> Span:
        """Plan a forward on the n_frames that follow the committed ones. ValueError if they do not fit."""
        start, end, room = self.frames, self.frames + n_frames, self.capacity - self.sink
        window = self.window or max(end, self.capacity)
        if end > self.capacity and (window > self.capacity or torch.is_grad_enabled()):
            way_out = "a rollout with grad needs room for the whole video" if self.window else "no window is set"
            raise ValueError(f"the cache holds {self.capacity} frames; {start} + {n_frames} do not fit: {way_out}")
        if n_frames > window - self.sink:
            raise ValueError(f"a block of {n_frames} frames does not fit in window {window} with sink {self.sink}")
        recent = max(self.sink, end - (window - self.sink))
        assert recent >= self.written - room, "a longer forward has replaced frames that are still seen"
        past = [*range(min(self.sink, start)), *range(recent, start)]
        past, own = list(map(self._slot, past)), list(map(self._slot, range(start, end)))
        self.written = end
        return Span(start, _runs(sorted(past)), _runs(sorted(past + own)), _runs(own))

    def extend(self, layer: int, k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Write the current block's k, v [B, S, N, K] and return all that it sees, [B, S', N, K] each.

        Without grad the result is a view where the frames lie together (always, but for a sink with a memory longer
        than the window). With grad the current keys carry the graph and the committed ones do not. A recomputation
        during backward comes after the commit and writes nothing.
        """
        memory, p = self.memory[layer], self.tokens_per_frame
        if span.start == self.frames:
            offset = 0
            for lo, hi in span.own:
                for store, current in zip(memory, (k, v), strict=True):
                    store[:, lo * p : hi * p] = current.detach()[:, offset : offset + (hi - lo) * p]
                offset += (hi - lo) * p
        if torch.is_grad_enabled():
            past = [memory[:, :, lo * p : hi * p] for lo, hi in span.past]
            return tuple(torch.cat([m[i] for m in past] + [x], 1) for i, x in enumerate((k, v)))
        seen = [memory[:, :, lo * p : hi * p] for lo, hi in span.seen]
        return tuple(seen[0] if len(seen) == 1 else torch.cat(seen, 2))

    def _slot(self, frame: int) -> int:
        """Where a frame of the video lies in memory."""
        return frame if frame < self.sink else self.sink + (frame - self.sink) % (self.capacity - self.sink)


def _runs(slots) -> list[tuple[int, int]]:
    """Consecutive slots as (first, last + 1): [0, 1, 2, 5] -> [(0, 3), (5, 6)]."""
    runs = []
    for slot in slots:
        if runs and runs[-1][1] == slot:
            runs[-1] = (runs[-1][0], slot + 1)
        else:
            runs.append((slot, slot + 1))
    return runs
