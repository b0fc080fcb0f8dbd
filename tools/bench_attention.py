"""flex_attention on the training masks of a 5B against cuDNN attention on the same arithmetic.

    python tools/bench_attention.py

Rates and gradients, forward and backward, bf16, random data, 704x1280, chunks of 3 latent frames.
FLOP are those of the query-key pairs that the mask lets through: 4 D a pair forward, 10 D backward
(with the scores a second time). cuDNN, which takes no such mask, gets the same number of pairs as a
rectangle: all queries, and as many keys as a query sees on average.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench import seconds

from wan5b.attention import attention, causal_mask
from wan5b.dit import PRESETS
from wan5b.kvcache import chunk_sizes

CFG = PRESETS["ti2v-5B"]
TOKENS = CFG.tokens_per_frame(44, 80)
CHUNKS = tuple(chunk_sizes(21))
HEADER = (
    f"{'':16}{'tokens':>8}{'visited':>8}{'built, s':>10}{'flex':>9}{'':9}{'cuDNN':>9}{'':9}"
    f"{'flex / cuDNN':>15}"
)


def rand(tokens: int) -> Tensor:
    shape = (1, tokens, CFG.num_heads, CFG.head_dim)
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def rates(call: Callable, queries: int, keys: int, pairs: float) -> list[float]:
    """FLOP/s of call(q, k, v), forward and backward."""
    q = rand(queries)
    k = rand(keys)
    v = rand(keys)
    with torch.no_grad():
        forward = seconds(lambda: call(q, k, v))
    out = call(q, k, v)
    grad = torch.randn_like(q)
    backward = seconds(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))
    return [4 * CFG.dim * pairs / forward, 10 * CFG.dim * pairs / backward]


def compare(halves: int) -> str:
    """The figures of a mask: of the sequence alone, or (halves = 2) of a clean and a noisy one."""
    # The mask. A noisy chunk sees as many frames as the clean one does in its place.
    sequence = halves * sum(CHUNKS) * TOKENS
    start = time.perf_counter()
    mask = causal_mask(CHUNKS, TOKENS, None, halves == 2, torch.device("cuda"))
    torch.cuda.synchronize()
    built = time.perf_counter() - start
    frame_pairs = sum(size * end for size, end in zip(CHUNKS, accumulate(CHUNKS), strict=True))
    pairs = halves * frame_pairs * TOKENS**2

    # The rates.
    flex = rates(partial(attention, mask=mask), sequence, sequence, pairs)
    cudnn = rates(attention, sequence, round(pairs / sequence), pairs)
    row = f"{sequence:8}{pairs / sequence**2:8.1%}{built:10.2f}"
    for rate in flex + cudnn:
        row += f"{rate / 1e12:9.0f}"
    return row + f"{flex[0] / cudnn[0]:9.0%}{flex[1] / cudnn[1]:6.0%}"


def error(call: Callable, dense: Tensor | None, tokens: int) -> list[float]:
    """Relative error of the output and of the gradients of q, k, v, on three heads.

    Against float64 with a dense mask [S, S], or without a mask.
    """
    given = [rand(tokens)[:, :, :3].detach().requires_grad_() for _ in range(3)]
    out = call(*given)
    grad = torch.randn_like(out)
    found = (out, *torch.autograd.grad(out, given, grad))

    # The same by its definition.
    exact = [x.detach().double().requires_grad_() for x in given]
    q, k, v = exact
    scores = torch.einsum("bqnk,bsnk->bnqs", q, k) * CFG.head_dim**-0.5
    if dense is not None:
        scores = scores.masked_fill(~dense, -torch.inf)
    out = torch.einsum("bnqs,bsnk->bqnk", scores.softmax(-1), v)
    expected = (out, *torch.autograd.grad(out, exact, grad.double()))

    errors = []
    for a, b in zip(found, expected, strict=True):
        errors.append(((a.double() - b).norm() / b.norm()).item())
    return errors


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=raw).parse_args(argv)
    rows = []
    for name, halves in (("chunk-causal", 1), ("teacher forcing", 2)):
        rows.append(f"{name:16}{compare(halves)}")

    # On the CPU a mask is a dense one.
    small = ((3, 3, 3), 100, None, True)
    mask = causal_mask(*small, torch.device("cuda"))
    dense = causal_mask(*small, torch.device("cpu")).to("cuda")
    errors = {
        "flex, teacher forcing": error(partial(attention, mask=mask), dense, 1800),
        "cuDNN, no mask": error(attention, None, 1800),
    }

    card = torch.cuda.get_device_name()
    print(f"\n{card}, torch {torch.__version__}; TFLOP/s forward and backward")
    print(HEADER, *rows, sep="\n")
    for name, values in errors.items():
        figures = " ".join(f"{value:.1e}" for value in values)
        print(f"{name}: relative error of output, dq, dk, dv: {figures}")


if __name__ == "__main__":
    main()
