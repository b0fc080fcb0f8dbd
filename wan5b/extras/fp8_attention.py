"""Self-attention over a memory in float8 (e4m3), for inference on Hopper: `Fp8Cache` in KVCache's
place. Half the memory; queries, keys, values and the softmax's weights are rounded to float8.

Without scales: queries and keys come out of a norm over all heads, so their values are around 1,
and e4m3 has the same three bits from 2^-6 to 448. Values are not normed, but as far from either
end. What is larger becomes 448.
"""

from argparse import Namespace

import torch
from torch import Tensor

from wan5b.attention import rope_table, rotate
from wan5b.extras.fp8 import FP8, LARGEST
from wan5b.kvcache import KVCache, Span

HEAD_DIM = 128  # that the kernels are for
GROUP = 16  # keys that lie in an order of their own: `position`


def round_to_fp8(x: Tensor) -> Tensor:
    """As the kernels round: to the nearest, what is larger than 448 to that. Any shape."""
    return x.float().clamp(-LARGEST, LARGEST).to(FP8)


def position(row: Tensor) -> Tensor:
    """Where a key's values lie: row 8 b + 2 c + a of a group is at 4 c + 2 b + a (why: see the head
    of fp8_attention_kernels.py). Integers of any shape, rows of the memory in and out.
    """
    n = row % GROUP
    return row - n + n % 8 // 2 * 4 + n // 8 * 2 + n % 2


def check(args: Namespace, causal: bool, head_dim: int, dtype: torch.dtype) -> None:
    """ValueError, in one line, if --fp8-attention was given and can't work.

    args: a sampling script's options. causal: clips are made chunk by chunk. head_dim, dtype: of
    the DiT.
    """
    if not args.fp8_attention:
        return
    device = torch.device(args.device)
    wrong = ""
    if not causal:
        wrong = "is for clips made chunk by chunk, not at once"
    elif device.type != "cuda":
        wrong = f"needs a Hopper GPU (H100, H200), not {device}"
    elif torch.cuda.get_device_capability(device)[0] != 9:
        wrong = f"needs a Hopper GPU (H100, H200), not {torch.cuda.get_device_name(device)}"
    elif dtype != torch.bfloat16:
        wrong = f"needs bfloat16, not {dtype}"
    elif head_dim != HEAD_DIM:
        wrong = f"needs heads of {HEAD_DIM} channels, not {head_dim}"
    if wrong:
        raise ValueError(f"float8 attention {wrong}: leave out --fp8-attention")


def kind_of_cache(args: Namespace) -> type[KVCache]:
    """By a sampling script's options, which have passed `check`."""
    return Fp8Cache if args.fp8_attention else KVCache


class Fp8Cache(KVCache):
    """KVCache with keys [layers, B, R, N, K] and values [layers, B, N, K, R] in float8.

    R: rows of the frames, rounded up to whole groups. For forwards without grad.
    """

    def _make_memory(self, layers, batch, rows, heads, head_dim, device, dtype) -> None:
        rows += -rows % GROUP
        place = {"device": device, "dtype": FP8}
        self.keys = torch.empty(layers, batch, rows, heads, head_dim, **place)
        self.values = torch.empty(layers, batch, heads, head_dim, rows, **place)

    def reset(self) -> None:
        super().reset()
        # A tile may take in rows that nothing has written, with weights of 0.
        self.keys.zero_()
        self.values.zero_()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, span: Span) -> Tensor:
        from wan5b.extras import fp8_attention_kernels as kernels  # needs Triton

        assert not torch.is_grad_enabled(), "float8 keys carry no grad"
        assert span.start >= self.frames, "committed memory is read-only"
        keys = self.keys[layer]
        values = self.values[layer]
        q8 = torch.empty_like(q, dtype=FP8, memory_format=torch.contiguous_format)
        done = 0
        for begin, end in span.own:
            part = slice(done, done + end - begin)
            own = (q[:, part], k[:, part], v[:, part])
            kernels.round_into(q8[:, part], keys, values, begin, *own)
            done = part.stop

        (begin, end), *more = span.reads
        if more or begin % GROUP:
            keys, values = self._gather(keys, values, span)
            begin, end = 0, sum(end - begin for begin, end in span.reads)
        return kernels.attend(q8, keys[:, begin:], values[..., begin:], end - begin)

    def _gather(self, keys: Tensor, values: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """The rows that a chunk sees, one behind the other."""
        rows = torch.cat([torch.arange(*read, device=keys.device) for read in span.reads])
        to = torch.arange(len(rows), device=keys.device)
        size = len(rows) + -len(rows) % GROUP
        seen_k = keys.new_zeros(len(keys), size, *keys.shape[2:])
        seen_v = values.new_zeros(*values.shape[:3], size)
        bits = torch.uint8  # float8 can't be indexed everywhere
        seen_k.view(bits)[:, to] = keys.view(bits)[:, rows]
        seen_v.view(bits)[..., position(to)] = values.view(bits)[..., position(rows)]
        return seen_k, seen_v

    @torch.no_grad()
    def _turn_sink(self, turn: int) -> None:
        if turn == self.turned:
            return
        keys = self.keys[:, :, : self.sink * self.tokens_per_frame]
        if self.sink_keys is None:
            self.sink_keys = keys.clone()
        rope = rope_table(keys.shape[-1], turn, 1, 1, 1, keys.device)
        for layer, made in enumerate(self.sink_keys):
            keys[layer] = round_to_fp8(rotate(made.float(), rope))
        self.turned = turn
