"""Sampling speed of the 5B geometry with random weights, each part against its bound; one table at the end.

    python bench.py                                   # 704x1280, 81 frames, blocks of 3, 4 levels
    python bench.py --geometry 480x832 --block 8 --window 32 --sink 8 --frames 125

Bounds are arithmetic over ceilings measured in the same call: matrix products, cuDNN attention, channels-last conv3d.
"""

import argparse
import copy
import itertools
import statistics
import time

import torch

from sample import random_context, random_networks
from wan5b import fuse
from wan5b.attention import attention
from wan5b.distill import rollout
from wan5b.dit import PRESETS
from wan5b.flow import few_step_sigmas
from wan5b.fp8 import quantize_blocks
from wan5b.kvcache import KVCache, block_sizes
from wan5b.media import to_frames


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
    q, k = rand(1, rows, cfg.num_heads, cfg.head_dim), rand(1, 4 * rows, cfg.num_heads, cfg.head_dim)
    frames = rand(1, 512, 6, 176, 320).to(memory_format=torch.channels_last_3d)
    conv = torch.nn.Conv3d(512, 512, 3, padding=(0, 1, 1), device="cuda", dtype=torch.bfloat16)
    conv = conv.to(memory_format=torch.channels_last_3d)
    return {
        "matmul": 2 * n**3 / seconds(lambda: a @ b),
        "ffn": 2 * rows * cfg.dim * cfg.ffn_dim / seconds(lambda: torch.nn.functional.linear(x, w)),
        "attention": 4 * rows * 4 * rows * cfg.dim / seconds(lambda: attention(q, k, k)),
        "conv3d": 2 * 27 * 512 * 512 * 4 * 176 * 320 / seconds(lambda: conv(frames)),
    }


def dit_flop(cfg, rows: int, seen: int) -> tuple[float, float]:
    """(linear, attention) FLOP of a forward of `rows` tokens over `seen` keys, text keys cached."""
    linear = 2 * rows * cfg.num_layers * (6 * cfg.dim**2 + 2 * cfg.dim * cfg.ffn_dim)
    return linear, 4 * rows * (seen + cfg.text_len) * cfg.dim * cfg.num_layers


def short_rollout(model, noise, context) -> list[torch.Tensor]:
    """Three blocks of 3 latent frames with fixed re-noising, float32: the variants' errors are measured on it."""
    noise = noise[:, :, :9]
    cache = KVCache(model.cfg, 1, 9, model.cfg.tokens_per_frame(*noise.shape[3:]), device="cuda", dtype=context.dtype)
    draws = torch.Generator("cuda").manual_seed(1)

    def renoise(block, step, like):
        return torch.randn(like.shape, generator=draws, device="cuda")

    out = rollout(model, noise, context, few_step_sigmas(), [3, 3, 3], cache, renoise=renoise)
    return [block.float() for block in out]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default="704x1280")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--block", type=int, default=3)
    parser.add_argument("--window", type=int)
    parser.add_argument("--sink", type=int, default=0)
    variants = ["eager", "compiled", "compiled fp8"]
    parser.add_argument("--variants", nargs="+", default=variants, choices=variants)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    device, dtype, cfg = torch.device("cuda"), torch.bfloat16, PRESETS["ti2v-5B"]
    height, width = (int(side) // 16 for side in args.geometry.split("x"))
    tokens, latents = cfg.tokens_per_frame(height, width), (args.frames + 3) // 4
    blocks = block_sizes(latents, args.block)
    sigmas = few_step_sigmas()

    rates = ceilings(cfg, args.block * tokens)
    model, vae = random_networks("ti2v-5B", device, dtype)
    vae = vae.to(dtype)
    context = random_context(["a red fox in deep snow"], cfg.text_len, cfg.text_dim).to(device, dtype)
    noise = torch.randn(1, 48, latents, height, width, device=device)
    reference = short_rollout(copy.deepcopy(model).float(), noise, context.float())
    cache = KVCache(cfg, 1, args.window or latents, tokens, args.window, args.sink, device, dtype)
    torch.cuda.empty_cache()
    weights = torch.cuda.memory_allocated()

    def clip(decode: bool, generate: bool = True) -> list[float]:
        """One clip; the seconds at which each block was finished."""
        cache.reset()
        state, marks = vae.stream(), []
        torch.cuda.synchronize()
        start = time.perf_counter()
        source = noise.split(blocks, 2)
        if generate:
            source = rollout(model, noise, context, sigmas, blocks, cache)
        for _, x0 in zip(blocks, source, strict=False):
            if decode:
                to_frames(vae.decode_chunk(x0, state)[0]).cpu()
            torch.cuda.synchronize()
            marks.append(time.perf_counter() - start)
        return marks

    lines = []
    linear = attn = 0.0
    for done in itertools.accumulate(blocks):
        seen = min(done, args.window or done) * tokens
        forward = dit_flop(cfg, args.block * tokens, seen)
        linear, attn = linear + len(sigmas) * forward[0], attn + len(sigmas) * forward[1]
    bound = linear / rates["ffn"] + attn / rates["attention"]
    for variant in args.variants:
        fuse.enable(variant != "eager")
        if "fp8" in variant:
            quantize_blocks(model)
        start = time.perf_counter()
        clip(True)
        warmup = time.perf_counter() - start
        for name, options in (("DiT", (False, True)), ("VAE", (True, False)), ("both", (True, True))):
            torch.cuda.reset_peak_memory_stats()
            runs = [clip(*options) for _ in range(args.repeats)]
            peak = torch.cuda.max_memory_allocated()
            best = sorted(runs, key=lambda marks: marks[-1])[len(runs) // 2]
            steps = [b - a for a, b in zip([0.0, *best], best, strict=False)]
            row = (best[-1], args.frames / best[-1], best[0], min(steps), max(steps), peak / 2**30)
            lines.append("{:24}{:8.2f}{:8.1f}{:8.2f}{:8.3f} ..{:6.3f}{:8.1f}".format(f"{variant} {name}", *row))
            print(lines[-1], flush=True)
        pairs = zip(short_rollout(model, noise, context), reference, strict=True)
        error = " ".join(f"{float((a - b).norm() / b.norm()):.1e}" for a, b in pairs)
        lines.append(f"{variant}: warm-up {warmup:.0f} s, error of three blocks against float32: {error}")

    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, {vars(args)}")
    print("ceilings, TFLOP/s: " + ", ".join(f"{k} {v / 1e12:.0f}" for k, v in rates.items()))
    print(f"DiT {(linear + attn) / 1e12:.0f} TFLOP, bound {bound:.2f} s; weights and cache {weights / 2**30:.1f} GiB")
    print(f"{'':24}{'s':>8}{'fps':>8}{'first':>8}{'block':>16}{'GiB':>8}", *lines, sep="\n")


if __name__ == "__main__":
    main()
