"""Keys and values of committed frames, with window and sink; the partition of a video into chunks.

Contract: committed memory is read-only. A forward puts its own keys behind the committed frames, where the next
forward replaces them; `commit` makes the last ones permanent by moving an integer. Past the capacity the frames
beyond the sink form a ring: the oldest are replaced in place. Nothing is ever moved, since attention does not care
about the order of its keys (RoPE is already in them).
"""

from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from wan5b.fuse import Graphs


def chunk_sizes(frames: int, size: int = 3, first: int | None = None) -> list[int]:
    """Partition of latent frames into causal chunks: (21, 3) -> [3]*7; (31, 3, first=1) -> [1] + [3]*10.

    Raises ValueError with the nearest valid frame counts when they do not come out even.
    """
    head = first or 0
    if size < 1 or head < 0:
        raise ValueError(f"chunk sizes must be positive, got size {size}, first {first}")
    whole, rest = divmod(frames - head, size)
    if rest or frames < max(head, 1):
        below = head + max(whole, 0) * size
        nearest = " or ".join(str(n) for n in (below, below + size) if n > 0)
        plan = f"a first chunk of {head} and chunks of {size}" if head else f"chunks of {size}"
        raise ValueError(
            f"{frames} latent frames do not divide into {plan}; nearest valid: {nearest}"
        )
    return [head] * (head > 0) + [size] * whole


class Span(NamedTuple):
    """Where a forward reads and writes: Python integers, so that a recomputation reads the same memory."""

    start: int  # frames in front of these
    seen: list[
        slice
    ]  # of the memory's tokens: the committed frames it sees, without grad the current ones too
    own: list[slice]  # the current frames, in order


class KVCache:
    """Rotated keys and values of all layers, one tensor [layers, 2, B, frames * P, N, K] (P tokens a frame).

    frames: how many frames the memory holds. window: the frames that a chunk sees, itself and the first `sink`
    frames of the video included; with a window the video may be longer than the memory, and frames = window is
    enough. A rollout that carries grad needs frames >= the whole video: nothing it has read may be replaced.
    """

    def __init__(
        self, cfg, batch, frames, tokens_per_frame, window=None, sink=0, device=None, dtype=None
    ):
        if sink and not 0 < sink < (window or 0):
            raise ValueError(
                f"a sink must be smaller than the window: sink {sink}, window {window}"
            )
        shape = (cfg.num_layers, 2, batch, frames * tokens_per_frame, cfg.num_heads, cfg.head_dim)
        self.memory = torch.empty(shape, device=device, dtype=dtype)
        # Of the text of `context`: filled by a forward without grad, read by those that follow with the same tensor.
        self.text = self.memory.new_empty(*shape[:3], cfg.text_len, *shape[4:])
        self.made_for = cfg.num_layers, batch, tokens_per_frame
        self.capacity, self.window, self.sink, self.graphs = frames, window, sink, Graphs()
        self.reset()

    def reset(self) -> None:
        """Forget everything; also needed when the weights have changed."""
        self.frames = self.written = 0  # committed; end of the last forward's frames
        self.context = None  # the embedded text whose keys and values are kept

    def commit(self, n_frames: int) -> None:
        """Make the keys of the first n_frames of the last forward permanent."""
        if not (pending := self.written - self.frames) >= n_frames > 0:
            raise ValueError(
                f"commit({n_frames}) of {pending} frames run behind {self.frames} committed ones"
            )
        self.frames += n_frames

    def ends(self, frames: int, chunks: list[int] | None) -> list[int]:
        """Where a forward starts in the video, and where each of its chunks ends: see `spans`."""
        return list(
            accumulate(chunks or [frames], initial=self.written - frames if chunks else self.frames)
        )

    def spans(self, frames: int, chunks: list[int] | None, *sizes: int) -> list[Span]:
        """Plan a forward on frames behind the committed ones; with chunks, one with grad over the last frames written,
        each chunk seeing what it saw then. sizes: layers, batch, tokens a frame. ValueError if something does not fit.
        """
        if self.made_for != sizes:
            raise ValueError(
                f"the cache is for layers, batch, tokens a frame {self.made_for}, the forward has {sizes}"
            )
        if chunks and not (torch.is_grad_enabled() and frames <= self.written <= self.capacity):
            raise ValueError(
                f"chunks over a cache repeat, with grad, what it holds: {chunks}, {self.written} frames"
            )
        return [
            self._span(start, end, sizes[-1]) for start, end in pairwise(self.ends(frames, chunks))
        ]

    def _span(self, start: int, end: int, tokens: int) -> Span:
        room, window = self.capacity - self.sink, self.window or max(end, self.capacity)
        if end > self.capacity and (window > self.capacity or torch.is_grad_enabled()):
            way_out = (
                "a rollout with grad needs room for the whole video"
                if self.window
                else "no window is set"
            )
            raise ValueError(
                f"the cache holds {self.capacity} frames; {start} + {end - start} do not fit: {way_out}"
            )
        if end - start > window - self.sink:
            raise ValueError(
                f"a chunk of {end - start} frames does not fit in window {window} with sink {self.sink}"
            )
        recent = max(self.sink, end - (window - self.sink))
        assert recent >= self.written - room, (
            "a longer forward has replaced frames that are still seen"
        )
        past = [*range(min(self.sink, start)), *range(recent, start)]
        past, own = list(map(self._slot, past)), list(map(self._slot, range(start, end)))
        self.written = end if start == self.frames else self.written
        seen = sorted(past if torch.is_grad_enabled() else past + own)
        return Span(start, _runs(seen, tokens), _runs(own, tokens))

    def extend(self, layer: int, k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Write the current chunk's k, v [B, S, N, K] and return all that it sees, [B, S', N, K] each.

        Without grad the result is a view where the frames lie together (always, but for a sink with a memory longer
        than the window). With grad the current keys carry the graph and the committed ones do not. What repeats a
        forward writes nothing once its frames are committed, before that what is there already.
        """
        memory = self.memory[layer]
        if span.start == self.frames:
            sizes = [run.stop - run.start for run in span.own]
            for run, *parts in zip(
                span.own, *(x.detach().split(sizes, 1) for x in (k, v)), strict=True
            ):
                memory[0, :, run], memory[1, :, run] = parts
        seen = [memory[:, :, run] for run in span.seen]
        if torch.is_grad_enabled():
            return tuple(
                torch.cat([*(past[i] for past in seen), x], 1) for i, x in enumerate((k, v))
            )
        return tuple(seen[0] if len(seen) == 1 else torch.cat(seen, 2))

    def _slot(self, frame: int) -> int:
        """Where a frame of the video lies in memory."""
        return (
            frame
            if frame < self.sink
            else self.sink + (frame - self.sink) % (self.capacity - self.sink)
        )


def _runs(slots: list[int], tokens: int) -> list[slice]:
    """Consecutive slots as slices of tokens, so many a slot: ([0, 1, 2, 5], 10) -> [0:30, 50:60]."""
    runs = [
        [slot for _, slot in run]
        for _, run in groupby(enumerate(slots), lambda pair: pair[1] - pair[0])
    ]
    return [slice(run[0] * tokens, (run[-1] + 1) * tokens) for run in runs]
