"""The Wan diffusion transformer: bidirectional, block-causal, teacher-forced or cached, by what `forward` is given.

B batch, C channels, T latent frames, H W latent size, P tokens per frame, S = T * P, L text tokens, D width,
N heads, K head dim. Residual stream [B, T, P, D]; latents [B, C, T, H, W]; sigma in [0, 1].
Precision: linear layers and attention in the weights' dtype; norms, modulation, gates, RoPE, time embedding and head
in float32 by hand, whatever the weights' dtype.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wan5b.attention import attention, causal_mask
from wan5b.fuse import fused


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of a network; field names as in a release's config.json. Derived geometry only through the methods."""

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
        """Tokens of a latent frame of height x width. ValueError if it can't be cut into patches."""
        if height % 2 or width % 2:
            raise ValueError(f"latent size {height}x{width} is not a multiple of the patch 2x2")
        return height * width // 4


PRESETS = {
    "ti2v-5B": DiTConfig(),
    "t2v-1.3B": DiTConfig(1536, 8960, 12, 30, 16, 16, model_type="t2v"),
    "t2v-14B": DiTConfig(5120, 13824, 40, 40, 16, 16, model_type="t2v"),
    "tiny": DiTConfig(256, 512, 8, 3, text_dim=64, text_len=24, freq_dim=64),
}

# --------------------------------------------------------------------------------------------------------- RoPE


def frequencies(n: int, device: torch.device) -> Tensor:
    """The n geometric frequencies from 1 towards 1 / 10000, float64."""
    return 10000.0 ** -(torch.arange(n, dtype=torch.float64, device=device) / n)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept is for forwards with grad too
def rope_table(
    head_dim: int, start: int, frames: int, height: int, width: int, device: torch.device
) -> Tensor:
    """Rotations of frames start .. start + frames (RoFormer): (cos, cos) and (-sin, sin) of each channel pair's angle.

    [2, 1, S, 1, K] float32. Computed from float64 angles at the positions asked for, so no length limit. The K/2 pairs
    are split over (time, row, column), each axis with a frequency table of its own.
    """
    spatial = head_dim // 6
    ranges = ((start, start + frames), (0, height), (0, width))
    grid = torch.meshgrid(
        [torch.arange(*ends, dtype=torch.float64, device=device) for ends in ranges], indexing="ij"
    )
    counts = (head_dim // 2 - 2 * spatial, spatial, spatial)
    angles = [
        x.reshape(-1, 1, 1) * frequencies(n, device) for x, n in zip(grid, counts, strict=True)
    ]
    angle = torch.cat(angles, -1)[None].repeat_interleave(2, -1)  # [1, S, 1, K]
    return torch.stack(
        [angle.cos(), angle.sin() * angle.new_tensor([-1, 1]).repeat(head_dim // 2)]
    ).float()


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate adjacent channel pairs of x [B, S, N, K] in float32; the result has the dtype of x."""
    cos, sin = rope
    swapped = (
        x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    )  # compiles to one kernel, where a stack of halves takes two
    return (x.float() * cos + swapped.float() * sin).to(x.dtype)


# ------------------------------------------------------------------------------------------------------- blocks


def linear32(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in float32, whatever the dtype of its weights."""
    return F.linear(x.float(), layer.weight.float(), layer.bias.float())


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """norm(x) * (1 + scale) + shift, in float32; x [B, T, P, D], shift and scale [B, T, 1, D]."""
    return torch.addcmul(shift, F.layer_norm(x.float(), x.shape[-1:], eps=eps), 1 + scale).to(
        x.dtype
    )


def mlp(dim: int, hidden: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, out_dim)
    )


class Attention(nn.Module):
    """The projections of one attention; the attention itself is the caller's."""

    def __init__(self, cfg: DiTConfig):
        super().__init__()
        self.heads = cfg.num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(cfg.dim, cfg.dim) for _ in range(4))
        self.norm_q, self.norm_k = (
            nn.RMSNorm(cfg.dim, cfg.eps),
            nn.RMSNorm(cfg.dim, cfg.eps),
        )  # over all heads together

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
    """One transformer block, cut at its two attentions: `before`, self-attention, `between`, cross-attention, `after`.

    The three pieces have shapes that don't depend on how much is cached, so each compiles once.
    """

    def __init__(self, cfg: DiTConfig):
        super().__init__()
        self.eps = cfg.eps
        self.self_attn, self.cross_attn = Attention(cfg), Attention(cfg)
        self.norm3 = nn.LayerNorm(cfg.dim, cfg.eps)
        self.ffn = mlp(cfg.dim, cfg.ffn_dim, cfg.dim)
        self.modulation = nn.Parameter(torch.randn(1, 6, cfg.dim) / cfg.dim**0.5)

    @fused
    def before(self, x: Tensor, mod: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, P, D] -> rotated q, k and v, [B, S, N, K]"""
        shift, scale = self._modulation(mod, 0, 1)
        h = modulated_norm(x, shift, scale, self.eps)
        k, v = self.self_attn.keys_values(h)
        return rotate(self.self_attn.queries(h), rope), rotate(k, rope), v

    @fused
    def between(self, x: Tensor, y: Tensor, mod: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream after self-attention's y, and the queries to the text."""
        (gate,) = self._modulation(mod, 2)
        x = torch.addcmul(x.float(), self.self_attn.output(y, x).float(), gate).to(x.dtype)
        h = F.layer_norm(
            x.float(), x.shape[-1:], self.norm3.weight.float(), self.norm3.bias.float(), self.eps
        )
        return x, self.cross_attn.queries(h.to(x.dtype))

    @fused
    def after(self, x: Tensor, y: Tensor, mod: Tensor) -> Tensor:
        """The residual stream after cross-attention's y and the feed-forward layer."""
        shift, scale, gate = self._modulation(mod, 3, 4, 5)
        x = x + self.cross_attn.output(y, x)
        h = self.ffn(modulated_norm(x, shift, scale, self.eps))
        return torch.addcmul(x.float(), h.float(), gate).to(x.dtype)

    def _modulation(self, mod: Tensor, *rows: int) -> list[Tensor]:
        """Rows of the parameter + the projected time mod [B, T, 6, D], float32, each [B, T, 1, D]."""
        return [mod[:, :, i : i + 1] + self.modulation[:, None, i : i + 1].float() for i in rows]

    def forward(
        self,
        x: Tensor,
        mod: Tensor,
        rope: Tensor,
        context: Tensor | None,
        attend: Callable,
        text=None,
    ):
        """x [B, T, P, D], mod [B or 1, T or 1, 6, D] float32, context [B, L, D] -> [B, T, P, D]

        attend(q, k, v): self-attention. text [2, B, L, N, K]: where the text's keys and values go, or, without context,
        are.
        """
        q, k, v = self.before(x, mod, rope)
        x, q = self.between(x, attend(q, k, v), mod)
        keys_values = text if context is None else self.cross_attn.keys_values(context)
        if text is not None and context is not None:
            text[0], text[1] = keys_values
        return self.after(x, attention(q, *keys_values), mod)


class Head(nn.Module):
    def __init__(self, cfg: DiTConfig):
        super().__init__()
        self.eps = cfg.eps
        self.head = nn.Linear(cfg.dim, math.prod(cfg.patch_size) * cfg.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, cfg.dim) / cfg.dim**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x [B, T, P, D], e [B or 1, T or 1, D] -> [B, T, P, 4 * C] float32"""
        shift, scale = (self.modulation.float() + e.unsqueeze(2)).unsqueeze(3).unbind(2)
        return linear32(self.head, modulated_norm(x.float(), shift, scale, self.eps))


class WanDiT(nn.Module):
    """v = model(x, sigma, context): the velocity noise - x0. Parameters carry upstream's names; there are no buffers.

    `checkpointing = True` recomputes every block in backward.
    """

    def __init__(self, cfg: DiTConfig):
        super().__init__()
        self.cfg, self.checkpointing = cfg, False
        self.patch_embedding = nn.Conv3d(cfg.in_dim, cfg.dim, cfg.patch_size, cfg.patch_size)
        self.text_embedding = mlp(cfg.text_dim, cfg.dim, cfg.dim)
        self.time_embedding = nn.Sequential(
            nn.Linear(cfg.freq_dim, cfg.dim), nn.SiLU(), nn.Linear(cfg.dim, cfg.dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(cfg.dim, 6 * cfg.dim))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.num_layers))
        self.head = Head(cfg)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> "WanDiT":
        """Random weights to train from, or to measure with: Xavier, zero biases, gates at 1 so that all blocks act."""
        for name, w in self.named_parameters():
            if name.endswith("modulation"):
                w.normal_(0, self.cfg.dim**-0.5, generator=generator)
                w[:, 2::3] += 1  # the gates, of which the head has none
            elif w.ndim >= 2:
                w.normal_(0, (2 / (w.shape[0] + w[0].numel())) ** 0.5, generator=generator)
            else:
                w.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        return self

    def forward(
        self,
        x: Tensor,
        sigma,
        context: Tensor,
        *,
        chunks=None,
        window=None,
        clean=None,
        clean_sigma=None,
        cache=None,
    ) -> Tensor:
        """The velocity at x, shaped like x.

        x [B, C, T, H, W]; sigma float, [B] or [B, T]; context [B, text_len, text_dim], zero-padded.
        - nothing more: bidirectional
        - chunks (list, frames of each; window: int, in frames): block-causal mask over the whole sequence
        - chunks and clean [B, C, T, H, W]: teacher forcing, clean half at clean_sigma (default 0); v of the noisy half
        - cache (KVCache): x continues the committed frames; `cache.commit(T)` then makes this forward's keys permanent
        - cache and chunks: x takes the place of the last chunks run through the cache, each seeing what it saw then
        """
        (batch, _, frames, height, width), dtype = x.shape, x.dtype
        p = self.cfg.tokens_per_frame(height, width)
        self._check(x, context, chunks, window, clean, cache)
        sigma = self._levels(sigma, x)
        spans = cache and cache.spans(frames, chunks, self.cfg.num_layers, batch, p)
        rope = rope_table(
            self.cfg.head_dim,
            spans[0].start if cache else 0,
            frames,
            height // 2,
            width // 2,
            x.device,
        )

        if clean is not None:
            levels = (self._levels(0.0 if clean_sigma is None else clean_sigma, x), sigma)
            sigma = torch.cat([level.expand(batch, -1) for level in levels], 1)  # [B, 2T]
            rope, x = torch.cat([rope, rope], 2), torch.cat([clean, x], 2)
        mask = (
            causal_mask(tuple(chunks), p, window, clean is not None, x.device)
            if chunks and not cache
            else None
        )

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if not cache:
                return attention(q, k, v, mask)
            parts = zip(
                spans,
                *(x.split([n * p for n in chunks or [frames]], 1) for x in (q, k, v)),
                strict=True,
            )
            y = [attention(q, *cache.extend(layer, k, v, span)) for span, q, k, v in parts]
            return y[0] if len(y) == 1 else torch.cat(y, 1)

        run = partial(self._run, frames, attend)
        if cache is None or torch.is_grad_enabled():
            v = run(context, [None] * len(self.blocks), x, sigma, rope)
        elif cache.context is context:
            key = (self, x.shape, sigma.shape, str(spans[0][1:]))
            v = cache.graphs.run(key, partial(run, None, cache.text), x, sigma, rope)
        else:
            cache.context = None  # what is kept is a mixture, if this forward does not end
            v, cache.context = run(context, cache.text, x, sigma, rope), context
        return v.to(dtype)

    def _run(
        self,
        frames: int,
        attend: Callable,
        context: Tensor | None,
        text,
        x: Tensor,
        sigma: Tensor,
        rope: Tensor,
    ):
        """The network itself -> v of the last `frames` frames, float32. Works on tensors alone, waits for nothing.

        text: for every block, what it takes by that name; context None: text holds the keys and values.
        """
        h = self._patchify(x)  # [B, T, P, D]
        e = linear32(
            self.time_embedding[2], F.silu(linear32(self.time_embedding[0], self._sinusoid(sigma)))
        )
        mod = linear32(self.time_projection[1], F.silu(e)).unflatten(-1, (6, -1))  # [B, T, 6, D]
        if context is not None:
            context = self.text_embedding(context.to(h.dtype))  # [B, L, D]
        recomputed = self.checkpointing and torch.is_grad_enabled()
        for layer, (block, kept) in enumerate(zip(self.blocks, text, strict=True)):
            run = partial(checkpoint, block, use_reentrant=False) if recomputed else block
            h = run(h, mod, rope, context, partial(attend, layer), kept)
        h = self.head(h[:, -frames:], e[:, -frames:])
        return self._unpatchify(h, *x.shape[3:])

    def _check(self, x, context, chunks, window, clean, cache) -> None:
        cfg, frames = self.cfg, x.shape[2]
        if x.shape[1] != cfg.in_dim:
            raise ValueError(
                f"latents have {x.shape[1]} channels, this model takes {cfg.in_dim}: another latent space"
            )
        want = (len(x), cfg.text_len, cfg.text_dim)
        if context.shape != want:
            raise ValueError(
                f"context must be [B, text_len, text_dim] {want}, zero-padded, got {tuple(context.shape)}"
            )
        if chunks and sum(chunks) != frames:
            raise ValueError(
                f"chunks {list(chunks)} add up to {sum(chunks)} frames, x has {frames}"
            )
        if chunks and window and window < max(chunks):
            raise ValueError(
                f"a chunk of {max(chunks)} frames does not fit in a window of {window}"
            )
        if cache is not None and (clean is not None or window):
            raise ValueError(
                "a cached forward has clean frames and window from the cache: give neither of them"
            )
        if clean is not None and (not chunks or clean.shape != x.shape):
            raise ValueError(
                f"teacher forcing takes chunks and a clean half of x's shape {tuple(x.shape)}"
            )

    def _levels(self, sigma: float | Tensor, x: Tensor) -> Tensor:
        """sigma (float, [B] or [B, T]) as float64 [B or 1, T]."""
        if not isinstance(sigma, Tensor):
            return torch.full(
                (1, x.shape[2]), sigma, dtype=torch.float64, device=x.device
            )  # no copy, no wait
        sigma = sigma.to(x.device, torch.float64).reshape(len(sigma) if sigma.ndim else 1, -1)
        if sigma.shape[0] not in (1, len(x)) or sigma.shape[1] not in (1, x.shape[2]):
            raise ValueError(
                f"sigma must be a number, [B] or [B, T] for x {tuple(x.shape)}, got {tuple(sigma.shape)}"
            )
        return sigma.expand(-1, x.shape[2])

    def _sinusoid(self, sigma: Tensor) -> Tensor:
        """cos, then sin, of 1000 sigma over geometric frequencies: [B, T] float64 -> [B, T, freq_dim] float32."""
        angle = 1000 * sigma.unsqueeze(-1) * frequencies(self.cfg.freq_dim // 2, sigma.device)
        return torch.cat([angle.cos(), angle.sin()], -1).float()

    def _patchify(self, x: Tensor) -> Tensor:
        """[B, C, T, H, W] -> [B, T, P, D], tokens in (row, column) order: the Conv3d as a matrix product."""
        conv = self.patch_embedding
        x = (
            x.to(conv.weight.dtype).unflatten(4, (-1, 2)).unflatten(3, (-1, 2))
        )  # [B, C, T, H/2, 2, W/2, 2]
        x = x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(2, 3)  # [B, T, P, C * 4]
        return F.linear(x, conv.weight.flatten(1), conv.bias)

    def _unpatchify(self, x: Tensor, height: int, width: int) -> Tensor:
        """[B, T, P, 2 * 2 * C] -> [B, C, T, H, W]"""
        x = x.unflatten(-1, (2, 2, -1)).unflatten(
            2, (height // 2, width // 2)
        )  # [B, T, H/2, W/2, 2, 2, C]
        return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(
            len(x), -1, x.shape[1], height, width
        )  # no view, as FSDP2 wants
