"""Seconds and memory of the recipes in configs/sample, on random weights of the 5B.

    python tools/bench_recipes.py --recipe longlive2 fastwan turbo wan22    # each one's own length
    python tools/bench_recipes.py --recipe longlive2 --low-memory --frames 189
    python tools/bench_recipes.py --recipe fastwan --preset tiny --device cpu --geometry 64x96 \\
        --frames 9

Text to video, decoded into host memory, without text encoder and mp4, in the order that sample.py
has. `python tools/bench.py --recipe ...` is the same.
"""

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from wan5b import fuse
from wan5b.dit import PRESETS, WanDiT
from wan5b.extras import graphs
from wan5b.extras.budget import GIB
from wan5b.extras.cli import DEVICES, script
from wan5b.extras.plan import describe, how_sampled
from wan5b.extras.random_weights import random_context, random_dit, random_vae
from wan5b.extras.recipes import Recipe, load
from wan5b.extras.sampling import generate
from wan5b.kvcache import KVCache
from wan5b.media import to_frames
from wan5b.vae22 import VAE22

HEADER = f"{'':20}{'frames':>8}{'s':>9}{'fps':>8}{'first':>9}{'DiT':>9}{'GiB':>8}"


class Figures(NamedTuple):
    """Of one clip, in seconds."""

    whole: float
    first: float  # until the first frames are in host memory
    latents: float  # until the last latents are there; with --low-memory decoding begins then


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--recipe", nargs="+", required=True, help="names in configs/sample, or TOMLs")
    add("--geometry", default="704x1280", help="height and width in pixels")
    add("--frames", type=int, help="pixel frames, 4k + 1 (default: the recipe's)")
    add("--low-memory", action="store_true", help="decode when the DiT is gone")
    add("--compile", action="store_true", help="fused operations and CUDA graphs")
    add("--repeats", type=int, default=1, help="clips of which the median is taken")
    add("--preset", default="ti2v-5B", choices=["ti2v-5B", "tiny"])
    add("--device", default=DEVICES[0], choices=DEVICES)
    return parser.parse_args(argv)


def now(device: str) -> float:
    """Seconds of a clock, when all that was asked of the device is done."""
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def clip(
    model: WanDiT, vae: VAE22, shape: tuple[int, ...], sampler: dict, low_memory: bool
) -> Figures:
    """Make a clip, as sample.py does. With low_memory the model is gone afterwards.

    shape: of the latents, [1, C, T, H, W]. sampler: arguments of `generate`.
    """
    cfg = model.cfg
    like = model.patch_embedding.weight
    device = str(like.device)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    context = random_context(["a red fox", ""], cfg.text_len, cfg.text_dim)
    context = context.to(device, like.dtype)

    # Chunks are decoded while the next ones are made; with low_memory all of them at the end.
    start = now(device)
    made = generate(model, noise, context, **sampler)
    if low_memory:
        made = [chunk.cpu() for chunk in made]
        model.to("meta")
        if device != "cpu":
            torch.cuda.empty_cache()
    latents = first = now(device)
    state = vae.stream()
    for i, chunk in enumerate(made):
        if not low_memory:
            latents = now(device)
        to_frames(vae.decode_chunk(chunk.to(device), state)[0]).cpu()
        if i == 0:
            first = now(device)
    return Figures(now(device) - start, first - start, latents - start)


def measure(args: argparse.Namespace, name: str, recipe: Recipe) -> str:
    """A line of the table: medians of args.repeats clips, behind one that is not counted."""
    height, width = (int(side) // 16 for side in args.geometry.split("x"))
    given = argparse.Namespace(frames=args.frames, image=None)
    sampler = how_sampled(given, recipe, prefix=0)
    if not args.low_memory:
        sampler["new_cache"] = functools.cache(KVCache)  # one for all clips, and its CUDA graphs
    frames = sum(sampler["chunks"])
    shape = (1, PRESETS[args.preset].in_dim, frames, height, width)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    fuse.enable(args.compile)

    # The clips. With --low-memory each needs a new model, since the one before has lost its.
    vae = random_vae(args.preset, args.device).to(dtype)
    model = None
    runs = []
    peak = 0
    for i in range(args.repeats + 1):
        if model is None or args.low_memory:
            model = random_dit(args.preset, args.device, dtype)
            if args.compile and args.device != "cpu":
                graphs.record(model)
        # The first clip, which is not counted, has one level: kernels are chosen, or compiled.
        levels = sampler["sigmas"] if i else [sampler["sigmas"][0], 0.0]
        if args.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        figures = clip(model, vae, shape, sampler | {"sigmas": levels}, args.low_memory)
        if i:
            runs.append(figures)
        if args.device != "cpu":
            peak = max(peak, torch.cuda.max_memory_allocated())

    # The line.
    pixels = 4 * frames - 3
    whole, first, latents = (statistics.median(times) for times in zip(*runs, strict=True))
    memory = f"{peak / GIB:8.1f}" if peak else f"{'-':>8}"
    times = f"{whole:9.2f}{pixels / whole:8.2f}{first:9.2f}{latents:9.2f}"
    return f"{name:20}{pixels:8}{times}{memory}  {describe(recipe, sampler)}"


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    # What is wrong with one of them ends the call here.
    recipes = {name: load(name) for name in args.recipe}
    for recipe in recipes.values():
        how_sampled(argparse.Namespace(frames=args.frames, image=None), recipe, prefix=0)

    where = "CPU" if args.device == "cpu" else torch.cuda.get_device_name(args.device)
    print(f"{where}, torch {torch.__version__}, {vars(args)}")
    print(HEADER, flush=True)
    for name, recipe in recipes.items():
        print(measure(args, Path(name).stem, recipe), flush=True)


if __name__ == "__main__":
    script(main)
