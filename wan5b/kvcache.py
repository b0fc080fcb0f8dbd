"""Keys and values of committed frames, with window and sink; the partition of a video into chunks.

The memory, here with window 6, sink 2 and room for 6 frames, while frames 8 and 9 are generated:

    slot      0   1   2   3   4   5
    frame     0   1   6   7   8   9       8 and 9 have replaced 4 and 5, which left the window
              sink    ring                as 6 and 7 had replaced 2 and 3

Nothing ever moves: attention does not care about the order of its keys, in which RoPE is already.

**Committed memory is read-only.** A forward in the mode `append` puts its own keys behind the
committed frames, where the next forward replaces them, until `commit` moves an integer. What runs
again (the mode `replay`; checkpointing's recomputation in a backward) only reads committed frames.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from wan5b.attention import attention, rope_table, rotate
from wan5b.util import nearest


def chunk_sizes(frames: int, size: int = 3, first: int | None = None) -> list[int]:
    """Partition of latent frames into causal chunks.

    (21, 3) -> [3]*7; (31, 3, first=1) -> [1] + [3]*10.
    Raises ValueError with the nearest valid frame counts when they do not come out even.
    """
    first = first or 0
    if size < 1 or first < 0:
        raise ValueError(f"chunk sizes must be positive, got size {size}, first {first}")
    whole, rest = divmod(frames - first, size)
    if rest or frames < max(first, 1):
        plan = f"chunks of {size}"
        if first:
            plan = f"a first chunk of {first} and {plan}"
        uneven = f"{frames} latent frames do not divide into {plan}"
        raise ValueError(f"{uneven}; nearest valid: {nearest(frames, size, first or size)}")
    sizes = [size] * whole
    return [first, *sizes] if first else sizes


class Span(NamedTuple):
    """The place of one chunk in the memory, as (begin, end) ranges of its tokens.

    These are Python integers, so that a recomputation reads what its forward read.
    """

    start: int  # index of the chunk's first frame in the video
    frames: int
    # What it attends to: without grad its own too, read back; with grad they are in the graph.
    reads: tuple[tuple[int, int], ...]
    own: tuple[tuple[int, int], ...]  # its own frames, in their order
    turned: int  # where the sink is: see `KVCache.turned`


class CachedAttention:
    """Self-attention of one forward over the memory: called as (layer, q, k, v), [B, S, N, K] each.

    `append` and `replay` of KVCache make it. start: RoPE position of the forward's first frame,
    which is its index and what scene cuts have left out. place: which slots it reads and writes, by
    which a CUDA graph is known again; the position is in the RoPE table.
    """

    def __init__(self, cache: "KVCache", spans: list[Span]):
        self.cache = cache
        self.spans = spans
        self.start = spans[0].start + cache.gap
        self.place = tuple((span.reads, span.own) for span in spans)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sizes = [span.frames * self.cache.tokens_per_frame for span in self.spans]
        parts = (x.split(sizes, 1) for x in (q, k, v))
        out = []
        for span, *own in zip(self.spans, *parts, strict=True):
            out.append(self.cache.attend(layer, *own, span))
        return out[0] if len(out) == 1 else torch.cat(out, 1)


class KVCache:
    """Rotated keys and values of all layers, one tensor [layers, 2, B, frames * P, N, K] (P tokens
    a frame).

    frames: how many frames the memory holds. window: the frames that a chunk sees, itself and the
    first `sink` frames of the video included; with a window the video may be longer than the
    memory, and frames = window is enough. A rollout that carries grad needs frames >= the whole
    video: nothing that it has read may be replaced. ValueError unless a sink is smaller than the
    window.

    sink_rope: where RoPE has the sink once the window has left it. "absolute": where it was, ever
    further from the chunk; published models jump back to their first frames at some distances (LoL,
    arXiv 2601.16914). "relative": right in front of the window (Deep Forcing, arXiv 2512.05081);
    with checkpointing take the cache of extras/rollouts.py, which leaves the keys as they were.
    """

    def __init__(
        self,
        cfg,
        batch: int,
        frames: int,
        tokens_per_frame: int,
        window: int | None = None,
        sink: int = 0,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        sink_rope: str = "absolute",
    ):
        assert sink_rope in ("absolute", "relative"), sink_rope
        if sink and not 0 < sink < (window or 0):
            raise ValueError(f"a sink needs a larger window: sink {sink}, window {window}")
        self.tokens_per_frame = tokens_per_frame
        self.capacity = frames
        self.window = window
        self.sink = sink
        self.sink_rope = sink_rope

        rows = frames * tokens_per_frame
        self.made_for = (cfg.num_layers, batch, tokens_per_frame)
        self._make_memory(cfg.num_layers, batch, rows, cfg.num_heads, cfg.head_dim, device, dtype)
        # The keys and values of the text in force, which all layers' cross-attentions read.
        shape = (cfg.num_layers, 2, batch, cfg.text_len, cfg.num_heads, cfg.head_dim)
        self.text = torch.empty(shape, device=device, dtype=dtype)
        self.reset()

    def _make_memory(self, layers, batch, rows, heads, head_dim, device, dtype) -> None:
        """What `attend`, `extend` and `_turn_sink` read and write; `rows` of a sample."""
        shape = (layers, 2, batch, rows, heads, head_dim)
        self.memory = torch.empty(shape, device=device, dtype=dtype)

    def reset(self) -> None:
        """Forget everything; also needed when the weights have changed."""
        self.frames = 0  # committed
        self.written = 0  # end of the last forward's frames
        self.slots: dict[int, int] = {}  # frame -> where it lies
        self.scenes: list[range] = []  # the first frames of each; the newest one's stay
        self.gap = 0  # RoPE positions that scene cuts have left out
        self.floor = 0  # first frame since `rewind`: of earlier ones the sink alone is left
        self.turned = 0  # RoPE positions by which the sink's keys have been moved on
        self.sink_keys = None  # the sink's keys before that
        self.context = None  # the text in force
        self.text_kept = False  # whether `text` holds its keys and values

    def use_text(self, context: Tensor) -> None:
        """Put a text in force: the next forward without grad keeps its keys, those that follow read
        them.

        Without this call a forward makes them anew each time. The tensor must not change in place.
        """
        if context is not self.context:
            self.context = context
            self.text_kept = False

    def check(self, layers: int, batch: int, tokens_per_frame: int) -> None:
        """An assertion that the cache was made for this network, batch and latent size."""
        given = (layers, batch, tokens_per_frame)
        wrong = f"cache of layers, batch, tokens {self.made_for}, forward of {given}"
        assert self.made_for == given, wrong

    # ------------------------------------------------------------------------------------- modes

    def append(self, n_frames: int) -> CachedAttention:
        """Run the next n_frames frames behind the committed ones, where an earlier forward's are
        replaced.
        """
        # A backward, or a window larger than the memory, must still find every frame there.
        rolls = self.window and self.window <= self.capacity and not torch.is_grad_enabled()
        room = f"{self.frames} + {n_frames} frames in {self.capacity}: no room"
        assert rolls or self.frames + n_frames <= self.capacity, room
        self._place(range(self.frames, self.frames + n_frames))
        self.written = self.frames + n_frames
        if self.sink_rope == "relative" and self.sink:
            self._turn_sink(max(0, self.written - self.window))
        return CachedAttention(self, [self._span(self.frames, n_frames)])

    def replay(self, chunks: list[int]) -> CachedAttention:
        """Run the last chunks written once more, with grad, each seeing what it saw then."""
        assert sum(chunks) <= self.written, f"chunks {chunks} of {self.written} frames"
        assert torch.is_grad_enabled(), "without grad a replay would only repeat what is known"
        moved = self.gap or self.turned
        assert not moved, "where keys were in an earlier scene, or before the sink moved, is lost"
        spans = []
        start = self.written - sum(chunks)
        for size in chunks:
            spans.append(self._span(start, size))
            start += size
        return CachedAttention(self, spans)

    def cut(self, n_frames: int, gap: int) -> None:
        """The next chunk, of n_frames frames, opens a scene (LongLive 2, arXiv 2605.18739).

        Its RoPE positions, and all later ones, lie `gap` further on. Up to `sink` of its frames
        stay in the window in place of the last scene's; the video's own sink stays beside them.
        """
        assert self.frames >= self.sink, f"a cut at frame {self.frames}, within sink {self.sink}"
        self.gap += gap
        self.scenes.append(range(self.frames, self.frames + min(self.sink, n_frames)))

    def commit(self, n_frames: int) -> None:
        """Make the keys of the first n_frames of the last forward permanent."""
        pending = self.written - self.frames
        possible = 0 < n_frames <= pending
        assert possible, f"commit({n_frames}) of {pending} frames run behind {self.frames}"
        self.frames += n_frames

    def rewind(self, frame: int) -> None:
        """The next chunk begins at this frame; all but the sink is forgotten, which stays in sight.

        To run finished frames again, under another text say: rewind to the first of them, commit
        them in their chunks. A cache that is empty may go ahead, to where it takes over a video.
        """
        if frame == self.frames:
            return
        assert not self.scenes, "what earlier scenes have left in the window is not kept"
        self.slots = {f: slot for f, slot in self.slots.items() if f < min(frame, self.sink)}
        self.frames = frame
        self.written = frame
        self.floor = frame
        if frame < self.sink:  # it is to be committed anew
            self.turned = 0
            self.sink_keys = None

    # ------------------------------------------------------------------------------------ memory

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, span: Span) -> Tensor:
        """Attention of a chunk, q, k, v [B, S, N, K], over all that it sees."""
        keys, values = self.extend(layer, k, v, span)
        return attention(q, keys, values)

    def extend(self, layer: int, k: Tensor, v: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """All keys and values that a chunk sees, its own k, v [B, S, N, K] included: [B, S', N, K]
        each.

        With grad its own carry the graph, the committed ones do not. Without, they are read back
        from the memory, which costs no copy where the frames lie together (always, but for a sink
        in a memory longer than the window).
        """
        keys, values = self.memory[layer]
        assert span.turned == self.turned, "what runs again would see the sink moved on"

        # Committed memory is read-only. It holds the keys of the clean pass, which later chunks
        # have read. What runs again runs at another level: its own keys go into the graph alone,
        # since written here they would change what the recomputation of a later chunk reads.
        committed = span.start < self.frames
        if not committed:
            done = 0
            for begin, end in span.own:
                part = slice(done, done + end - begin)
                keys[:, begin:end] = k[:, part].detach()
                values[:, begin:end] = v[:, part].detach()
                done = part.stop

        seen_k = [keys[:, begin:end] for begin, end in span.reads]
        seen_v = [values[:, begin:end] for begin, end in span.reads]
        if torch.is_grad_enabled():
            seen_k.append(k)
            seen_v.append(v)
        if len(seen_k) == 1:
            return seen_k[0], seen_v[0]
        return torch.cat(seen_k, 1), torch.cat(seen_v, 1)

    def _span(self, start: int, n_frames: int) -> Span:
        """Where frames start .. start + n_frames read and write. Changes nothing."""
        past = self._past(start, start + n_frames)
        own = list(range(start, start + n_frames))
        # With grad the chunk's own keys come from the graph, not from the memory.
        seen = past if torch.is_grad_enabled() else past + own
        reads = sorted(self.slots[frame] for frame in seen)
        places = [self.slots[frame] for frame in own]
        return Span(start, n_frames, self._ranges(reads), self._ranges(places), self.turned)

    def _past(self, start: int, end: int) -> list[int]:
        """The frames that a chunk sees in front of it: the sink, a scene's first, recent ones.

        Window 12, sink 3, a scene that began at 6: frames 15 to 17 see 0-2, 6-8 and 12-14.
        """
        # Without a window everything is seen, so the sums below leave nothing out.
        window = self.window or max(end, self.capacity)

        # Where a scene's first frames would leave the recent ones, they stay; others go instead.
        recent = max(self.sink, end - (window - self.sink), self.floor)
        scene = range(0)
        for began in self.scenes:
            if began.start < start:  # the chunk that opens a scene still sees the one before
                scene = began
        if scene.start >= recent:
            scene = range(0)
        recent = max(recent + len(scene), scene.stop)
        fits = end - start <= window - self.sink - len(scene)
        assert fits, (end - start, window, self.sink, len(scene))

        past = [*range(min(self.sink, start)), *scene, *range(recent, start)]
        lost = [frame for frame in past if frame not in self.slots]
        assert not lost, f"a longer forward has replaced frames {lost}, which are still seen"
        return past

    def _place(self, frames: range) -> None:
        """Give new frames slots: their own ones in the ring, or, where a scene's first frames stay
        in these, those of the oldest frames that are not seen.

        So the order in memory, and with it rounding, does not depend on where the cache took over.
        """
        seen = {self.slots[frame] for frame in self._past(frames.start, frames.stop)}
        frame_at = {slot: frame for frame, slot in self.slots.items()}
        free = [slot for slot in range(self.capacity) if slot not in seen]
        free = [slot for slot in free if frame_at.get(slot) not in frames]
        free.sort(key=lambda slot: frame_at.get(slot, -1))
        for frame in frames:
            if frame not in self.slots:
                home = frame
                if frame >= self.capacity:
                    home = self.sink + (frame - self.sink) % (self.capacity - self.sink)
                slot = home if home in free else free[0]
                free.remove(slot)
                self.slots.pop(frame_at.get(slot), None)
                self.slots[frame] = slot

    @torch.no_grad()
    def _turn_sink(self, turn: int) -> None:
        """Move the sink's keys on by so many RoPE positions from where they were made.

        Rotations compose. Each begins with the keys as they were made, so no rounding adds up.
        """
        if turn == self.turned:
            return
        rows = self.sink * self.tokens_per_frame
        keys = self.memory[:, 0, :, :rows]  # [layers, B, S, N, K]
        if self.sink_keys is None:
            self.sink_keys = keys.clone()
        rope = rope_table(keys.shape[-1], turn, 1, 1, 1, keys.device)  # of time alone
        for layer, made in enumerate(self.sink_keys):
            keys[layer] = rotate(made, rope)
        self.turned = turn

    def _ranges(self, slots) -> tuple[tuple[int, int], ...]:
        """Slots as ranges of tokens, neighbours joined: 0, 1, 2, 5 of 10 tokens -> (0, 30), (50,
        60).
        """
        ranges: list[tuple[int, int]] = []
        for slot in slots:
            begin = slot * self.tokens_per_frame
            end = begin + self.tokens_per_frame
            if ranges and ranges[-1][1] == begin:
                begin = ranges.pop()[0]
            ranges.append((begin, end))
        return tuple(ranges)
