"""The Wan2.2 video VAE: pixels to 48-channel latents at strides (4, 16, 16) and back.

It is causal in time and takes a video whole or in chunks. The layers keep no state: what a causal
layer must remember of earlier chunks lives in a `Stream` that the caller passes along. Every way of
cutting a video gives the same result, so the size of a chunk is a matter of memory and speed only.

Shapes: B batch, T frames, H height, W width, C channels, each as the layer at hand sees them;
activations are [B, T, H, W, C]. A comment behind a line is the shape of what the line makes.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan5b.fuse import fused
from wan5b.util import nearest

ENCODE_FRAMES = 2  # latent frames that a pass through the encoder makes
DECODE_FRAMES = 3  # latent frames that a pass through the decoder takes
WIDE_FRAMES = 6  # frames at a time in its two widest stages: 12 need over 9 GiB at 704x1280, bf16

# Per-channel statistics of the released 48-channel latent space (Wan-AI/Wan2.2-TI2V-5B).
# fmt: off
LATENT_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799,  0.0174,  0.1838,  0.1557, -0.1382,  0.0542,
     0.2813,  0.0891,  0.1570, -0.0098,  0.0375, -0.1825, -0.2246, -0.1207, -0.0698,  0.5109,
     0.2665, -0.2108, -0.2158,  0.2502, -0.2055, -0.0322,  0.1109,  0.1567, -0.0729,  0.0899,
    -0.2799, -0.1230, -0.0313, -0.1649,  0.0117,  0.0723, -0.2839, -0.2083, -0.0520,  0.3748,
     0.0152,  0.1957,  0.1433, -0.2944,  0.3573, -0.0548, -0.1681, -0.0667,
)
LATENT_STD = (
     0.4765,  1.0364,  0.4514,  1.1677,  0.5313,  0.4990,  0.4818,  0.5013,  0.8158,  1.0344,
     0.5894,  1.0901,  0.6885,  0.6165,  0.8454,  0.4978,  0.5759,  0.3523,  0.7135,  0.6804,
     0.5833,  1.4146,  0.8986,  0.5659,  0.7069,  0.5338,  0.4889,  0.4917,  0.4069,  0.4999,
     0.6866,  0.4093,  0.5709,  0.6065,  0.6415,  0.4944,  0.5726,  1.2042,  0.5458,  1.6887,
     0.3971,  1.0600,  0.3943,  0.5537,  0.5444,  0.4089,  0.7468,  0.7744,
)
# fmt: on


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
        """Pixels per latent in time (behind the first frame, which stands alone), height, width."""
        time = 2 ** sum(self.temperal_downsample)
        space = 2 ** len(self.dim_mult)  # 2 by space-to-depth, 2 by every stage but the last
        return time, space, space


@dataclass(eq=False)
class Stream:
    """What one pass over a video remembers between its chunks. Of no use after an error.

    Nor is a deep copy: it would look its memory up under copies of the layers.
    """

    first: bool = True  # the chunk at hand, or else the next one, has the video's first frame
    history: dict[nn.Module, Tensor] = field(default_factory=dict)  # layer -> last input frames
    folded: dict[nn.Module, Tensor] = field(default_factory=dict)  # layer -> fold_upsampling(layer)


class RMSNorm(nn.Module):
    """x / rms(x) * gamma over channels, which is upstream's L2 normalisation times sqrt(C)."""

    def __init__(self, *shape: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(shape))  # upstream's shape: channels, then ones

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.gamma.flatten(), eps=1e-24)  # eps: x may be zero


@fused
def norm_silu_(out: Tensor, x: Tensor, bias: Tensor | None, norm: RMSNorm) -> None:
    """out = silu(norm(x + bias)), written once, into a part of a larger buffer."""
    if bias is not None:
        x = x + bias
    torch.ops.aten.silu.out(norm(x), out=out)


@fused
def add_residual_(h: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """h + bias + x, in place of h."""
    return h.add_(bias).add_(x)


def pointwise(conv: nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """A convolution of kernel size 1 on [..., C], as the matrix product that it is."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


class CausalConv3d(nn.Conv3d):
    """A convolution that is padded in time by the frames that its stream has seen before.

    It leaves its bias to the caller: torch adds a bias in a pass of its own, which is slow.
    """

    def forward(self, x: Tensor, state: Stream, norm=None, bias=None) -> Tensor:
        """Convolve x [B, T, H, W, C], or silu(norm(x + bias)) if there is a norm."""
        # Past and present in one buffer, to which every value is written once.
        B, T, H, W, C = x.shape
        past = self.kernel_size[0] - self.stride[0]  # frames
        padded = x.new_empty(B, past + T, H, W, C)
        padded[:, :past] = state.history.get(self, 0)  # zeros before the video
        if norm is None:
            padded[:, past:] = x
        else:
            norm_silu_(padded[:, past:], x, bias, norm)
        state.history[self] = padded[:, -past:].clone()  # a view would keep the whole buffer alive

        padded = padded.movedim(-1, 1)  # torch's order of axes; in memory channels stay last
        return F.conv3d(padded, self.weight, None, self.stride, self.padding).movedim(1, -1)


class ResidualBlock(nn.Module):
    """Twice norm, SiLU, causal convolution; plus the input. Numbers as in upstream's Sequential."""

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        layers = {
            "0": RMSNorm(dim, 1, 1, 1),
            "2": CausalConv3d(dim, out_dim, 3, padding=(0, 1, 1)),
            "3": RMSNorm(out_dim, 1, 1, 1),
            "6": CausalConv3d(out_dim, out_dim, 3, padding=(0, 1, 1)),
        }
        self.residual = nn.ModuleDict(layers)
        self.shortcut = nn.Conv3d(dim, out_dim, 1) if dim != out_dim else None

    def forward(self, x: Tensor, state: Stream) -> Tensor:
        norm1, conv1, norm2, conv2 = self.residual.values()
        h = conv1(x, state, norm1)
        h = conv2(h, state, norm2, conv1.bias)
        if self.shortcut is not None:
            x = pointwise(self.shortcut, x)
        return add_residual_(h, conv2.bias, x)


class Attention(nn.Module):
    """Self-attention of one head within each frame; plus the input."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim, 1, 1)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, state: Stream) -> Tensor:
        qkv = pointwise(self.to_qkv, self.norm(x))  # [B, T, H, W, 3C]
        qkv = qkv.flatten(2, 3).flatten(0, 1).unsqueeze(1)  # [B*T, 1, H*W, 3C]
        q, k, v = qkv.chunk(3, dim=-1)  # [B*T, 1, H*W, C]
        h = F.scaled_dot_product_attention(q, k, v).reshape(x.shape)
        return pointwise(self.proj, h).add_(x)


def middle(dim: int) -> nn.ModuleList:
    """The layers at the lowest resolution."""
    return nn.ModuleList([ResidualBlock(dim, dim), Attention(dim), ResidualBlock(dim, dim)])


def resample_time(conv: CausalConv3d | None, x: Tensor, state: Stream) -> Tensor:
    """[B, T, H, W, C] -> T/2 or 2T frames, by conv's stride or its 2C outputs; the first stays."""
    lead = 1 if state.first else 0
    if conv is None or x.shape[1] == lead:
        return x
    y = conv(x[:, lead:], state).add_(conv.bias)  # [B, T/2, H, W, C] or [B, T, H, W, 2C]
    y = y.unflatten(-1, (-1, x.shape[-1]))  # [B, T/2, H, W, 1, C] or [B, T, H, W, 2, C]
    y = y.movedim(-2, 2).flatten(1, 2)  # [B, T/2 or 2T, H, W, C]
    return torch.cat([x[:, :1], y], dim=1) if state.first else y


class Downsample(nn.Module):
    """Halves height and width; if temporal, also the frames behind the video's first one."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(dim, dim, 3, stride=2)})
        self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), (2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, state: Stream) -> Tensor:
        conv = self.resample["1"]
        B, T, H, W, C = x.shape
        x = F.pad(x, (0, 0, 0, 1, 0, 1))  # a column on the right, a row at the bottom
        x = x.flatten(0, 1).movedim(-1, 1)  # [B*T, C, H + 1, W + 1]
        x = F.conv2d(x, conv.weight, stride=2).movedim(1, -1)  # [B*T, H/2, W/2, C]
        x = x.unflatten(0, (B, T)).add_(conv.bias)
        if self.time_conv is not None and state.first:  # its past is this frame, not zeros
            state.history[self.time_conv] = x[:, :1].clone()
        return resample_time(self.time_conv, x, state)


def fold_upsampling(conv: nn.Conv2d) -> Tensor:
    """Weights [4 * C', C, 2, 2] that make conv3x3(nearest 2x of x) four 2x2 convolutions of x.

    Output row 2i + a only sees rows i + a - 1 and i + a of x: if a = 0, the first through kernel
    row 0 and the second through 1 + 2; if a = 1, through 0 + 1 and 2. Columns likewise. The four
    phases (a, b) are channels of one convolution, with 4/9 of the arithmetic.
    """
    weight = conv.weight.float()
    sums = [[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]]  # [a, row of x, kernel row]
    # new_tensor would wait for all that this GPU has to do, and whoever makes the next chunk too.
    sums = torch.tensor(sums, dtype=torch.float32).to(weight.device, non_blocking=True)
    weight = torch.einsum("apu,bqv,oiuv->aboipq", sums, sums, weight).flatten(0, 2)
    return weight.to(conv.weight.dtype, memory_format=torch.channels_last)


@fused
def assemble(phases: Tensor, bias: Tensor, x: Tensor, factor_t: int, first: bool) -> Tensor:
    """The end of an up stage: interleaved phases + bias + shortcut from the stage's input x.

    phases [B*T', H + 1, W + 1, 2, 2, C'], where (a, b) starts at row a and column b, and
    x [B, T, H, W, C] -> [B, T', 2H, 2W, C']. T' = factor_t * T; the video's first latent frame
    makes one frame only.
    """
    B, T, H, W, C = x.shape
    out_dim = phases.shape[-1]
    rows = []
    for a in (0, 1):
        columns = [phases[:, a : a + H, b : b + W, a, b] for b in (0, 1)]
        rows.append(torch.stack(columns, dim=3))  # [B*T', H, W, 2, C']
    y = torch.stack(rows, dim=2)  # [B*T', H, 2, W, 2, C']
    y = y.flatten(3, 4).flatten(1, 2).unflatten(0, (B, -1))  # [B, T', 2H, 2W, C']

    # The shortcut repeats channels, then unfolds them as (channel, time, row, column).
    repeats = out_dim * factor_t * 4 // C
    x = x.unsqueeze(-1).expand(*x.shape, repeats)
    x = x.reshape(B, T, H, W, out_dim, factor_t, 2, 2)
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)  # [B, T, factor_t, H, 2, W, 2, C']
    x = x.flatten(5, 6).flatten(3, 4).flatten(1, 2)  # [B, T * factor_t, 2H, 2W, C']
    if first:
        x = x[:, factor_t - 1 :]  # of the first group, the last frame
    return y + bias + x


class Upsample(nn.Module):
    """Doubles height and width; if temporal, also the frames behind the video's first one."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(dim, dim, 3, padding=1)})
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, state: Stream, shortcut: Tensor) -> Tensor:
        """x [B, T, H, W, C], shortcut: the stage's input -> [B, T', 2H, 2W, C]."""
        x = resample_time(self.time_conv, x, state)
        factor_t = 1 if self.time_conv is None else 2
        conv = self.resample["1"]
        if conv not in state.folded:
            state.folded[conv] = fold_upsampling(conv)
        x = x.flatten(0, 1).movedim(-1, 1)  # [B*T', C, H, W]
        phases = F.conv2d(x, state.folded[conv], padding=1)  # [B*T', 4C, H + 1, W + 1]
        phases = phases.movedim(1, -1).unflatten(-1, (2, 2, -1))
        return assemble(phases, conv.bias, shortcut, factor_t, state.first)


def average_down(x: Tensor, out_dim: int, factor_t: int, factor_s: int) -> Tensor:
    """The shortcut of a down stage: time and space to channels, then means of groups of those."""
    B, T, H, W, C = x.shape
    x = F.pad(x, (0, 0, 0, 0, 0, 0, -T % factor_t, 0))  # zeros before an odd T
    x = x.reshape(B, -1, factor_t, H // factor_s, factor_s, W // factor_s, factor_s, C)
    x = x.permute(0, 1, 3, 5, 7, 2, 4, 6)  # [B, T', H', W', C, factor_t, factor_s, factor_s]
    return x.flatten(4).unflatten(4, (out_dim, -1)).mean(-1)  # [B, T', H', W', out_dim]


class DownStage(nn.Module):
    """Residual blocks and, unless the size stays, a downsample; plus the averaging shortcut."""

    def __init__(self, dim: int, out_dim: int, blocks: int, factor_t: int, factor_s: int):
        super().__init__()
        self.fold = (out_dim, factor_t, factor_s)
        widths = [dim] + [out_dim] * (blocks - 1)
        self.downsamples = nn.ModuleList(ResidualBlock(width, out_dim) for width in widths)
        if factor_s > 1:
            self.downsamples.append(Downsample(out_dim, temporal=factor_t > 1))

    def forward(self, x: Tensor, state: Stream) -> Tensor:
        shortcut = average_down(x, *self.fold)
        for layer in self.downsamples:
            x = layer(x, state)
        return x.add_(shortcut)


class UpStage(nn.Module):
    """Residual blocks and, unless the size stays, an upsample with the duplicating shortcut."""

    def __init__(self, dim: int, out_dim: int, blocks: int, factor_t: int, factor_s: int):
        super().__init__()
        widths = [dim] + [out_dim] * (blocks - 1)
        self.upsamples = nn.ModuleList(ResidualBlock(width, out_dim) for width in widths)
        if factor_s > 1:
            self.upsamples.append(Upsample(out_dim, temporal=factor_t > 1))

    def forward(self, x: Tensor, state: Stream) -> Tensor:
        h = x
        for layer in self.upsamples:
            h = layer(h, state, x) if isinstance(layer, Upsample) else layer(h, state)
        return h


def stages(kind: type, widths: list[int], blocks: int, temporal: tuple[bool, ...]) -> nn.ModuleList:
    """A stage between every two widths: all but the last resample space, and time if temporal."""
    layers = nn.ModuleList()
    for i, resamples_time in enumerate(temporal):
        factor_t = 2 if resamples_time else 1
        layers.append(kind(widths[i], widths[i + 1], blocks, factor_t, factor_s=2))
    layers.append(kind(widths[-2], widths[-1], blocks, factor_t=1, factor_s=1))
    return layers


class Coder(nn.ModuleDict):
    """The encoder or decoder: a convolution, two groups of layers, norm, SiLU, a convolution."""

    def __init__(self, dim: int, widths: list[int], out_dim: int, **groups: nn.ModuleList):
        head = nn.ModuleDict()
        head["0"] = RMSNorm(widths[-1], 1, 1, 1)
        head["2"] = CausalConv3d(widths[-1], out_dim, 3, padding=(0, 1, 1))
        conv1 = CausalConv3d(dim, widths[0], 3, padding=(0, 1, 1))
        super().__init__({"conv1": conv1, **groups, "head": head})

    def forward(self, x: Tensor, state: Stream) -> Tensor:
        conv1, group1, group2, head = self.values()
        *layers, wide, widest = (*group1, *group2)
        norm, conv2 = head.values()

        x = conv1(x, state).add_(conv1.bias)
        for layer in layers:
            x = layer(x, state)

        # The last two leave time as it is, and have the decoder's largest activations.
        parts = []
        for part in x.split(WIDE_FRAMES, dim=1):
            part = wide(part, state)
            part = widest(part, state)
            parts.append(conv2(part, state, norm))
        state.first = False
        return torch.cat(parts, dim=1).add_(conv2.bias)


def space_to_depth(video: Tensor) -> Tensor:
    """[B, 3, T, H, W] -> [B, T, H/2, W/2, 12]; channel = 4 * colour + 2 * column + row."""
    frames = video.movedim(1, 2).mT  # [B, T, 3, W, H], as torch's order is 2 * row + column
    return F.pixel_unshuffle(frames, 2).mT.movedim(2, -1)


def depth_to_space(x: Tensor) -> Tensor:
    """The inverse of `space_to_depth`."""
    frames = x.movedim(-1, 2).mT  # [B, T, 12, W/2, H/2]
    return F.pixel_shuffle(frames, 2).mT.movedim(2, 1)


def check_video(video: Tensor, cfg: VAEConfig) -> None:
    """ValueError for what is no video, or, with the nearest valid sizes, does not come out even."""
    if video.ndim != 5 or video.shape[1] != 3 or not video.is_floating_point():
        given = f"{list(video.shape)}, {video.dtype}"
        raise ValueError(f"video must be floats [B, 3, T, H, W] in [-1, 1], got {given}")
    names = ("frame count", "height", "width")
    axes = zip(names, video.shape[2:], cfg.strides, (1, 0, 0), strict=True)
    for name, size, step, offset in axes:
        if size == 0 or size % step != offset:
            valid = nearest(size, step, offset or step)
            raise ValueError(f"{name} {size} must be {step}k + {offset}; nearest: {valid}")


class VAE22(nn.Module):
    """Encoder and decoder with upstream's parameter names; nothing carries grad.

    In the weights' dtype: bfloat16 is fine for decoding, but encode conditioning images in float32.
    """

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        assert not cfg.temperal_downsample[0], f"the last two up stages must leave time: {cfg}"
        self.cfg = cfg
        # space-to-depth pixels [B, T, H, W, 12] -> mean and log-variance [B, T', H', W', 2 * z_dim]
        widths = [cfg.dim * factor for factor in (1, *cfg.dim_mult)]
        down = stages(DownStage, widths, cfg.num_res_blocks, cfg.temperal_downsample)
        self.encoder = Coder(12, widths, 2 * cfg.z_dim, downsamples=down, middle=middle(widths[-1]))
        self.conv1 = nn.Conv3d(2 * cfg.z_dim, 2 * cfg.z_dim, 1)
        self.conv2 = nn.Conv3d(cfg.z_dim, cfg.z_dim, 1)

        # latents [B, T, H, W, z_dim] -> space-to-depth pixels [B, T', H', W', 12]
        factors = (*cfg.dim_mult, cfg.dim_mult[-1])
        widths = [cfg.dec_dim * factor for factor in reversed(factors)]
        up = stages(UpStage, widths, cfg.num_res_blocks + 1, cfg.temperal_downsample[::-1])
        self.decoder = Coder(cfg.z_dim, widths, 12, middle=middle(widths[0]), upsamples=up)

    def stream(self) -> Stream:
        """State for one video through `decode_chunk`, independent of others."""
        # Lay the weights out channels-last, in place: cuDNN would copy them at every call.
        layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
        for p in self.parameters():
            layout = layouts.get(p.ndim, torch.contiguous_format)
            p.data = p.data.contiguous(memory_format=layout)
        return Stream()

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Pixels in [-1, 1], [B, 3, 1 + 4k, H, W] -> latents [B, z_dim, 1 + k, H/16, W/16].

        Latents are normalised and float32. ValueError for integers and, with valid sizes, shapes.
        """
        check_video(video, self.cfg)
        state = self.stream()
        stride = self.cfg.strides[0]
        first_end = 1 + (ENCODE_FRAMES - 1) * stride  # latent frame 0 is one pixel frame
        cuts = range(first_end, video.shape[2], ENCODE_FRAMES * stride)
        parts = []
        for chunk in video.tensor_split(list(cuts), dim=2):
            x = space_to_depth(chunk.to(self.conv1.weight.dtype))
            x = self.encoder(x, state)
            parts.append(pointwise(self.conv1, x))

        mean = torch.cat(parts, dim=1)[..., : self.cfg.z_dim].float()  # the rest: log-variance
        latent = (mean - mean.new_tensor(LATENT_MEAN)) / mean.new_tensor(LATENT_STD)
        return latent.movedim(-1, 1).contiguous()

    def decode(self, latent: Tensor) -> Tensor:
        """The pixels of a whole video from its latents [B, z_dim, T, H, W]: see `decode_chunk`."""
        return self.decode_chunk(latent, self.stream())

    @torch.no_grad()
    def decode_chunk(self, latent: Tensor, state: Stream) -> Tensor:
        """Normalised latents [B, z_dim, T, H, W], the next of a stream -> [B, 3, 4T, 16H, 16W].

        The stream's first call makes 1 + 4(T - 1) frames. Pixels are about [-1, 1], not clamped, in
        the weights' dtype, and the same however a video is cut. ValueError for other shapes.
        """
        z_dim = self.cfg.z_dim
        if latent.ndim != 5 or latent.shape[1] != z_dim or 0 in latent.shape:
            raise ValueError(f"latent must be [B, {z_dim}, T, H, W], got {list(latent.shape)}")
        z = latent.movedim(1, -1).float()
        statistics = torch.tensor([LATENT_MEAN, LATENT_STD])
        mean, std = statistics.to(z.device, non_blocking=True)  # new_tensor would wait
        z = (z * std + mean).to(self.conv2.weight.dtype)
        parts = []
        for part in z.split(DECODE_FRAMES, dim=1):
            x = self.decoder(pointwise(self.conv2, part), state)
            parts.append(depth_to_space(x))
        return torch.cat(parts, dim=2)
