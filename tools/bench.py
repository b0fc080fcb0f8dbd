"""Sampling speed of the 5B geometry with random weights, each part against its bound; one table at the end.

    python tools/bench.py                                   # 704x1280, 81 frames, chunks of 3, 4 levels
    python tools/bench.py --geometry 480x832
    python tools/bench.py --chunk 8 --window 32 --sink 8 --frames 125
    python tools/bench.py --variants compiled --long 1437   # one minute over a window of 21 with a sink of 3

Bounds are arithmetic over ceilings measured in the same call: matrix products, cuDNN attention, channels-last conv3d.
"""

import argparse
import copy
import math
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
from wan5b import fuse
from wan5b.attention import attention
from wan5b.distill import rollout
from wan5b.dit import PRESETS
from wan5b.extras.random_weights import random_context, random_networks
from wan5b.flow import few_step_sigmas
from wan5b.fp8 import quantize_blocks
from wan5b.kvcache import KVCache, chunk_sizes
from wan5b.media import to_frames
from wan5b.stages import forward_flop

LINE = "{:24}{:8.2f}{:9.0%}{:7.1f}{:8.2f}{:8.3f} ..{:6.3f}{:8.1f}"


def seconds(run, repeats: int = 10, warmup: int = 3) -> float:
    """Median seconds of a GPU function, by events."""
    times = []
    for i in range(warmup + repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times += [start.elapsed_time(end) / 1000] if i >= warmup else []
    return statistics.median(times)


def ceilings(cfg, rows: int) -> dict[str, float]:
    """FLOP/s of the card on random bf16 data: a large matrix product, the FFN's shape, attention, convolution."""

    def rand(*shape):
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    n = 8192
    a, b = rand(n, n), rand(n, n)
    x, w = rand(rows, cfg.dim), rand(cfg.ffn_dim, cfg.dim)
    q, k = (
        rand(1, rows, cfg.num_heads, cfg.head_dim),
        rand(1, 4 * rows, cfg.num_heads, cfg.head_dim),
    )
    frames = rand(1, 512, 6, 176, 320).to(memory_format=torch.channels_last_3d)
    conv = torch.nn.Conv3d(512, 512, 3, padding=(0, 1, 1), device="cuda", dtype=torch.bfloat16)
    conv = conv.to(memory_format=torch.channels_last_3d)
    return {
        "matmul": 2 * n**3 / seconds(lambda: a @ b),
        "ffn": 2 * rows * cfg.dim * cfg.ffn_dim / seconds(lambda: torch.nn.functional.linear(x, w)),
        "attention": 4 * rows * 4 * rows * cfg.dim / seconds(lambda: attention(q, k, k)),
        "conv3d": 2 * 27 * 512 * 512 * 4 * 176 * 320 / seconds(lambda: conv(frames)),
    }


def new_cache(cfg, tokens: int, frames: int, window=None, sink=0, dtype=torch.bfloat16) -> KVCache:
    return KVCache(cfg, 1, window or frames, tokens, window, sink, "cuda", dtype)


def latents_of(model, noise, context, chunks: list[int], cache: KVCache) -> torch.Tensor:
    """A whole rollout with re-noising that is always the same, float32: the variants' errors are measured on it."""
    draws = torch.Generator("cuda").manual_seed(1)

    def renoise(chunk, step, like):
        return torch.randn(like.shape, generator=draws, device="cuda")

    cache.reset()
    out = rollout(model, noise, context, few_step_sigmas(), chunks, cache, renoise=renoise)
    return torch.cat([chunk.float() for chunk in out], 2)


def apart(out: torch.Tensor, like: torch.Tensor, chunk: int) -> str:
    """Relative error of the whole clip, of its first and of its last chunk."""
    parts = (slice(None), slice(chunk), slice(-chunk, None))
    pairs = [(out[:, :, part], like[:, :, part]) for part in parts]
    whole, first, last = (f"{float((a - b).norm() / b.norm()):.1e}" for a, b in pairs)
    return f"{whole} ({first} in the first chunk, {last} in the last)"


def seams(vae, latents: torch.Tensor, expected: torch.Tensor) -> str:
    """Relative error of the streamed decoding of chunks of 3 against `expected`: at chunks' first frames, elsewhere."""
    state = vae.stream()
    video = torch.cat([vae.decode_chunk(chunk, state) for chunk in latents.split(3, 2)], 2).float()
    apart, size = ((x.square().sum((0, 1, 3, 4))) ** 0.5 for x in (video - expected, expected))
    error = (apart / size).cpu()
    first = torch.zeros(len(error), dtype=torch.bool)
    first[9::12] = True  # 3 latent frames are 9 pixel frames at the start, 12 later
    return f"decoded at seams {error[first].mean():.1e}, elsewhere {error[~first].mean():.1e}"


def rate_of(marks: list[float], chunks: list[int], picked: slice) -> float:
    """Pixel frames a second over some chunks, of the times at which they were finished."""
    steps = [b - a for a, b in zip([0.0, *marks], marks, strict=False)]
    return 4 * sum(chunks[picked]) / sum(steps[picked])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", default="704x1280")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--chunk", type=int, default=3)
    parser.add_argument("--window", type=int)
    parser.add_argument("--sink", type=int, default=0)
    variants = ["eager", "compiled", "compiled fp8"]
    parser.add_argument("--variants", nargs="+", default=variants, choices=variants)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--long",
        type=int,
        metavar="FRAMES",
        help="then a long video, window 21, sink 3, last variant",
    )
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    device, dtype, cfg = torch.device("cuda"), torch.bfloat16, PRESETS["ti2v-5B"]
    height, width = (int(side) // 16 for side in args.geometry.split("x"))
    tokens, latents = cfg.tokens_per_frame(height, width), (args.frames + 3) // 4
    chunks = chunk_sizes(latents, args.chunk)
    sigmas = few_step_sigmas()

    rates = ceilings(cfg, args.chunk * tokens)
    model, vae = random_networks("ti2v-5B", device, dtype)
    vae = vae.to(dtype)
    context = random_context(["a red fox in deep snow"], cfg.text_len, cfg.text_dim).to(
        device, dtype
    )
    noise = torch.randn(1, 48, latents, height, width, device=device)
    size = tokens, latents, args.window, args.sink
    exact = (
        copy.deepcopy(model).float(),
        noise,
        context.float(),
        chunks,
        new_cache(cfg, *size, torch.float32),
    )
    clips = {"float32": latents_of(*exact)}
    del exact
    shown = noise[:, :, :6]
    decoded = copy.deepcopy(vae).float().decode(shown)
    torch.cuda.empty_cache()
    weights = torch.cuda.memory_allocated()

    beside = torch.cuda.Stream()  # decodes while the next chunk is generated

    def clip(cache, noise, chunks, decode: bool = True, generate: bool = True) -> list[float]:
        """One clip; the seconds at which each chunk was finished, its frames in host memory if they are decoded."""
        cache.reset()
        state, events = (
            vae.stream(),
            [torch.cuda.Event(enable_timing=True) for _ in range(len(chunks) + 1)],
        )
        torch.cuda.synchronize()
        events[0].record()
        source = noise.split(chunks, 2)
        if generate:
            source = rollout(model, noise, context, sigmas, chunks, cache)
        for event, x0 in zip(
            events[1:], source, strict=False
        ):  # in this order: no commit of the last
            if decode:
                beside.wait_stream(torch.cuda.current_stream())
                x0.record_stream(beside)
                with torch.cuda.stream(beside):
                    frames = to_frames(vae.decode_chunk(x0, state)[0])
                    torch.empty(frames.shape, dtype=frames.dtype, pin_memory=True).copy_(
                        frames, non_blocking=True
                    )
                    event.record()
            else:
                event.record()
        torch.cuda.synchronize()
        return [events[0].elapsed_time(event) / 1000 for event in events[1:]]

    lines = []
    passes = forward_flop(
        cfg, noise, chunks=chunks, window=args.window
    )  # each level's, and the clean one
    linear, attn = (len(sigmas) * flop for flop in passes)
    with FlopCounterMode(display=False) as counted:  # as it runs, upsampling folded
        state = vae.stream()
        vae.decode_chunk(noise[:, :, :1], state)
        first = counted.get_total_flops()
        vae.decode_chunk(noise[:, :, :2], state)
    conv = first + (latents - 1) / 2 * (counted.get_total_flops() - first)
    bounds = {
        "DiT": linear / rates["ffn"] + attn / rates["attention"],
        "VAE": conv / rates["conv3d"],
    }
    bounds["both"] = sum(bounds.values())
    whole = forward_flop(cfg, noise)
    bounds["teacher"] = whole[0] / rates["ffn"] + whole[1] / rates["attention"]
    for variant in sorted(
        set(args.variants), key=variants.index
    ):  # float8 last: it replaces the weights
        fuse.enable(variant != "eager")
        if "fp8" in variant:
            quantize_blocks(model)
        cache = new_cache(cfg, *size)  # its graphs are of these weights
        start = time.perf_counter()
        clip(cache, noise, chunks)
        warmup = time.perf_counter() - start
        clip(cache, noise, chunks)
        for name, options in (
            ("DiT", (False, True)),
            ("VAE", (True, False)),
            ("both", (True, True)),
        ):
            torch.cuda.reset_peak_memory_stats()
            runs = [clip(cache, noise, chunks, *options) for _ in range(args.repeats)]
            peak = torch.cuda.max_memory_allocated()
            best = sorted(runs, key=lambda marks: marks[-1])[len(runs) // 2]
            steps = [b - a for a, b in zip([0.0, *best], best, strict=False)]
            row = (
                best[-1],
                bounds[name] / best[-1],
                args.frames / best[-1],
                best[0],
                min(steps),
                max(steps),
            )
            lines.append(LINE.format(f"{variant} {name}", *row, peak / 2**30))
            print(lines[-1], flush=True)
        forward = seconds(lambda: model(noise, 0.5, context), 3, 1)
        lines.append(
            LINE.format(f"{variant} teacher", forward, bounds["teacher"] / forward, *[math.nan] * 5)
        )
        clips[variant] = latents_of(model, noise, context, chunks, cache)
        lines.append(f"  warm-up {warmup:.0f} s; against float32: {seams(vae, shown, decoded)}")
        kept = [name for name in ("float32", "compiled") if name in clips and name != variant]
        lines += [
            f"  latents against {name}: {apart(clips[variant], clips[name], args.chunk)}"
            for name in kept
        ]
        print(*lines[-1 - len(kept) :], sep="\n", flush=True)
    if args.long:
        cache, chunks = (
            new_cache(cfg, tokens, 21, 21, 3),
            chunk_sizes((args.long + 3) // 4, args.chunk),
        )
        marks = clip(cache, torch.randn(1, 48, sum(chunks), height, width, device=device), chunks)
        part = 120 // 4 // args.chunk  # chunks of 5 seconds
        peaks = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
        ends = [rate_of(marks, chunks, picked) for picked in (slice(part), slice(-part, None))]
        lines.append(
            f"{args.long} frames in {marks[-1]:.1f} s, window 21, sink 3: {ends[0]:.1f} fps in the first 5 s,"
        )
        lines[-1] += f" {ends[1]:.1f} fps in the last 5 s of the video, peak {peaks}"

    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, {vars(args)}")
    print("ceilings, TFLOP/s: " + ", ".join(f"{k} {v / 1e12:.0f}" for k, v in rates.items()))
    print(
        f"DiT {(linear + attn) / 1e12:.0f} TFLOP, VAE {conv / 1e12:.0f}; weights {weights / 2**30:.1f} GiB"
    )
    print("bounds, s: " + ", ".join(f"{k} {v:.2f}" for k, v in bounds.items()))
    print(
        f"{'':24}{'s':>8}{'of bound':>9}{'fps':>7}{'first':>8}{'chunk':>16}{'GiB':>8}",
        *lines,
        sep="\n",
    )


if __name__ == "__main__":
    main()
