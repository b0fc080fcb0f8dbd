"""Sampling speed of the 5B geometry with random weights, each part against its bound.

    python tools/bench.py                                  # 704x1280, 81 frames, chunks of 3
    python tools/bench.py --geometry 480x832
    python tools/bench.py --chunk 8 --window 32 --sink 8 --frames 125
    python tools/bench.py --variants compiled --long 1437  # one minute: window 21, sink 3
    python tools/bench.py --variants "compiled fp8" "compiled fp8 vae"  # the decoder in float8 too
    python tools/bench.py --variants "compiled fp8 vae attention"       # and self-attention
    python tools/bench.py --vae-device cuda:1              # the decoder on a second GPU
    python tools/bench.py --levels-after 1000 500 --no-clean-pass   # fewer forwards a chunk
    python tools/bench.py --recipe longlive2 turbo         # as bench_recipes.py

At four levels, unless said; one table at the end. Bounds are arithmetic over ceilings measured in
the same call: matrix products, cuDNN attention, channels-last conv3d. Memory is of all GPUs
together.
"""

import argparse
import copy
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, pairwise, repeat
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
import bench_recipes
from bench_bounds import PRESET, Flop, ceilings, decoding_flop, seconds, shown
from bench_recipes import forget_peaks, peaks, share

from wan5b.distill import rollout
from wan5b.dit import PRESETS, DiTConfig, WanDiT
from wan5b.extras import compiler, graphs
from wan5b.extras.budget import GIB, forward_flop
from wan5b.extras.cards import carry, decode, place_of
from wan5b.extras.cli import DEVICES, script
from wan5b.extras.fp8 import Fp8Linear, quantize_blocks
from wan5b.extras.fp8_attention import Fp8Cache
from wan5b.extras.fp8_vae import quantize_decoder
from wan5b.extras.random_weights import random_context, random_dit, random_vae
from wan5b.flow import FEW_STEPS, few_step_sigmas
from wan5b.kvcache import KVCache, chunk_sizes
from wan5b.vae22 import VAE22, Stream

# float8 last: it replaces the weights
VARIANTS = ("eager", "compiled", "compiled fp8", "compiled fp8 vae", "compiled fp8 vae attention")
SIGMAS = few_step_sigmas()
DECODED = 6  # latent frames on which the VAE's error is measured
HEADER = f"{'':32}{'s':>8}{'of bound':>9}{'fps':>7}{'first':>8}{'p50':>8}{'p99':>8}{'GiB':>8}"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--geometry", default="704x1280", help="height and width in pixels")
    add("--frames", type=int, default=81, help="pixel frames, 4k + 1")
    add("--chunk", type=int, default=3, help="latent frames generated together")
    add("--window", type=int, help="latent frames that a chunk sees (default: all)")
    add("--sink", type=int, default=0, help="first latent frames that stay in the window")
    text = "levels of the chunks behind the first, in thousandths, in place of the four"
    add("--levels-after", type=int, nargs="+", default=[], metavar="LEVEL", help=text)
    add("--no-clean-pass", action="store_true", help="the last step's keys are the context")
    add("--variants", nargs="+", default=list(VARIANTS[:3]), choices=VARIANTS)
    add("--repeats", type=int, default=3, help="clips of which the median is taken")
    add("--vae-device", default="cuda", choices=DEVICES[:1] + DEVICES[2:], help="of the decoder")
    text = "then a long video, window 21, sink 3, last variant"
    add("--long", type=int, metavar="FRAMES", help=text)
    args = parser.parse_args(argv)

    # What does not come out even ends the call here, not after all that is measured before it.
    few_step_sigmas(args.levels_after or FEW_STEPS)
    for frames in (args.frames, args.long):
        if frames is not None:
            chunks_of(frames, args.chunk)
    return args


def chunks_of(frames: int, chunk: int) -> list[int]:
    """Latent frames of each chunk, for so many pixel frames. ValueError if that is not even."""
    return chunk_sizes((frames + 3) // 4, chunk)


# -------------------------------------------------------------------------------------------- clips


class Clip(NamedTuple):
    """What is generated."""

    noise: Tensor  # [1, C, T, H, W]
    chunks: list[int]
    window: int | None = None
    sink: int = 0
    sigmas_after: Sequence[float] = SIGMAS  # the levels of all chunks but the first
    clean_pass: bool = True

    @property
    def pixel_frames(self) -> int:
        return 4 * self.noise.shape[2] - 3

    def new_cache(
        self, cfg: DiTConfig, dtype: torch.dtype = torch.bfloat16, kind: type[KVCache] = KVCache
    ) -> KVCache:
        _, _, frames, height, width = self.noise.shape
        sizes = (1, self.window or frames, cfg.tokens_per_frame(height, width))
        return kind(cfg, *sizes, self.window, self.sink, self.noise.device, dtype)

    def flop(self, cfg: DiTConfig, vae: VAE22) -> dict[str, Flop]:
        """Of its parts, and of the teacher's: one bidirectional forward over all frames."""
        # A pass for each level, and, where the 0 stands, a clean one that fills the cache.
        first = self.noise[:, :, : self.chunks[0]]
        of_first = forward_flop(cfg, first, chunks=self.chunks[:1], window=self.window)
        of_all = forward_flop(cfg, self.noise, chunks=self.chunks, window=self.window)
        passes = len(SIGMAS) - (not self.clean_pass)
        later = len(self.sigmas_after) - (not self.clean_pass)
        products, attended = (
            passes * one + later * (whole - one)
            for one, whole in zip(of_first, of_all, strict=True)
        )
        conv = decoding_flop(vae, self.noise.to(place_of(vae)))
        return {
            "DiT": Flop(products, attended, 0),
            "VAE": Flop(0, 0, conv),
            "both": Flop(products, attended, conv),
            "teacher": Flop(*forward_flop(cfg, self.noise), 0),
        }

    def make(self, model: WanDiT, context: Tensor, cache: KVCache, **options) -> Iterator[Tensor]:
        """Its chunks, as they are finished. options: of `rollout`."""
        ways = chain([SIGMAS], repeat(list(self.sigmas_after)))
        given = (model, self.noise, context, ways, self.chunks, cache)
        return rollout(*given, clean_pass=self.clean_pass, **options)


@dataclass
class Sampler:
    """The networks, and how they make a clip."""

    model: WanDiT
    vae: VAE22
    context: Tensor  # [1, L, D]

    def __post_init__(self):
        # Here chunks are decoded while the next one is generated.
        self.beside = torch.cuda.Stream(place_of(self.vae))
        self.cards = {place_of(self.model), self.beside.device}

    def play(
        self,
        clip: Clip,
        cache: KVCache,
        decode: bool = True,
        generate: bool = True,
        times: int = 1,
    ) -> list[float]:
        """The clip so many times on end; the seconds at which each chunk was finished.

        A decoded chunk is finished when it is in host memory. Without generating, noise is decoded.
        """
        self._wait()
        started = {card: torch.cuda.Event(enable_timing=True) for card in self.cards}
        for card, event in started.items():
            event.record(torch.cuda.current_stream(card))

        marks = []
        for _ in range(times):
            marks += self._play(clip, cache, decode, generate)
        self._wait()
        card = self.beside.device if decode else place_of(self.model)
        return [started[card].elapsed_time(mark) / 1000 for mark in marks]

    def _wait(self) -> None:
        for card in self.cards:
            torch.cuda.synchronize(card)

    def _play(
        self, clip: Clip, cache: KVCache, decode: bool, generate: bool
    ) -> list[torch.cuda.Event]:
        """One clip, of which each event marks the end of a chunk; nothing waits for it."""
        cache.reset()
        state = self.vae.stream()
        events = [torch.cuda.Event(enable_timing=True) for _ in clip.chunks]
        source = clip.noise.split(clip.chunks, 2)
        if generate:
            source = clip.make(self.model, self.context, cache)
        # With the events in front, zip does not ask for more than the last chunk: nothing needs
        # that one in the cache.
        for event, x0 in zip(events, source, strict=False):
            if decode:
                self._decode(x0, state, event)
            else:
                event.record()
        return events

    def _decode(self, x0: Tensor, state: Stream, event: torch.cuda.Event) -> None:
        """Send a chunk through the VAE into host memory; nothing waits for it."""
        x0 = carry(x0, self.beside.device)
        self.beside.wait_stream(torch.cuda.current_stream(self.beside.device))
        x0.record_stream(self.beside)
        with torch.cuda.stream(self.beside):
            decode(self.vae, x0, state)
            event.record()


@contextmanager
def running_as(variant: str, model: WanDiT, vae: VAE22) -> Iterator[None]:
    """Inside, the networks run as the variant says. What it has in float8 stays so."""
    compiled = variant != "eager"
    compiler.enable(compiled)
    if "fp8" in variant and not isinstance(model.blocks[0].ffn[0], Fp8Linear):
        quantize_blocks(model)
    if "vae" in variant:
        quantize_decoder(vae)
    if compiled:
        graphs.record(model)
    yield
    if compiled:
        graphs.forget(model)


def cache_of(variant: str) -> type[KVCache]:
    return Fp8Cache if "attention" in variant else KVCache


# ------------------------------------------------------------------------------------------ figures


def durations(marks: list[float]) -> list[float]:
    """Of chunks that follow one another, from the times at which they were finished."""
    return [b - a for a, b in pairwise([0.0, *marks])]


def rate_of(marks: list[float], chunks: list[int], picked: slice) -> float:
    """Pixel frames a second over some chunks, from the times at which chunks were finished."""
    return 4 * sum(chunks[picked]) / sum(durations(marks)[picked])


def row(name: str, marks: list[float], bound: float, frames: int, peak: int) -> str:
    """A line of the table. marks: as of `Sampler.play`; frames: in pixels; peak: bytes."""
    steps = durations(marks)
    whole = marks[-1]
    return (
        f"{name:32}{whole:8.2f}{bound / whole:9.0%}{frames / whole:7.1f}{marks[0]:8.2f}"
        f"{share(steps, 0.5):8.3f}{share(steps, 0.99):8.3f}{peak / GIB:8.1f}"
    )


def long_video(sampler: Sampler, clip: Clip, frames: int, chunk: int, kind: type[KVCache]) -> str:
    """A video of so many pixel frames, of the clip's size, over a window of 21 with a sink of 3."""
    chunks = chunks_of(frames, chunk)
    _, channels, _, height, width = clip.noise.shape
    noise = torch.randn(1, channels, sum(chunks), height, width, device="cuda")
    video = clip._replace(noise=noise, chunks=chunks, window=21, sink=3)
    marks = sampler.play(video, video.new_cache(sampler.model.cfg, kind=kind))

    part = 120 // 4 // chunk  # chunks of 5 seconds
    first = rate_of(marks, chunks, slice(part))
    last = rate_of(marks, chunks, slice(-part, None))
    peak = peaks() / GIB
    return (
        f"{frames} frames in {marks[-1]:.1f} s, window 21, sink 3: {first:.1f} fps in the first "
        f"5 s, {last:.1f} fps in the last 5 s of the video, peak {peak:.1f} GiB"
    )


# ------------------------------------------------------------------------------------------- errors


def latents_of(model: WanDiT, context: Tensor, clip: Clip, cache: KVCache) -> Tensor:
    """A whole rollout with re-noising that is always the same, float32."""
    draws = torch.Generator("cuda").manual_seed(1)

    def renoise(chunk: int, step: int, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=draws, device="cuda")

    cache.reset()
    finished = clip.make(model, context, cache, renoise=renoise)
    return torch.cat([x0.float() for x0 in finished], 2)


def exact_latents(sampler: Sampler, clip: Clip) -> Tensor:
    """The rollout of `latents_of` in float32, against which variants are held."""
    model = copy.deepcopy(sampler.model).float()
    cache = clip.new_cache(model.cfg, torch.float32)
    return latents_of(model, sampler.context.float(), clip, cache)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def apart(out: Tensor, like: Tensor, chunk: int) -> str:
    """Relative error of the whole clip, of its first and of its last chunk."""
    whole = relative(out, like)
    first = relative(out[:, :, :chunk], like[:, :, :chunk])
    last = relative(out[:, :, -chunk:], like[:, :, -chunk:])
    return f"{whole:.1e} ({first:.1e} in the first chunk, {last:.1e} in the last)"


def seams(vae: VAE22, latents: Tensor, expected: Tensor) -> str:
    """Relative error of decoding chunk by chunk, where chunks of 3 begin and elsewhere.

    expected: the video of the latents, float32.
    """
    state = vae.stream()
    pieces = [vae.decode_chunk(chunk, state) for chunk in latents.split(3, 2)]
    video = torch.cat(pieces, 2).float()

    def norms(x: Tensor) -> Tensor:
        """Of each frame."""
        return x.square().sum((0, 1, 3, 4)) ** 0.5

    error = (norms(video - expected) / norms(expected)).cpu()
    seam = torch.zeros(len(error), dtype=torch.bool)
    seam[9::12] = True  # 3 latent frames are 9 pixel frames at the start, 12 later
    return f"decoded at seams {error[seam].mean():.1e}, elsewhere {error[~seam].mean():.1e}"


# ----------------------------------------------------------------------------------------- variants


@dataclass
class Bench:
    """What is measured of every variant, and held against the variants before it."""

    sampler: Sampler
    clip: Clip
    bounds: dict[str, float]  # seconds, by part
    repeats: int
    latents: dict[str, Tensor]  # of `latents_of`, by variant; "float32" among them
    decoded: Tensor  # the first latent frames of the noise, by the VAE in float32

    def measure(self, variant: str) -> list[str]:
        """Lines of the table; most are printed at once, too."""
        # The first clips compile, and record graphs, which belong to this cache.
        cache = self.clip.new_cache(self.sampler.model.cfg, kind=cache_of(variant))
        start = time.perf_counter()
        self.sampler.play(self.clip, cache)
        warmup = time.perf_counter() - start
        self.sampler.play(self.clip, cache)

        lines = self.speed(variant, cache)
        of_latents = self.errors(variant, cache)
        some = self.clip.noise[:, :, :DECODED].to(self.decoded.device)
        of_pixels = seams(self.sampler.vae, some, self.decoded)
        errors = [f"  warm-up {warmup:.0f} s; against float32: {of_pixels}", *of_latents]
        print(*errors, sep="\n", flush=True)
        return lines + errors

    def speed(self, variant: str, cache: KVCache) -> list[str]:
        """The clip's parts, each by the median of some runs, and the teacher."""
        lines = []
        for part in ("DiT", "VAE", "both"):
            options = {"decode": part != "DiT", "generate": part != "VAE"}
            forget_peaks()
            runs = [self.sampler.play(self.clip, cache, **options) for _ in range(self.repeats)]
            peak = peaks()
            runs.sort(key=lambda marks: marks[-1])
            median = runs[len(runs) // 2]
            name = f"{variant} {part}"
            lines.append(row(name, median, self.bounds[part], self.clip.pixel_frames, peak))
            print(lines[-1], flush=True)

        if len(self.sampler.cards) > 1:
            lines.append(self.on_end(variant, cache))
            print(lines[-1], flush=True)
        noise = self.clip.noise
        forward = seconds(lambda: self.sampler.model(noise, 0.5, self.sampler.context), 3, 1)
        share = self.bounds["teacher"] / forward
        lines.append(f"{variant + ' teacher':32}{forward:8.2f}{share:9.0%}")
        return lines

    def on_end(self, variant: str, cache: KVCache) -> str:
        """Clips one behind the other, so that neither GPU waits for the first or the last chunk."""
        marks = self.sampler.play(self.clip, cache, times=4)
        frames = 4 * self.clip.pixel_frames
        return f"{variant + ' 4 on end':32}{marks[-1]:8.2f}{'':9}{frames / marks[-1]:7.1f}"

    def errors(self, variant: str, cache: KVCache) -> list[str]:
        """Of the latents, against float32 and against the compiled ones."""
        sampler = self.sampler
        out = latents_of(sampler.model, sampler.context, self.clip, cache)
        lines = []
        for name in ("float32", "compiled"):
            if name in self.latents:
                off = apart(out, self.latents[name], self.clip.chunks[0])
                lines.append(f"  latents against {name}: {off}")
        self.latents[variant] = out
        return lines


# --------------------------------------------------------------------------------------------- main


def make_sampler(cfg: DiTConfig, vae_device: str) -> Sampler:
    device = torch.device("cuda")
    model = random_dit(PRESET, device, torch.bfloat16)
    vae = random_vae(PRESET, vae_device).to(torch.bfloat16)
    context = random_context(["a red fox in deep snow"], cfg.text_len, cfg.text_dim)
    return Sampler(model, vae, context.to(device, torch.bfloat16))


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if any(word.partition("=")[0] == "--recipe" for word in argv):
        bench_recipes.main(argv)
        return
    args = parse(argv)
    cfg = PRESETS[PRESET]
    height, width = (int(side) // 16 for side in args.geometry.split("x"))
    chunks = chunks_of(args.frames, args.chunk)
    rates = ceilings(cfg, args.chunk * cfg.tokens_per_frame(height, width))

    # The networks, a clip, and what these make of it in float32.
    sampler = make_sampler(cfg, args.vae_device)
    noise = torch.randn(1, cfg.in_dim, sum(chunks), height, width, device="cuda")
    after = few_step_sigmas(args.levels_after or FEW_STEPS)
    clip = Clip(noise, chunks, args.window, args.sink, after, not args.no_clean_pass)
    latents = {"float32": exact_latents(sampler, clip)}
    some = noise[:, :, :DECODED].to(args.vae_device)
    decoded = copy.deepcopy(sampler.vae).float().decode(some)
    torch.cuda.empty_cache()
    weights = sum(map(torch.cuda.memory_allocated, sampler.cards))

    flop = clip.flop(cfg, sampler.vae)
    bounds = {name: part.bound(rates) for name, part in flop.items()}
    bench = Bench(sampler, clip, bounds, args.repeats, latents, decoded)
    lines = []
    variants = [variant for variant in VARIANTS if variant in args.variants]
    for variant in variants:
        with running_as(variant, sampler.model, sampler.vae):
            lines += bench.measure(variant)
            if args.long and variant == variants[-1]:
                lines.append(long_video(sampler, clip, args.long, args.chunk, cache_of(variant)))

    names = [torch.cuda.get_device_name(card) for card in sampler.cards]
    print(f"\n{' and '.join(names)}, torch {torch.__version__}, {vars(args)}")
    print(f"ceilings, TFLOP/s: {shown(rates)}")
    dit = (flop["DiT"].linear + flop["DiT"].attention) / 1e12
    conv = flop["VAE"].conv / 1e12
    print(f"DiT {dit:.0f} TFLOP, VAE {conv:.0f}; weights {weights / GIB:.1f} GiB")
    shown_bounds = [f"{name} {bound:.2f}" for name, bound in bounds.items()]
    print(f"bounds, s: {', '.join(shown_bounds)}")
    print(HEADER, *lines, sep="\n")


if __name__ == "__main__":
    script(main)
