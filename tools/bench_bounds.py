"""What a GPU can do at most of what the networks ask for, and the time that their work takes then.

    python tools/bench_bounds.py                         # FLOP/s of this GPU, for chunks of 3
    python tools/bench_bounds.py --geometry 480x832 --chunk 8

Measured on random data: a large matrix product, the FFN's shape, cuDNN attention, channels-last
conv3d. bench.py holds the networks against it.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
from wan5b.attention import attention
from wan5b.dit import PRESETS, DiTConfig
from wan5b.extras.cli import script
from wan5b.vae22 import VAE22

PRESET = "ti2v-5B"


def seconds(run: Callable, repeats: int = 10, warmup: int = 3) -> float:
    """Median seconds of a GPU function, by events."""
    times = []
    for i in range(warmup + repeats):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        if i >= warmup:
            times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def ceilings(cfg: DiTConfig, rows: int) -> dict[str, float]:
    """FLOP/s of the card on random bf16 data.

    A large matrix product, the FFN's shape with so many rows, attention, convolution.
    """

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    n = 8192
    a = rand(n, n)
    b = rand(n, n)
    x = rand(rows, cfg.dim)
    w = rand(cfg.ffn_dim, cfg.dim)
    q = rand(1, rows, cfg.num_heads, cfg.head_dim)
    k = rand(1, 4 * rows, cfg.num_heads, cfg.head_dim)
    frames = rand(1, 512, 6, 176, 320).to(memory_format=torch.channels_last_3d)
    conv = torch.nn.Conv3d(512, 512, 3, padding=(0, 1, 1), device="cuda", dtype=torch.bfloat16)
    conv = conv.to(memory_format=torch.channels_last_3d)
    return {
        "matmul": 2 * n**3 / seconds(lambda: a @ b),
        "ffn": 2 * rows * cfg.dim * cfg.ffn_dim / seconds(lambda: linear(x, w)),
        "attention": 4 * rows * 4 * rows * cfg.dim / seconds(lambda: attention(q, k, k)),
        "conv3d": 2 * 27 * 512 * 512 * 4 * 176 * 320 / seconds(lambda: conv(frames)),
    }


class Flop(NamedTuple):
    """What there is to compute, by the ceiling that bounds it."""

    linear: float
    attention: float
    conv: float

    def bound(self, rates: dict[str, float]) -> float:
        """Seconds that it takes at least. rates: as `ceilings` gives them."""
        seconds = self.linear / rates["ffn"]
        seconds += self.attention / rates["attention"]
        seconds += self.conv / rates["conv3d"]
        return seconds


def decoding_flop(vae: VAE22, noise: Tensor) -> float:
    """Of the clip [1, C, T, H, W], as it is computed: with upsampling folded into convolutions."""
    with FlopCounterMode(display=False) as counted:
        state = vae.stream()
        vae.decode_chunk(noise[:, :, :1], state)
        first = counted.get_total_flops()
        vae.decode_chunk(noise[:, :, :2], state)
    two_more = counted.get_total_flops() - first
    return first + (noise.shape[2] - 1) / 2 * two_more


def shown(rates: dict[str, float]) -> str:
    """Rates as of `ceilings`, in a line."""
    return ", ".join(f"{name} {rate / 1e12:.0f}" for name, rate in rates.items())


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--geometry", default="704x1280", help="height and width in pixels")
    parser.add_argument("--chunk", type=int, default=3, help="latent frames generated together")
    args = parser.parse_args(argv)
    height, width = (int(side) // 16 for side in args.geometry.split("x"))
    rows = args.chunk * PRESETS[PRESET].tokens_per_frame(height, width)
    rates = ceilings(PRESETS[PRESET], rows)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {vars(args)}")
    print(f"ceilings, TFLOP/s: {shown(rates)}")


if __name__ == "__main__":
    script(main)
