"""The Wan diffusion transformer: bidirectional, block-causal, teacher-forced or cached.

Which of these it is depends on what `forward` is given.

B batch, C channels, T latent frames, H W latent size, P tokens per frame, S = T * P, L text tokens,
D width, N heads, K head dim. Residual stream [B, T, P, D]; latents [B, C, T, H, W]; sigma in [0,
1]. Precision: linear layers and attention in the weights' dtype; norms, modulation, gates, RoPE,
time embedding and head in float32 by hand, whatever the weights' dtype.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wan5b.attention import attention, causal_mask, frequencies, rope_table, rotate
from wan5b.fuse import fused
from wan5b.kvcache import KVCache


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of a network; field names as in a release's config.json. Derived geometry only through
    the methods. ValueError for sizes and switches that `WanDiT` does not have.
    """

    dim: int = 3072
    ffn_dim: int = 14336
    num_heads: int = 24
    num_layers: int = 30
    in_dim: int = 48
    out_dim: int = 48
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    model_type: str = "ti2v"
    qk_norm: bool = True
    cross_attn_norm: bool = True

    def __post_init__(self):
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        if not (self.qk_norm and self.cross_attn_norm and self.patch_size == (1, 2, 2)):
            raise ValueError(
                f"only qk_norm, cross_attn_norm and patch_size (1, 2, 2) are supported, got {self}"
            )
        if self.dim % (2 * self.num_heads) or self.freq_dim % 2:
            raise ValueError(
                f"dim {self.dim} must be a multiple of 2 * {self.num_heads} heads, freq_dim even"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Tokens of a latent frame of height x width. ValueError if no patches fit."""
        if height % 2 or width % 2:
            raise ValueError(f"latent size {height}x{width} is not a multiple of the patch 2x2")
        return height * width // 4


PRESETS = {
    "ti2v-5B": DiTConfig(),
    "t2v-1.3B": DiTConfig(1536, 8960, 12, 30, 16, 16, model_type="t2v"),
    "t2v-14B": DiTConfig(5120, 13824, 40, 40, 16, 16, model_type="t2v"),
    "tiny": DiTConfig(256, 512, 8, 3, text_dim=64, text_len=24, freq_dim=64),
}

# ------------------------------------------------------------------------------------------- blocks


def linear32(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in float32, whatever the dtype of its weights."""
    return F.linear(x.float(), layer.weight.float(), layer.bias.float())


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """norm(x) * (1 + scale) + shift, in float32; x [B, T, P, D], shift and scale [B, T, 1, D]."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return torch.addcmul(shift, normed, 1 + scale).to(x.dtype)


class MLP(nn.Sequential):
    """Linear, GELU, linear. Where nothing needs the hidden layer again, bfloat16 on a GPU makes it
    in one kernel: GELU is applied to the product's own sums, before they are rounded and written.
    """

    def __init__(self, dim: int, hidden: int, out_dim: int):
        super().__init__(
            nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, out_dim)
        )

    def forward(self, x: Tensor) -> Tensor:
        first, _, last = self
        is_plain = type(first) is nn.Linear  # none with an adapter, say
        at_once = x.is_cuda and x.dtype == torch.bfloat16 and not torch.is_grad_enabled()
        if not (is_plain and at_once):
            return super().forward(x)
        rows = x.flatten(0, -2)
        h = torch._addmm_activation(first.bias, rows, first.weight.t(), use_gelu=True)
        return last(h).unflatten(0, x.shape[:-1])


def attend_whole(mask, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Self-attention over a whole sequence, [B, S, N, K] each; every layer's is alike."""
    return attention(q, k, v, mask)


class Attention(nn.Module):
    """The projections of one attention; the attention itself is the caller's."""

    def __init__(self, cfg: DiTConfig):
        super().__init__()
        self.heads = cfg.num_heads
        self.q = nn.Linear(cfg.dim, cfg.dim)
        self.k = nn.Linear(cfg.dim, cfg.dim)
        self.v = nn.Linear(cfg.dim, cfg.dim)
        self.o = nn.Linear(cfg.dim, cfg.dim)
        # Over all heads together.
        self.norm_q = nn.RMSNorm(cfg.dim, cfg.eps)
        self.norm_k = nn.RMSNorm(cfg.dim, cfg.eps)

    def split(self, x: Tensor) -> Tensor:
        """[B, ..., D] -> [B, S, N, K]"""
        return x.unflatten(-1, (self.heads, -1)).flatten(1, -3)

    def queries(self, x: Tensor) -> Tensor:
        return self.split(self.norm_q(self.q(x)))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.norm_k(self.k(x))), self.split(self.v(x))

    def output(self, y: Tensor, like: Tensor) -> Tensor:
        """[B, S, N, K] -> [B, T, P, D]"""
        return self.o(y.flatten(2).view(like.shape))


class Block(nn.Module):
    """One layer: `before`, self-attention, `between`, cross-attention, `after`.

    It is cut at its two attentions: the three pieces have shapes that don't depend on how much is
    cached, so each compiles once.
    """

    def __init__(self, cfg: DiTConfig):
        super().__init__()
        self.eps = cfg.eps
        self.self_attn = Attention(cfg)
        self.cross_attn = Attention(cfg)
        self.norm3 = nn.LayerNorm(cfg.dim, cfg.eps)
        self.ffn = MLP(cfg.dim, cfg.ffn_dim, cfg.dim)
        self.modulation = nn.Parameter(torch.randn(1, 6, cfg.dim) / cfg.dim**0.5)

    @fused
    def before(self, x: Tensor, mod: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, P, D] -> rotated q, k and v, [B, S, N, K]"""
        shift, scale = self._modulation(mod, 0, 1)
        h = modulated_norm(x, shift, scale, self.eps)
        k, v = self.self_attn.keys_values(h)
        q = self.self_attn.queries(h)
        return rotate(q, rope), rotate(k, rope), v

    @fused
    def between(self, x: Tensor, y: Tensor, mod: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream after self-attention's y, and the queries to the text."""
        (gate,) = self._modulation(mod, 2)
        x = torch.addcmul(x.float(), self.self_attn.output(y, x).float(), gate).to(x.dtype)
        norm = self.norm3
        h = F.layer_norm(x.float(), x.shape[-1:], norm.weight.float(), norm.bias.float(), self.eps)
        return x, self.cross_attn.queries(h.to(x.dtype))

    @fused
    def after(self, x: Tensor, y: Tensor, mod: Tensor) -> Tensor:
        """The residual stream after cross-attention's y and the feed-forward layer."""
        shift, scale, gate = self._modulation(mod, 3, 4, 5)
        x = x + self.cross_attn.output(y, x)
        h = self.ffn(modulated_norm(x, shift, scale, self.eps))
        return torch.addcmul(x.float(), h.float(), gate).to(x.dtype)

    def _modulation(self, mod: Tensor, *rows: int) -> list[Tensor]:
        """Rows of the parameter + those of the time's mod [B, T, 6, D]: float32 [B, T, 1, D]."""
        return [mod[:, :, i : i + 1] + self.modulation[:, None, i : i + 1].float() for i in rows]

    def forward(self, x, mod, rope, context, attend, text=None) -> Tensor:
        """x [B, T, P, D], mod [B or 1, T or 1, 6, D] float32, context [B, L, D] -> [B, T, P, D]

        attend(q, k, v): self-attention. text [2, B, L, N, K]: where the text's keys and values are
        put, or, with context None, are.
        """
        q, k, v = self.before(x, mod, rope)
        x, q = self.between(x, attend(q, k, v), mod)

        if context is None:
            keys, values = text
        else:
            keys, values = self.cross_attn.keys_values(context)
            if text is not None:
                text[0] = keys
                text[1] = values
        return self.after(x, attention(q, keys, values), mod)


class Head(nn.Module):
    def __init__(self, cfg: DiTConfig):
        super().__init__()
        self.eps = cfg.eps
        self.head = nn.Linear(cfg.dim, math.prod(cfg.patch_size) * cfg.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, cfg.dim) / cfg.dim**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x [B, T, P, D], e [B or 1, T or 1, D] -> [B, T, P, 4 * C] float32"""
        rows = self.modulation.float() + e.unsqueeze(2)  # [B, T, 2, D]
        shift, scale = rows.unsqueeze(3).unbind(2)  # [B, T, 1, D] each
        return linear32(self.head, modulated_norm(x.float(), shift, scale, self.eps))


class WanDiT(nn.Module):
    """v = model(x, sigma, context): the velocity noise - x0. Parameters carry upstream's names;
    there are no buffers.

    `checkpointing = True` recomputes every block in backward.
    """

    def __init__(self, cfg: DiTConfig):
        super().__init__()
        self.cfg = cfg
        self.checkpointing = False
        dim = cfg.dim
        self.patch_embedding = nn.Conv3d(cfg.in_dim, dim, cfg.patch_size, cfg.patch_size)
        self.text_embedding = MLP(cfg.text_dim, dim, dim)
        self.time_embedding = nn.Sequential(
            nn.Linear(cfg.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.num_layers))
        self.head = Head(cfg)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> "WanDiT":
        """Random weights to train from, or to measure with: Xavier, no biases, gates at 1 so that
        all blocks act.
        """
        for name, w in self.named_parameters():
            if name.endswith("modulation"):
                w.normal_(0, self.cfg.dim**-0.5, generator=generator)
                w[:, 2::3] += 1  # the gates, of which the head has none
            elif w.ndim >= 2:
                fans = w.shape[0] + w[0].numel()
                w.normal_(0, (2 / fans) ** 0.5, generator=generator)
            elif "norm" in name and name.endswith("weight"):
                w.fill_(1.0)
            else:
                w.fill_(0.0)
        return self

    def forward(
        self,
        x: Tensor,
        sigma: float | Tensor,
        context: Tensor,
        *,
        chunks: list[int] | None = None,
        window: int | None = None,
        clean: Tensor | None = None,
        clean_sigma: float | Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The velocity at x, shaped like x.

        x [B, C, T, H, W]; sigma float, [B] or [B, T]; context [B, text_len, text_dim], zero-padded.
        - nothing more: bidirectional
        - chunks (frames of each; window: int, in frames): block-causal mask over the whole sequence
        - chunks and clean [B, C, T, H, W]: teacher forcing, the clean half at clean_sigma (default
          0); v of the noisy half
        - cache: x continues the committed frames; `cache.commit(T)` then makes its keys permanent
        - cache and chunks: a replay; x takes the place of the last chunks that ran through the
          cache

        ValueError for a latent size that patches do not fill; an AssertionError names whatever else
        does not fit together.
        """
        self._check(x, context, chunks, window, clean, clean_sigma, cache)
        batch, _, frames, height, width = x.shape
        tokens = self.cfg.tokens_per_frame(height, width)
        v_dtype = x.dtype
        sigma = self._levels(sigma, x)  # [B or 1, T]

        # Self-attention in one of three ways: the whole sequence at once, masked if it is causal;
        # the next frames behind the cache's; or the cache's last chunks again.
        if cache is None:
            start = 0
            mask = None
            if chunks:
                mask = causal_mask(tuple(chunks), tokens, window, clean is not None, x.device)
            attend = partial(attend_whole, mask)
        else:
            attend = cache.append(frames) if chunks is None else cache.replay(chunks)
            start = attend.start
        rope = rope_table(self.cfg.head_dim, start, frames, height // 2, width // 2, x.device)

        # Teacher forcing: the sequence is [clean, noisy], both at the same positions.
        if clean is not None:
            clean_level = self._levels(0.0 if clean_sigma is None else clean_sigma, x)
            both = (clean_level.expand(batch, -1), sigma.expand(batch, -1))
            sigma = torch.cat(both, 1)  # [B, 2T]
            rope = torch.cat([rope, rope], 2)
            x = torch.cat([clean, x], 2)

        # The text's keys are kept for the next forward where the cache knows this text and no grad
        # is asked for: kept ones carry no graph.
        if cache is None or torch.is_grad_enabled() or context is not cache.context:
            v = self.compute(x, sigma, rope, frames, attend, context)
        elif cache.text_kept:
            v = self.compute(x, sigma, rope, frames, attend, None, cache.text)
        else:
            v = self.compute(x, sigma, rope, frames, attend, context, cache.text)
            cache.text_kept = True
        return v.to(v_dtype)

    def compute(self, x, sigma, rope, frames, attend, context, text=None) -> Tensor:
        """The network itself -> v of the last `frames` frames of x, float32.

        It works on tensors alone and waits for nothing, so it can be recorded as a CUDA graph.
        x [B, C, T, H, W], sigma [B or 1, T] float64, rope of `rope_table`, context [B, L, D'].

        attend(layer, q, k, v): self-attention. text [layers, 2, B, L, N, K]: where the text's keys
        and values are put, or, with context None, are.
        """
        h = self._patchify(x)  # [B, T, P, D]
        e = F.silu(linear32(self.time_embedding[0], self._sinusoid(sigma)))
        e = linear32(self.time_embedding[2], e)  # [B, T, D]
        mod = linear32(self.time_projection[1], F.silu(e)).unflatten(-1, (6, -1))  # [B, T, 6, D]
        if context is not None:
            context = self.text_embedding(context.to(h.dtype))  # [B, L, D]

        for layer, block in enumerate(self.blocks):
            kept = None if text is None else text[layer]
            arguments = (h, mod, rope, context, partial(attend, layer), kept)
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, *arguments, use_reentrant=False)
            else:
                h = block(*arguments)
        h = self.head(h[:, -frames:], e[:, -frames:])  # [B, T, P, 4 * C]
        return self._unpatchify(h, *x.shape[3:])

    def _check(self, x, context, chunks, window, clean, clean_sigma, cache) -> None:
        cfg = self.cfg
        batch, channels, frames, height, width = x.shape
        tokens = cfg.tokens_per_frame(height, width)
        assert channels == cfg.in_dim, f"{channels} channels, the network takes {cfg.in_dim}"
        text = (batch, cfg.text_len, cfg.text_dim)
        assert context.shape == text, f"context of {tuple(context.shape)}, not {text}"
        if chunks is not None:
            assert sum(chunks) == frames, f"chunks {list(chunks)} of {frames} frames"
            assert not window or max(chunks) <= window, f"chunks {list(chunks)}, window {window}"
        if cache is not None:
            assert clean is None, "clean= is for whole sequences; a cache has its own"
            assert not window, "the window is the cache's"
            cache.check(cfg.num_layers, batch, tokens)
        assert chunks or not window, f"window {window} without chunks"
        assert clean is not None or clean_sigma is None, "clean_sigma without a clean half"
        if clean is not None:
            assert chunks, "teacher forcing takes chunks"
            assert clean.shape == x.shape, f"a clean half of {tuple(clean.shape)}, {tuple(x.shape)}"

    def _levels(self, sigma: float | Tensor, x: Tensor) -> Tensor:
        """sigma (float, [B] or [B, T]) as float64 [B or 1, T]."""
        batch, _, frames = x.shape[:3]
        if not isinstance(sigma, Tensor):
            # A shift below 1 may round a level of 1 up, by the last bit.
            assert 0 <= sigma < 1.001, f"sigma {sigma} is not in [0, 1]; timesteps are 1000 sigma"
            # Filled on the device: a copy would wait for the GPU.
            return torch.full((1, frames), sigma, dtype=torch.float64, device=x.device)
        rows = len(sigma) if sigma.ndim else 1
        level = sigma.to(x.device, torch.float64).reshape(rows, -1)
        fits = level.shape[0] in (1, batch) and level.shape[1] in (1, frames)
        assert fits, f"sigma {tuple(sigma.shape)} is no number, [B] or [B, T] of {tuple(x.shape)}"
        return level.expand(-1, frames)

    def _sinusoid(self, sigma: Tensor) -> Tensor:
        """cos, then sin, of 1000 sigma over geometric frequencies: [B, T] -> [B, T, freq_dim]
        float32.
        """
        angle = 1000 * sigma.unsqueeze(-1) * frequencies(self.cfg.freq_dim // 2, sigma.device)
        return torch.cat([angle.cos(), angle.sin()], -1).float()

    def _patchify(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, T, P, D], tokens in (row, column) order: the Conv3d as a matrix
        product.
        """
        conv = self.patch_embedding
        x = x.to(conv.weight.dtype)
        x = x.unflatten(4, (-1, 2)).unflatten(3, (-1, 2))  # [B, C, T, H/2, 2, W/2, 2]
        x = x.permute(0, 2, 3, 5, 1, 4, 6)  # [B, T, H/2, W/2, C, 2, 2]
        x = x.flatten(4).flatten(2, 3)  # [B, T, P, C * 4]
        return F.linear(x, conv.weight.flatten(1), conv.bias)

    def _unpatchify(self, x: Tensor, height: int, width: int) -> Tensor:
        """[B, T, P, 2 * 2 * C] -> [B, C, T, H, W]"""
        batch, frames = x.shape[:2]
        x = x.unflatten(-1, (2, 2, -1))  # [B, T, P, 2, 2, C]
        x = x.unflatten(2, (height // 2, width // 2))  # [B, T, H/2, W/2, 2, 2, C]
        x = x.permute(0, 6, 1, 2, 4, 3, 5)  # [B, C, T, H/2, 2, W/2, 2]
        return x.reshape(batch, -1, frames, height, width)  # a copy: FSDP2 takes no view as output
