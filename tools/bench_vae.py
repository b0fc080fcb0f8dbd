"""What float8 does to decoded frames: the VAE's decoder in bfloat16 and in float8 against float32.

    python tools/bench_vae.py                                      # random weights
    python tools/bench_vae.py --release Wan2.2-TI2V-5B             # real ones, a drawn clip
    python tools/bench_vae.py --release Wan2.2-TI2V-5B --video clip.mp4

One Hopper GPU. Decodes the latents of a clip, and noise as latents, in chunks of 3. Of every frame
the relative error and the PSNR, with a peak of four standard deviations of what float32 gives: a
picture in [-1, 1] has about that range. A seam is where a chunk begins. "cut" is the difference
that chunks of 1 make, for which libraries choose other algorithms. Then the error of each
convolution by itself on the clip, and seconds and memory.
"""

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench import relative, seconds

from wan5b.extras import compiler
from wan5b.extras.budget import GIB
from wan5b.extras.cli import DEVICES, script
from wan5b.extras.formats import load_vae
from wan5b.extras.fp8_vae import Fp8Conv, quantize_decoder
from wan5b.extras.framing import fit
from wan5b.extras.pictures import read_video
from wan5b.extras.random_weights import random_vae
from wan5b.vae22 import VAE22, ResidualBlock

CHUNK = 3  # latent frames
HEADER = f"{'':20}{'error':>9}{'worst':>9}{'seams':>9}{'PSNR':>7}{'worst':>7}{'cut':>9}"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--release", help="folder or file with a VAE (default: random weights)")
    add("--preset", default="ti2v-5B", choices=["ti2v-5B", "tiny"], help="of random weights")
    add("--video", help="the clip (default: a drawn one)")
    add("--geometry", default="704x1280", help="height and width in pixels")
    add("--frames", type=int, default=45, help="pixel frames, 4k + 1")
    add("--compile", action="store_true", help="fused operations")
    add("--device", default=DEVICES[0], choices=DEVICES)
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------- clips


def drawn(frames: int, height: int, width: int) -> Tensor:
    """A clip [1, 3, T, H, W] in [-1, 1]: a slope of colours, sharp stripes, a moving disc."""
    y = torch.linspace(-1, 1, height).unsqueeze(1)
    x = torch.linspace(-1, 1, width).unsqueeze(0)
    clip = []
    for t in range(frames):
        slope = torch.sin(3 * x + 0.1 * t) * torch.cos(2 * y)
        disc = torch.where((x - 0.01 * t) ** 2 + y**2 < 0.2, 0.7, -0.7)
        stripes = torch.where(torch.sin(20 * x + 7 * y + 0.2 * t) > 0, y, -y) / 2
        clip.append(torch.stack([slope, disc, stripes]))
    return torch.stack(clip, dim=1)[None]


def latents(vae: VAE22, video: Tensor) -> dict[str, Tensor]:
    """Those of the clip and, of the same shape, noise."""
    clip = vae.encode(video)
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    return {"clip": clip, "noise": noise.to(clip.device)}


def decode(vae: VAE22, latent: Tensor, chunk: int = CHUNK) -> Tensor:
    """Chunk by chunk, as a sampler does; the frames in host memory, in the VAE's dtype."""
    state = vae.stream()
    return torch.cat([vae.decode_chunk(z, state).cpu() for z in latent.split(chunk, 2)], 2)


# ------------------------------------------------------------------------------------------ errors


def frame_errors(video: Tensor, expected: Tensor) -> str:
    """Of all frames, the worst and the mean of those at seams: relative error and PSNR."""
    errors = []
    ratios = []
    peak = 4 * expected.float().std().item()
    for frame, exact in zip(video.unbind(2), expected.unbind(2), strict=True):
        exact = exact.float()
        error = frame.float() - exact
        errors.append((error.norm() / exact.norm()).item())
        ratios.append(20 * math.log10(peak / max(error.square().mean().sqrt().item(), 1e-12)))
    seams = errors[4 * CHUNK - 3 :: 4 * CHUNK] or [math.nan]  # the first latent frame is one frame
    figures = f"{statistics.mean(errors):9.1e}{max(errors):9.1e}{statistics.mean(seams):9.1e}"
    return f"{figures}{statistics.mean(ratios):7.1f}{min(ratios):7.1f}"


def layer_errors(vae: VAE22, quantized: VAE22, latent: Tensor) -> dict[str, float]:
    """Name -> relative error of each float8 convolution on what it gets for a first chunk.

    Against float32 on the same input, without the residual, in the last frame.
    """
    exact = dict(vae.decoder.named_modules())
    found = {}

    def listen(name: str, block: ResidualBlock) -> Callable:
        norm1, conv1, norm2, conv2 = block.residual.values()
        norm, conv = (norm1, conv1) if name.endswith("conv1") else (norm2, conv2)

        def compare(_, args, kwargs, out: Tensor) -> None:
            x, _ = args
            if name in found:
                return
            # The last of three frames; zeros before the video.
            h = F.silu(norm(x[:, -3:].float())).movedim(-1, 1)
            h = F.pad(h, (0, 0, 0, 0, 3 - h.shape[2], 0))
            expected = F.conv3d(h, conv.weight, conv.bias, padding=(0, 1, 1)).movedim(1, -1)
            y = out[:, -1:].float()
            residual = kwargs.get("residual")
            if residual is not None:
                y = y - residual[:, -1:].float()
            found[name] = ((y - expected).norm() / expected.norm()).item()

        return compare

    hooks = []
    for name, module in quantized.decoder.named_modules():
        if isinstance(module, Fp8Conv):
            block = exact[name.rpartition(".")[0]]
            hooks.append(module.register_forward_hook(listen(name, block), with_kwargs=True))
    quantized.decode_chunk(latent[:, :, :CHUNK], quantized.stream())
    for hook in hooks:
        hook.remove()
    return found


# -------------------------------------------------------------------------------------------- main


def speed(vae: VAE22, latent: Tensor) -> str:
    """Of decoding on the GPU, compiled if fuse.py is enabled."""

    def run() -> None:
        state = vae.stream()
        for z in latent.split(CHUNK, 2):
            vae.decode_chunk(z, state)

    run()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    whole = seconds(run, 3, 0)
    peak = torch.cuda.max_memory_allocated() - before
    return f"{whole:.3f} s, {(4 * latent.shape[2] - 3) / whole:.1f} fps, {peak / GIB:.2f} GiB"


def clip_of(args: argparse.Namespace) -> Tensor:
    """The clip [1, 3, T, H, W] that the options name, in [-1, 1]."""
    height, width = (int(side) for side in args.geometry.split("x"))
    if args.video:
        return fit(read_video(args.video, last=args.frames), height, width)[None]
    return drawn(args.frames, height, width)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    start = time.perf_counter()
    video = clip_of(args).to(args.device)
    if args.release:
        vae = load_vae(args.release, args.device, torch.float32)
    else:
        vae = random_vae(args.preset, args.device)
    half = copy.deepcopy(vae).to(torch.bfloat16)
    quantized = quantize_decoder(copy.deepcopy(half))

    # What float32 makes of them, first of all: it is not to be compiled.
    given = latents(vae, video)
    expected = {name: decode(vae, latent) for name, latent in given.items()}
    compiler.enable(args.compile)
    print(HEADER)
    for name, latent in given.items():
        for dtype, network in (("bfloat16", half), ("float8", quantized)):
            frames = decode(network, latent)
            cut = relative(decode(network, latent, 1).float(), frames.float())
            print(f"{name + ' ' + dtype:20}{frame_errors(frames, expected[name])}{cut:9.1e}")

    compiler.enable(False)
    by_stage = {}
    for name, error in layer_errors(vae, quantized, given["clip"]).items():
        by_stage.setdefault(name.split(".upsamples.")[0], []).append(error)
    for stage, errors in by_stage.items():
        shown = " ".join(f"{error:.1e}" for error in errors)
        print(f"convolutions of {stage}: {shown}")

    if args.device != "cpu":
        compiler.enable(args.compile)
        for dtype, network in (("bfloat16", half), ("float8", quantized)):
            print(f"{dtype}: {speed(network, given['noise'])}")
    print(f"{vars(args)}; {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    script(main)
