"""The Wan2.2 video VAE: pixels to 48-channel latents at strides (4, 16, 16) and back; causal, whole or in chunks.

The layers work on channels-last activations x [B, T, H, W, C] (T counts whatever frames the layer sees) and keep no
state: what a causal layer must remember of earlier chunks lives in a `Stream` that the caller passes along. Every
chunking gives the same result, so the chunk size is only a matter of memory and speed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan5b.fuse import fused

# Per-channel statistics of the released 48-channel latent space (Wan-AI/Wan2.2-TI2V-5B).
# fmt: off
LATENT_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
LATENT_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on
# Latent frames a call; frames, of the four that a latent frame becomes, that the widest layers of the decoder take at a
# time: with more, decoding a block of 704x1280 in bf16 needs over 9 GiB.
ENCODED, DECODED, FRAMES = 2, 3, 6


@dataclass(frozen=True)
class VAEConfig:
    """Sizes under upstream's field names (its spelling too); the defaults are the release's."""

    dim: int = 160
    dec_dim: int = 256
    z_dim: int = 48
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)

    @property
    def strides(self) -> tuple[int, int, int]:
        """Pixels per latent in time (after the first frame, which stands for one), height and width.

        In space 2 by space-to-depth and 2 per stage but the last.
        """
        return 2 ** sum(self.temperal_downsample), 2 ** len(self.dim_mult), 2 ** len(self.dim_mult)


@dataclass(eq=False)
class Stream:
    """What one causal pass remembers between its chunks; make one per video and direction with `VAE22.stream`.

    A chunk that fails ends its stream. A deep copy remembers nothing: history goes by layer.
    """

    first: bool = True  # whether the chunk being processed, or the next one, holds the first frame of the video
    history: dict[nn.Module, Tensor] = field(
        default_factory=dict
    )  # layer -> the last frames of its input
    fold: Callable[[nn.Conv2d], Tensor] = field(
        default_factory=lambda: cache(fold_upsampling)
    )  # once a video


class RMSNorm(nn.Module):
    """x / rms(x) * gamma over channels: upstream's L2 normalisation times sqrt(C). axes: the ones in gamma's shape."""

    def __init__(self, dim: int, axes: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * axes))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(
            x, x.shape[-1:], self.gamma.flatten(), eps=1e-24
        )  # the eps only guards an all-zero pixel


@fused
def norm_silu_(out: Tensor, x: Tensor, bias: Tensor | None, norm: RMSNorm) -> None:
    """out = silu(norm(x + bias)), written once into out, a slice of a larger buffer."""
    torch.ops.aten.silu.out(norm(x if bias is None else x + bias), out=out)


@fused
def add_residual_(h: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """h + bias + x, in place of h."""
    return h.add_(bias).add_(x)


def convolve(conv: nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """Conv2d on [N, H, W, C] or Conv3d on [B, T, H, W, C], channels-last for torch; no bias: torch's pass is slow."""
    run = F.conv2d if x.ndim == 4 else F.conv3d
    return run(x.movedim(-1, 1), conv.weight, stride=conv.stride, padding=conv.padding).movedim(
        1, -1
    )


def pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    """A 1x1 or 1x1x1 convolution on [..., C], as the matrix product that it is."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def causal_conv3d(dim: int, out_dim: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> nn.Conv3d:
    """Conv3d for `convolve_causal`: padded in space by itself, in time by the frames of the stream."""
    return nn.Conv3d(dim, out_dim, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))


def convolve_causal(
    conv: nn.Conv3d,
    x: Tensor,
    state: Stream,
    norm: RMSNorm | None = None,
    bias: Tensor | None = None,
):
    """conv(x), or conv(silu(norm(x + bias))), behind the input frames before x: zeros at the start of the stream.

    They are two, or one at stride 2. conv's own bias is left to the next step. Input and history are written once, into
    the buffer that conv reads.
    """
    past = conv.kernel_size[0] - conv.stride[0]
    padded = x.new_empty(len(x), past + x.shape[1], *x.shape[2:])
    padded[:, :past] = state.history.get(conv, 0)
    if norm is None:
        padded[:, past:] = x
    else:
        norm_silu_(padded[:, past:], x, bias, norm)
    state.history[conv] = padded[:, -past:].clone()  # a view would keep the whole buffer alive
    return convolve(conv, padded)


class ResidualBlock(nn.Module):
    """Twice norm, SiLU, causal 3x3x3 convolution; plus the input. Modules are numbered as in upstream's Sequential."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        conv1, conv2 = causal_conv3d(dim, out_dim), causal_conv3d(out_dim, out_dim)
        self.residual = nn.ModuleDict(
            {"0": RMSNorm(dim), "2": conv1, "3": RMSNorm(out_dim), "6": conv2}
        )
        self.shortcut = nn.Conv3d(dim, out_dim, 1) if dim != out_dim else None

    def forward(self, x: Tensor, state: Stream) -> Tensor:
        norm1, conv1, norm2, conv2 = self.residual.values()
        h = convolve_causal(conv1, x, state, norm1)
        h = convolve_causal(conv2, h, state, norm2, conv1.bias)
        return add_residual_(
            h, conv2.bias, x if self.shortcut is None else pointwise(self.shortcut, x)
        )


class Attention(nn.Module):
    """Single-head self-attention within each frame; plus the input."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim, axes=2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, state: Stream) -> Tensor:
        qkv = (
            pointwise(self.to_qkv, self.norm(x)).flatten(2, 3).flatten(0, 1)[:, None]
        )  # [B*T, 1, H*W, 3*C], one head
        h = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))  # [B*T, 1, H*W, C]
        return pointwise(self.proj, h.reshape(x.shape)).add_(x)


def middle(dim: int) -> nn.ModuleList:
    """The layers at the lowest resolution."""
    return nn.ModuleList([ResidualBlock(dim, dim), Attention(dim), ResidualBlock(dim, dim)])


def resample_time(conv: nn.Conv3d | None, x: Tensor, state: Stream) -> Tensor:
    """[B, T, H, W, C] -> [B, T/2 or 2T, H, W, C] by conv's stride or its 2C channels; T as it is without conv.

    The video's first frame stays single.
    """
    lead = 1 if state.first else 0
    if conv is None or x.shape[1] == lead:
        return x
    y = convolve_causal(conv, x[:, lead:], state).add_(conv.bias)
    y = y.unflatten(-1, (-1, x.shape[-1])).movedim(-2, 2).flatten(1, 2)
    return torch.cat([x[:, :1], y], dim=1) if state.first else y


class Downsample(nn.Module):
    """Halves height and width; if temporal, also the frame count behind the video's first frame."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(dim, dim, 3, stride=2)})
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, state: Stream) -> Tensor:
        conv, padded = self.resample["1"], F.pad(x, (0, 0, 0, 1, 0, 1))  # right and bottom
        x = convolve(conv, padded.flatten(0, 1)).unflatten(0, x.shape[:2]).add_(conv.bias)
        if (
            self.time_conv is not None and state.first
        ):  # the frames behind it see the first one, not zeros
            state.history[self.time_conv] = x[:, :1].clone()
        return resample_time(self.time_conv, x, state)


def fold_upsampling(conv: nn.Conv2d) -> Tensor:
    """Weights with which conv3x3(nearest 2x of x) is four 2x2 convolutions of x, [4 * C', C, 2, 2].

    An output row 2i + a sees only two rows of x, i + a - 1 and i + a: kernel rows (0 | 1, 2) for a = 0, (0, 1 | 2) for
    a = 1, summed; likewise columns. The phases (a, b) are channels of one convolution with 4/9 of the arithmetic.
    """
    weight = conv.weight.float()
    rows = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # [a, tap, row]
    weight = torch.einsum("apu,bqv,oiuv->aboipq", rows, rows, weight).flatten(0, 2)
    return weight.to(conv.weight.dtype, memory_format=torch.channels_last)


@fused
def assemble(phases: Tensor, bias: Tensor, x: Tensor, factor_t: int, first: bool) -> Tensor:
    """The end of an up stage: interleaved phases + bias + shortcut from the stage's input x -> [B, T', 2H, 2W, C'].

    phases [N, H + 1, W + 1, 2, 2, C'], (a, b) at offset (a, b). The shortcut repeats the channels of x [B, T, H, W, C]
    and unfolds them (c, t, h, w); in a video's first chunk the first latent frame is one frame: its group's last.
    """
    B, T, H, W, C = x.shape
    rows = [torch.stack([phases[:, a : a + H, b : b + W, a, b] for b in (0, 1)], 3) for a in (0, 1)]
    y = torch.stack(rows, 2).flatten(3, 4).flatten(1, 2)  # [N, 2H, 2W, C']
    repeats = y.shape[-1] * factor_t * 4 // C
    x = x[..., None].expand(B, T, H, W, C, repeats).reshape(B, T, H, W, -1, factor_t, 2, 2)
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(B, T * factor_t, 2 * H, 2 * W, -1)
    return y.unflatten(0, (B, -1)) + bias + (x[:, factor_t - 1 :] if first else x)


class Upsample(nn.Module):
    """Doubles height and width; if temporal, also the frame count behind the video's first frame."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(dim, dim, 3, padding=1)})
        self.time_conv = causal_conv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, state: Stream, shortcut: Tensor) -> Tensor:
        """x [B, T, H, W, C], shortcut: the stage's input -> [B, T', 2H, 2W, C]"""
        conv, factor_t = self.resample["1"], 1 if self.time_conv is None else 2
        x = resample_time(self.time_conv, x, state).flatten(0, 1)
        phases = (
            F.conv2d(x.movedim(-1, 1), state.fold(conv), padding=1)
            .movedim(1, -1)
            .unflatten(-1, (2, 2, -1))
        )
        return assemble(phases, conv.bias, shortcut, factor_t, state.first)


def average_down(x: Tensor, out_dim: int, factor_t: int, factor_s: int) -> Tensor:
    """Shortcut of a down stage: fold time and space into channels (c, t, h, w), average groups of neighbours.

    x [B, T, H, W, C] -> [B, T / factor_t, H / factor_s, W / factor_s, out_dim]; odd time is zero-padded in front.
    """
    B, T, H, W, C = x.shape
    x = F.pad(x, (0, 0, 0, 0, 0, 0, -T % factor_t, 0))
    x = x.reshape(B, -1, factor_t, H // factor_s, factor_s, W // factor_s, factor_s, C)
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6)  # [B, T', H', W', C, factor_t, factor_s, factor_s]
    return x.reshape(*x.shape[:4], out_dim, -1).mean(-1)


class DownStage(nn.Module):
    """Residual blocks and, where there is something to fold, a downsample; plus the average shortcut around all."""

    def __init__(self, dim: int, out_dim: int, blocks: int, factor_t: int, factor_s: int):
        super().__init__()
        self.fold = (out_dim, factor_t, factor_s)
        self.downsamples = nn.ModuleList(
            ResidualBlock(a, b) for a, b in pairwise([dim] + [out_dim] * blocks)
        )
        if factor_s > 1:
            self.downsamples.append(Downsample(out_dim, temporal=factor_t > 1))

    def forward(self, x: Tensor, state: Stream) -> Tensor:
        shortcut = average_down(x, *self.fold)
        for layer in self.downsamples:
            x = layer(x, state)
        return x.add_(shortcut)


class UpStage(nn.Module):
    """Residual blocks; in all stages but the last also an upsample, with the duplicating shortcut around all."""

    def __init__(self, dim: int, out_dim: int, blocks: int, factor_t: int, factor_s: int):
        super().__init__()
        self.upsamples = nn.ModuleList(
            ResidualBlock(a, b) for a, b in pairwise([dim] + [out_dim] * blocks)
        )
        if factor_s > 1:
            self.upsamples.append(Upsample(out_dim, temporal=factor_t > 1))

    def forward(self, x: Tensor, state: Stream) -> Tensor:
        h = x
        for layer in self.upsamples:
            h = layer(h, state, x) if isinstance(layer, Upsample) else layer(h, state)
        return h


class Coder(nn.ModuleDict):
    """The encoder or decoder: a convolution, the groups of layers in the order given, norm, SiLU, a convolution.

    The last two layers, of the decoder those with the largest activations, take FRAMES frames at a time. They leave
    time as it is.
    """

    def __init__(self, dim: int, widths: list[int], out_dim: int, groups: dict[str, nn.ModuleList]):
        head = nn.ModuleDict({"0": RMSNorm(widths[-1]), "2": causal_conv3d(widths[-1], out_dim)})
        super().__init__({"conv1": causal_conv3d(dim, widths[0]), **groups, "head": head})

    def forward(self, x: Tensor, state: Stream) -> Tensor:
        conv1, *groups, head = self.values()
        (*layers, up, last), (norm, conv2) = chain(*groups), head.values()
        x = convolve_causal(conv1, x, state).add_(conv1.bias)
        for layer in layers:
            x = layer(x, state)
        parts = [
            convolve_causal(conv2, last(up(part, state), state), state, norm)
            for part in x.split(FRAMES, dim=1)
        ]
        state.first = False
        return torch.cat(parts, dim=1).add_(conv2.bias)


def stages(
    kind: type[nn.Module], widths: list[int], blocks: int, temporal: tuple[bool, ...]
) -> nn.ModuleList:
    """A stage between every two widths. All fold or unfold space, and time if temporal; the last keeps the size."""
    factors = [(2 if t else 1, 2) for t in temporal] + [(1, 1)]  # time, space
    return nn.ModuleList(
        kind(a, b, blocks, *f) for (a, b), f in zip(pairwise(widths), factors, strict=True)
    )


def space_to_depth(video: Tensor) -> Tensor:
    """[B, 3, T, H, W] -> [B, T, H/2, W/2, 12]; channel = 4 * colour + 2 * column offset + row offset."""
    x = video.unflatten(4, (-1, 2)).unflatten(3, (-1, 2))  # [B, 3, T, H/2, row, W/2, column]
    return x.permute(0, 2, 3, 5, 1, 6, 4).flatten(4)


def depth_to_space(x: Tensor) -> Tensor:
    """The inverse of `space_to_depth`."""
    x = x.unflatten(4, (-1, 2, 2))  # [B, T, H/2, W/2, 3, column, row]
    return x.permute(0, 4, 1, 2, 6, 3, 5).flatten(5).flatten(3, 4)


def _check(video: Tensor, cfg: VAEConfig) -> None:
    """ValueError, with the nearest valid sizes, for a video that does not come out even."""
    if video.ndim != 5 or video.shape[1] != 3:
        raise ValueError(f"video must be [B, 3, T, H, W], got {list(video.shape)}")
    names = ("frame count", "height", "width")
    for value, what, step, offset in zip(
        video.shape[2:], names, cfg.strides, (1, 0, 0), strict=True
    ):
        below = (value - offset) // step * step + offset
        valid = [v for v in (below, below + step) if v > 0]
        if value not in valid:
            raise ValueError(
                f"{what} {value} must be {step}k + {offset}; nearest: {' or '.join(map(str, valid))}"
            )


class VAE22(nn.Module):
    """Encoder and decoder with upstream's parameter names; a released state dict loads strictly. Nothing carries grad.

    Computes in the weights' dtype. bfloat16 is fine for decoding; encode conditioning images with float32 weights.
    """

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.cfg = cfg
        assert not cfg.temperal_downsample[0], (
            "the decoder's last two stages must leave time as it is"
        )
        # space-to-depth pixels [B, T, H, W, 12] -> mean and log-variance [B, T', H', W', 2 * z_dim]
        widths = [cfg.dim * m for m in (1, *cfg.dim_mult)]
        down = stages(DownStage, widths, cfg.num_res_blocks, cfg.temperal_downsample)
        self.encoder = Coder(
            12, widths, 2 * cfg.z_dim, {"downsamples": down, "middle": middle(widths[-1])}
        )
        self.conv1 = nn.Conv3d(2 * cfg.z_dim, 2 * cfg.z_dim, 1)
        self.conv2 = nn.Conv3d(cfg.z_dim, cfg.z_dim, 1)
        # latents [B, T, H, W, z_dim] -> space-to-depth pixels [B, T', H', W', 12]
        widths = [cfg.dec_dim * m for m in (cfg.dim_mult[-1], *cfg.dim_mult[::-1])]
        up = stages(UpStage, widths, cfg.num_res_blocks + 1, cfg.temperal_downsample[::-1])
        self.decoder = Coder(cfg.z_dim, widths, 12, {"middle": middle(widths[0]), "upsamples": up})

    def stream(self) -> Stream:
        """State for one video through `decode_chunk`, independent of others. Lays the weights out channels-last."""
        layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
        for p in self.parameters():  # in place; cuDNN would copy them at every call
            p.data = p.data.contiguous(memory_format=layouts.get(p.ndim, torch.contiguous_format))
        return Stream()

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Pixels in [-1, 1], [B, 3, 1 + 4k, H, W] -> normalised latents [B, z_dim, 1 + k, H/16, W/16], float32.

        Raises ValueError for other frame counts, channel counts, or H, W that are not multiples of 16.
        """
        _check(video, self.cfg)
        stride, state = self.cfg.strides[0], self.stream()
        cuts = range(
            1 + (ENCODED - 1) * stride, video.shape[2], ENCODED * stride
        )  # latent frame 0 is a pixel frame
        chunks = (
            chunk.to(self.conv1.weight.dtype) for chunk in video.tensor_split(list(cuts), dim=2)
        )
        encoded = [
            pointwise(self.conv1, self.encoder(space_to_depth(chunk), state)) for chunk in chunks
        ]
        mean = torch.cat(encoded, dim=1)[
            ..., : self.cfg.z_dim
        ].float()  # the rest is the log-variance
        return (
            ((mean - mean.new_tensor(LATENT_MEAN)) / mean.new_tensor(LATENT_STD))
            .movedim(-1, 1)
            .contiguous()
        )

    def decode(self, latent: Tensor) -> Tensor:
        """Normalised latents [B, z_dim, T, H, W] -> pixels [B, 3, 1 + 4(T - 1), 16H, 16W], about [-1, 1], not clamped.

        In the weights' dtype. Raises ValueError for another channel count.
        """
        return self.decode_chunk(latent, self.stream())

    @torch.no_grad()
    def decode_chunk(self, latent: Tensor, state: Stream) -> Tensor:
        """The next pixels of a stream from its next latents [B, z_dim, n, H, W], n >= 1.

        4n pixel frames, or 1 + 4(n - 1) at the start of the stream: together the same frames as one `decode`.
        """
        if latent.ndim != 5 or latent.shape[1] != self.cfg.z_dim or 0 in latent.shape:
            raise ValueError(
                f"latent must be [B, {self.cfg.z_dim}, T, H, W], got {list(latent.shape)}"
            )
        z = latent.movedim(1, -1).float()
        z = (z * z.new_tensor(LATENT_STD) + z.new_tensor(LATENT_MEAN)).to(self.conv2.weight.dtype)
        parts = [
            depth_to_space(self.decoder(pointwise(self.conv2, part), state))
            for part in z.split(DECODED, dim=1)
        ]
        return torch.cat(parts, dim=2)


class LinearCodec(nn.Module):
    """A fixed linear transform with VAE22's interface, for worlds small enough for a CPU; nothing carries grad.

    A patch of t frames x s x s pixels of one colour becomes its z_dim / 3 products with `basis`, and the sum of the
    patches of `dual` that they weigh again. Computes in the weights' dtype. Has no initial values: load a state dict.
    """

    stream = Stream  # so codec.stream() is the state for one video through `decode_chunk`

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.cfg = cfg
        self.basis = nn.Parameter(torch.empty(cfg.z_dim // 3, 1, *cfg.strides))  # encodes
        self.dual = nn.Parameter(torch.empty_like(self.basis))  # decodes

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """As VAE22's. The first latent frame is that of the first pixel frame repeated."""
        _check(video, self.cfg)
        lead = video[:, :, :1].expand(-1, -1, self.cfg.strides[0] - 1, -1, -1)
        planes = (
            torch.cat([lead, video], dim=2).flatten(0, 1)[:, None].to(self.basis.dtype)
        )  # [B*3, 1, T, H, W]
        return (
            F.conv3d(planes, self.basis, stride=self.cfg.strides)
            .unflatten(0, (-1, 3))
            .flatten(1, 2)
            .float()
        )

    decode = VAE22.decode

    @torch.no_grad()
    def decode_chunk(self, latent: Tensor, state: Stream) -> Tensor:
        """As VAE22's. The video's first frame is the mean of those of its patch."""
        z = latent.unflatten(1, (3, -1)).flatten(0, 1).to(self.dual.dtype)  # [B*3, C/3, n, H, W]
        video = (
            F.conv_transpose3d(z, self.dual, stride=self.cfg.strides)
            .unflatten(0, (-1, 3))
            .squeeze(2)
        )
        if state.first:
            lead, rest = video.tensor_split([self.cfg.strides[0]], dim=2)
            video = torch.cat([lead.mean(2, keepdim=True), rest], dim=2)
        state.first = False
        return video
