"""Seconds and memory of the recipes in configs/sample, on random weights of the 5B.

    python tools/bench_recipes.py --recipe longlive2 fastwan turbo wan22    # each one's own length
    python tools/bench_recipes.py --recipe longlive2 --compile --fp8 --fp8-vae --fp8-attention
    python tools/bench_recipes.py --recipe longlive2 --low-memory --frames 189
    python tools/bench_recipes.py --recipe fastwan --preset tiny --device cpu --geometry 64x96 \\
        --frames 9

Text to video, decoded into host memory, without text encoder and mp4, in the order that sample.py
has. In seconds: the DiT alone, the VAE alone, both; until the first frames are there; p50 and p99
of the times between one chunk's frames and the next one's. GiB: the most in use, of all GPUs.
`python tools/bench.py --recipe ...` is the same.
"""

import argparse
import functools
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from wan5b.dit import PRESETS, WanDiT
from wan5b.extras import compiler, fp8_attention, graphs
from wan5b.extras.budget import GIB
from wan5b.extras.cards import carried, decode, place_of, place_of_vae
from wan5b.extras.cli import DEVICES, script
from wan5b.extras.fp8 import quantize_blocks
from wan5b.extras.fp8_vae import quantize_decoder
from wan5b.extras.plan import describe, how_sampled
from wan5b.extras.random_weights import random_context, random_dit, random_vae
from wan5b.extras.recipes import Recipe, load
from wan5b.extras.sampling import generate
from wan5b.vae22 import VAE22

COLUMNS = ("frames", "DiT", "VAE", "both", "fps", "first", "p50", "p99", "GiB")
HEADER = " " * 20 + "".join(f"{name:>8}" for name in COLUMNS)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--recipe", nargs="+", required=True, help="names in configs/sample, or TOMLs")
    add("--geometry", default="704x1280", help="height and width in pixels")
    add("--frames", type=int, help="pixel frames, 4k + 1 (default: the recipe's)")
    add("--low-memory", action="store_true", help="decode when the DiT is gone")
    add("--compile", action="store_true", help="fused operations and CUDA graphs")
    add("--fp8", action="store_true", help="linear layers of the DiT in float8")
    add("--fp8-vae", action="store_true", help="the decoder's convolutions in float8")
    add("--fp8-attention", action="store_true", help="self-attention and its memory in float8")
    add("--repeats", type=int, default=1, help="clips of which the median is taken")
    add("--preset", default="ti2v-5B", choices=["ti2v-5B", "tiny"])
    add("--device", default=DEVICES[0], choices=DEVICES)
    add("--vae-device", choices=DEVICES, help="where the VAE works (default: there too)")
    args = parser.parse_args(argv)
    if (args.fp8 or args.fp8_vae) and args.device == "cpu":
        raise ValueError("--fp8 and --fp8-vae need a GPU: leave them out, or name a --device")
    return args


class Figures(NamedTuple):
    """Of one clip, in seconds."""

    dit: float  # for all latents, undecoded
    vae: float  # for decoding them
    marks: list[float]  # both at once: from the start until each chunk's frames are on the host


class Clock:
    """Times at which devices are done with what was asked of them so far; nobody waits for it."""

    def __init__(self, *devices: torch.device):
        """It begins now, when all these have come to rest."""
        self.cards = {device for device in devices if device.type == "cuda"}
        self._rest()
        self.begun = time.perf_counter()
        self.events = {card: self.mark(card) for card in self.cards}
        self.marks = []  # (device, event or time)

    def mark(self, device: torch.device) -> torch.cuda.Event | float:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    def stamp(self, device: torch.device) -> None:
        self.marks.append((device, self.mark(device)))

    def seconds(self) -> list[float]:
        """From the beginning to each stamp."""
        self._rest()
        times = []
        for device, mark in self.marks:
            if device in self.cards:
                times.append(self.events[device].elapsed_time(mark) / 1000)
            else:
                times.append(mark - self.begun)
        return times

    def _rest(self) -> None:
        for card in self.cards:
            torch.cuda.synchronize(card)


def make(model: WanDiT, noise: Tensor, context: Tensor, sampler: dict) -> tuple[list, list[float]]:
    """A clip's latents, chunk by chunk, and the seconds at which each is there."""
    clock = Clock(place_of(model))
    chunks = []
    for chunk in generate(model, noise, context, **sampler):
        chunks.append(chunk)
        clock.stamp(chunk.device)
    return chunks, clock.seconds()


def show(vae: VAE22, chunks: Iterable[Tensor], clock: Clock) -> list[float]:
    """Decode chunks, which may be made meanwhile, into host memory -> seconds of each."""
    place = place_of(vae)
    state = vae.stream()
    waiting = deque()  # two chunks of frames, as there are on their way into an mp4
    for chunk in carried(chunks, place):
        waiting.append(decode(vae, chunk, state))
        clock.stamp(place)
        if len(waiting) > 2:
            waiting.popleft().wait()
    for decoded in waiting:
        decoded.wait()
    return clock.seconds()


def play(
    model: WanDiT, vae: VAE22, noise: Tensor, context: Tensor, sampler: dict, low_memory: bool
) -> list[float]:
    """Make a clip as sample.py does -> the seconds at which each chunk's frames are on the host.

    Chunks are decoded while the next ones are made, or with low_memory when the model is gone,
    which it is afterwards. noise: [1, C, T, H, W]. sampler: arguments of `generate`.
    """
    place = place_of(model)
    clock = Clock(place, place_of(vae))
    latents = generate(model, noise, context, **sampler)
    if low_memory:
        latents = [chunk.cpu() for chunk in latents]
        model.to("meta")
        if place.type == "cuda":
            torch.cuda.empty_cache()
    return show(vae, latents, clock)


def dtype_of(args: argparse.Namespace) -> torch.dtype:
    """Of the networks."""
    return torch.float32 if args.device == "cpu" else torch.bfloat16


def networks(args: argparse.Namespace) -> tuple[WanDiT, VAE22]:
    """With random weights, as fast as the options make them."""
    dtype = dtype_of(args)
    vae = random_vae(args.preset, place_of_vae(args)).to(dtype)
    model = random_dit(args.preset, args.device, dtype)
    if args.fp8_vae:
        quantize_decoder(vae)
    if args.fp8:
        quantize_blocks(model)
    compiler.enable(args.compile)
    if args.compile and args.device != "cpu":
        graphs.record(model)
    return model, vae


def measure(args: argparse.Namespace, name: str, recipe: Recipe) -> str:
    """A line of the table: medians of args.repeats clips, behind one that is not counted."""
    height, width = (int(side) // 16 for side in args.geometry.split("x"))
    given = argparse.Namespace(frames=args.frames, image=None)
    sampler = how_sampled(given, recipe, prefix=0)
    sampler["new_cache"] = fp8_attention.kind_of_cache(args)
    if not args.low_memory:
        # One for all clips, and its CUDA graphs.
        sampler["new_cache"] = functools.cache(sampler["new_cache"])
    frames = sum(sampler["chunks"])
    cfg = PRESETS[args.preset]
    shape = (1, cfg.in_dim, frames, height, width)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    context = random_context(["a red fox", ""], cfg.text_len, cfg.text_dim)

    # The clips. With --low-memory each needs a new model, since the one before has lost its.
    model = None
    runs = []
    for i in range(args.repeats + 1):
        if model is None or args.low_memory:
            model, vae = networks(args)
        # The first clip, which is not counted, has one level: kernels are chosen, or compiled.
        levels = sampler["sigmas"] if i else [sampler["sigmas"][0], 0.0]
        how = sampler | {"sigmas": levels}
        like = model.patch_embedding.weight
        inputs = (noise, context.to(like), how)
        if i == 0:
            play(model, vae, *inputs, args.low_memory)
            if like.is_cuda:
                forget_peaks()
            continue

        # The parts alone, then both.
        chunks, made = make(model, *inputs)
        shown = show(vae, chunks, Clock(place_of(vae)))
        del chunks
        marks = play(model, vae, *inputs, args.low_memory)
        runs.append(Figures(made[-1], shown[-1], marks))
    return row(name, runs, 4 * frames - 3, describe(recipe, sampler))


def forget_peaks() -> None:
    for card in range(torch.cuda.device_count()):
        torch.cuda.reset_peak_memory_stats(card)


def peaks() -> int:
    """Bytes: the most that each GPU held since then, summed up."""
    return sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))


def row(name: str, runs: list[Figures], pixels: int, how: str) -> str:
    """A line of the table, of clips of so many pixel frames."""
    dit = statistics.median(run.dit for run in runs)
    vae = statistics.median(run.vae for run in runs)
    both = statistics.median(run.marks[-1] for run in runs)
    first = statistics.median(run.marks[0] for run in runs)
    later = [b - a for run in runs for a, b in pairwise(run.marks)]
    shares = [f"{share(later, q):8.3f}" if later else f"{'-':>8}" for q in (0.5, 0.99)]
    peak = peaks() if torch.cuda.is_available() else 0
    memory = f"{peak / GIB:8.1f}" if peak else f"{'-':>8}"
    times = f"{dit:8.2f}{vae:8.2f}{both:8.2f}{pixels / both:8.2f}{first:8.2f}"
    return f"{name:20}{pixels:8}{times}{''.join(shares)}{memory}  {how}"


def share(values: list[float], q: float) -> float:
    """The smallest of the values that at least this share of them is not above."""
    return sorted(values)[math.ceil(q * len(values)) - 1]


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    # What is wrong with one of them ends the call here.
    recipes = {name: load(name) for name in args.recipe}
    for recipe in recipes.values():
        how_sampled(argparse.Namespace(frames=args.frames, image=None), recipe, prefix=0)
        fp8_attention.check(args, recipe.causal, PRESETS[args.preset].head_dim, dtype_of(args))

    places = dict.fromkeys((args.device, place_of_vae(args)))
    names = ["CPU" if place == "cpu" else torch.cuda.get_device_name(place) for place in places]
    print(f"{' and '.join(names)}, torch {torch.__version__}, {vars(args)}")
    print(HEADER, flush=True)
    for name, recipe in recipes.items():
        print(measure(args, Path(name).stem, recipe), flush=True)


if __name__ == "__main__":
    script(main)
