"""The float8 decoder. On a CPU its kernels are those of fp8_reference.py, exact but for their
roundings; on a GPU these are held against Triton's.
"""

import copy
import math
import sys
from pathlib import Path

import fp8_reference
import pytest
import torch
import torch.nn.functional as F
from common import compiling, gpu, randn, rel

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import bench_vae

from wan5b import extras
from wan5b.extras import fp8_vae
from wan5b.extras.codec import LinearCodec
from wan5b.extras.fp8 import FP8, LARGEST
from wan5b.extras.fp8_vae import Fp8Conv, Fp8ResidualBlock, quantize_decoder
from wan5b.extras.random_weights import random_vae
from wan5b.vae22 import VAE22, CausalConv3d, ResidualBlock, RMSNorm, Stream, VAEConfig

STEP = 2**-4  # half a step of e4m3, relative


@pytest.fixture
def on_cpu(monkeypatch):
    """quantize_decoder works, with the reference in the kernels' place."""
    monkeypatch.setattr(extras, "fp8_kernels", fp8_reference, raising=False)
    monkeypatch.setattr(fp8_vae, "check", lambda vae: None)


def uneven(vae: VAE22) -> VAE22:
    """With norms of which no two channels are alike."""
    draws = torch.Generator().manual_seed(1)
    for name, p in vae.named_parameters():
        if name.endswith("gamma"):
            p.data = torch.rand(p.shape, generator=draws).to(p) + 0.5
    return vae


def decode_in(vae: VAE22, latent: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    state = vae.stream()
    return torch.cat([vae.decode_chunk(z, state) for z in latent.split(sizes, 2)], 2)


def padded(frames: torch.Tensor) -> torch.Tensor:
    """[..., W, C] float8 with the column of zeros behind it."""
    return F.pad(frames, (0, 0, 0, 1)).to(FP8)


# ------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 4), (5, 7)], ids=str)
def test_a_convolution_is_a_product_over_shifted_rows(size):
    """Exactly: small whole numbers, which float8 and float64 hold."""
    whole = torch.Generator().manual_seed(0)

    def numbers(*shape):
        return torch.randint(-8, 9, shape, generator=whole).double()

    x = numbers(2, 5, *size, 4)
    weight = numbers(6, 4, 3, 3, 3)
    bias = numbers(6)
    residual = numbers(2, 3, *size, 6)
    taps = weight.permute(2, 3, 4, 0, 1).flatten(0, 3).to(FP8)
    y = fp8_reference.convolve(padded(x), taps, torch.full((6,), 0.5), bias, residual)
    expected = F.conv3d(x.movedim(-1, 1), weight / 2, bias, padding=(0, 1, 1)).movedim(1, -1)
    assert torch.equal(y, expected + residual)


def test_rounding_of_weights():
    """Each output channel to half a step on its own scale, its largest value exactly."""
    weight = randn(5, 4, 3, 3, 3) * torch.logspace(-6, 6, 5).view(-1, 1, 1, 1, 1)
    weight[2] = 0
    taps, scale = fp8_vae.round_weight(weight)
    assert taps.dtype == FP8
    assert taps.is_contiguous()
    again = taps.float().view(3, 3, 3, 5, 4).permute(3, 4, 0, 1, 2) * scale.view(-1, 1, 1, 1, 1)
    smallest = scale.view(-1, 1, 1, 1, 1) * 2**-10  # half the distance of numbers around 0
    error = (again - weight).abs()
    assert (error <= torch.maximum(weight.abs() * STEP, smallest) * 1.001).all()
    peaks = again.abs().amax((1, 2, 3, 4)), weight.abs().amax((1, 2, 3, 4))
    assert torch.allclose(*peaks, rtol=1e-6)


@torch.no_grad()
def test_no_input_is_too_large_for_its_scale(on_cpu):
    """The largest value there can be, alone in its pixel, becomes the largest float8."""
    norm = RMSNorm(16, 1, 1, 1)
    norm.gamma.data = torch.rand(16, 1, 1, 1, generator=torch.Generator().manual_seed(0)) * 40
    conv = Fp8Conv(norm, CausalConv3d(16, 4, 3, padding=(0, 1, 1)))
    x = torch.zeros(1, 1, 3, 17, 16)
    x[0, 0, 0, torch.arange(16), torch.arange(16)] = 1e5
    x[0, 0, 1] = randn(17, 16)
    state = Stream()
    conv(x, state)
    seen = state.history[conv][:, 1].float()  # [1, 3, 18, 16]

    exact = F.silu(norm(x[:, 0])) * conv.input_scale
    assert seen.max() == LARGEST
    assert exact.max().item() == pytest.approx(LARGEST)
    assert (seen[:, :, 17] == 0).all()
    assert (seen[0, 2] == 0).all()
    error = (seen[:, :, :17] - exact).abs()
    assert (error <= torch.maximum(exact.abs() * STEP, torch.tensor(2**-10)) * 1.001).all()


# ----------------------------------------------------------------------------------------- decoder


@pytest.fixture
def exact():
    return uneven(VAE22(VAEConfig(dim=8, dec_dim=4))).double()


def test_decoded_frames(exact, on_cpu):
    """They are the decoder's, but for float8's error; and the same however a video is cut."""
    quantized = quantize_decoder(copy.deepcopy(exact))
    latent = randn(2, 48, 5, 2, 3)
    video = quantized.decode(latent)
    error = rel(video, exact.decode(latent))
    print(error)
    assert 1e-2 < error < 0.15  # 14 convolutions at 4e-2 each, in residual branches
    for sizes in ([1] * 5, [3, 2], [1, 4], [5]):
        assert rel(decode_in(quantized, latent, sizes), video) < 1e-12


def test_streams_are_independent(exact, on_cpu):
    vae = quantize_decoder(exact)
    videos = randn(2, 1, 48, 4, 2, 2)
    states = [vae.stream(), vae.stream()]
    parts = [[], []]
    for chunk in range(2):
        for video, state, made in zip(videos, states, parts, strict=True):
            made.append(vae.decode_chunk(video[:, :, 2 * chunk : 2 * chunk + 2], state))
    for video, made in zip(videos, parts, strict=True):
        assert torch.equal(torch.cat(made, 2), decode_in(vae, video, [2, 2]))


def test_what_is_replaced(on_cpu):
    """The residual blocks of the up stages; all else is the same tensors."""
    vae = random_vae("tiny", "cpu").bfloat16()
    before = dict(vae.named_parameters())
    size = sum(p.nbytes for p in vae.decoder["upsamples"].parameters())
    assert quantize_decoder(vae) is vae
    after = dict(vae.named_parameters())
    for name, p in before.items():
        if name in after:
            assert after[name] is p
        else:
            assert name.startswith("decoder.upsamples.")
            assert ".residual." in name or ".shortcut." in name
    for stage in vae.decoder["upsamples"]:
        blocks = [layer for layer in stage.upsamples if not hasattr(layer, "resample")]
        assert len(blocks) == 3
        assert all(isinstance(block, Fp8ResidualBlock) for block in blocks)
    assert any(isinstance(layer, ResidualBlock) for layer in vae.decoder["middle"])
    assert sum(p.nbytes for p in vae.decoder["upsamples"].parameters()) < 0.7 * size

    # Once more there is nothing left to do.
    quantize_decoder(vae)
    assert dict(vae.named_parameters()).keys() == after.keys()


def test_refusals():
    """One line, and the VAE stays as it was."""
    vae = random_vae("tiny", "cpu").bfloat16()
    with pytest.raises(ValueError, match=r"needs a Hopper GPU .* not cpu: leave out --fp8-vae$"):
        quantize_decoder(vae)
    assert not any(isinstance(module, Fp8Conv) for module in vae.modules())
    with pytest.raises(ValueError, match="Wan2.2 VAE, not a LinearCodec"):
        quantize_decoder(LinearCodec(VAEConfig()))


# ---------------------------------------------------------------------------- tools/bench_vae.py


def test_frame_errors():
    """Three chunks; one frame off by a tenth, one at a seam by a fifth."""
    video = randn(1, 3, 33, 4, 4)
    other = video.clone()
    other[:, :, 2] *= 1.1
    other[:, :, 9] *= 1.2
    mean, worst, seams, _, psnr = map(float, bench_vae.frame_errors(other, video).split())
    assert (mean, worst, seams) == (0.0091, 0.2, 0.1)
    lowest = 20 * math.log10(4 * video.std() / (0.2 * video[:, :, 9].square().mean().sqrt()))
    assert psnr == pytest.approx(lowest, abs=0.06)


def test_bench_vae(on_cpu, capsys):
    """What it prints: errors of frames, and of 24 convolutions, each as two roundings make it."""
    options = ["--preset=tiny", "--device=cpu", "--geometry=32x64", "--frames=21"]
    with compiling():
        bench_vae.main(options)
    _, *lines = capsys.readouterr().out.splitlines()
    errors = {" ".join(line.split()[:2]): float(line.split()[2]) for line in lines[:4]}
    assert errors.keys() == {f"{x} {y}" for x in ("clip", "noise") for y in ("bfloat16", "float8")}
    for name in ("clip", "noise"):
        assert errors[f"{name} bfloat16"] < 0.03 < errors[f"{name} float8"] < 0.15
    found = [line.rpartition(": ")[2].split() for line in lines[4:8]]
    assert [len(stage) for stage in found] == [6] * 4
    for error in sum(found, []):
        assert 0.02 < float(error) < 0.06


# --------------------------------------------------------------------------------------------- GPU


@pytest.fixture
def kernels():
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    from wan5b.extras import fp8_kernels

    return fp8_kernels


SHAPES = [(2, 3, 11, 21, 64, 192), (1, 2, 13, 20, 256, 256), (1, 1, 9, 16, 1024, 512)]


@gpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_kernels(kernels, shape):
    """As in float64 but for the result's bfloat16 (2e-3) and the sums, which have about 14 bits.

    New memory may hold NaN: none may be read.
    """
    B, T, H, W, C, N = shape
    x = randn(B, T, H, W + 2, C).cuda().bfloat16()[:, :, :, :W]
    x[:, :, 0, 0] = 0
    gamma = (randn(C, seed=1).abs() + 0.1).cuda().bfloat16()
    scale = LARGEST / (C**0.5 * gamma.max().item())
    buffer = torch.full((B, 2 + T, H, W + 1, C), 127, dtype=torch.uint8, device="cuda").view(FP8)
    buffer[:, :2] = padded(randn(B, 2, H, W, C, seed=2)).cuda()
    mine = buffer.clone()
    kernels.norm_silu(buffer[:, 2:], x, gamma, scale)
    fp8_reference.norm_silu(mine[:, 2:], x, gamma, scale)
    same = (buffer.float() == mine.float()).float().mean().item()
    assert same > 0.9999
    assert rel(buffer.float(), mine.float()) < 1e-3

    taps, weight_scale = fp8_vae.round_weight(randn(N, C, 3, 3, 3, seed=3).cuda())
    bias = randn(N, seed=4).cuda().bfloat16()
    residual = randn(B, T, H, W, N, seed=5).cuda().bfloat16()
    for plus in (None, residual):
        y = kernels.convolve(mine, taps, weight_scale / scale, bias, plus)
        expected = fp8_reference.convolve(mine, taps, weight_scale / scale, bias.double(), plus)
        error = rel(y, expected)
        print(error)
        assert error < 5e-3


@gpu
@torch.no_grad()
def test_decoder_on_the_gpu(kernels):
    """Against float32 on a narrow VAE; a block is the same, bit for bit, however a video is cut."""
    exact = uneven(VAE22(VAEConfig(dim=8, dec_dim=64))).cuda()
    half = copy.deepcopy(exact).bfloat16()
    quantized = quantize_decoder(copy.deepcopy(half))
    latent = randn(1, 48, 5, 4, 6).cuda()
    video = exact.decode(latent)
    errors = rel(half.decode(latent), video), rel(quantized.decode(latent), video)
    print(errors)
    assert errors[1] < 0.15

    # The bfloat16 parts are rounded otherwise for other numbers of frames, and float8 makes more of
    # that, so the whole decoder is only held to its error.
    for sizes in ([1] * 5, [2, 3]):
        assert rel(decode_in(quantized, latent, sizes), video) < 0.15
    block = quantized.decoder["upsamples"][2].upsamples[1]
    x = randn(2, 5, 11, 13, 128).cuda().bfloat16()

    def through(sizes):
        state = Stream()
        return torch.cat([block(part, state) for part in x.split(sizes, 1)], 1)

    for sizes in ([1] * 5, [2, 3], [4, 1]):
        assert torch.equal(through(sizes), through([5]))


@gpu
def test_refusals_on_the_gpu(kernels):
    vae = random_vae("tiny", "cuda")
    with pytest.raises(ValueError, match="needs bfloat16, not torch.float32"):
        quantize_decoder(vae)
    with pytest.raises(ValueError, match=r"multiples of 64, not \[8, 8, 16, 32, 32\]"):
        quantize_decoder(vae.bfloat16())
