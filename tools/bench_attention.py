"""flex_attention on the training masks of a 5B against cuDNN attention on the same arithmetic: rates, gradients.

    python tools/bench_attention.py

Forward and backward, bf16, random data, 704x1280, chunks of 3 latent frames. FLOP are those of the query-key pairs that
the mask lets through: 4 D a pair forward, 10 D backward (with the scores a second time). cuDNN, which takes no such
mask, gets the same number of pairs as a rectangle: all queries, and as many keys as a query sees on average.
"""

import itertools
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench import seconds

from wan5b.attention import attention, causal_mask
from wan5b.dit import PRESETS
from wan5b.kvcache import chunk_sizes

CFG = PRESETS["ti2v-5B"]
TOKENS = CFG.tokens_per_frame(44, 80)


def rand(tokens: int) -> torch.Tensor:
    shape = (1, tokens, CFG.num_heads, CFG.head_dim)
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def rates(call, queries: int, keys: int, pairs: float) -> list[float]:
    """FLOP/s forward and backward."""
    q, k, v = rand(queries), rand(keys), rand(keys)
    with torch.no_grad():
        forward = seconds(lambda: call(q, k, v))
    out, grad = call(q, k, v), torch.randn_like(q)
    backward = seconds(lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True))
    return [4 * CFG.dim * pairs / forward, 10 * CFG.dim * pairs / backward]


def error(call, dense: torch.Tensor | None, tokens: int) -> list[float]:
    """Relative error of the output and the gradients of q, k, v against float64 with a dense mask, three heads."""
    q, k, v = (rand(tokens)[:, :, :3].detach().requires_grad_() for _ in range(3))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = torch.einsum("bqnk,bsnk->bnqs", *exact[:2]) * CFG.head_dim**-0.5
    if dense is not None:
        scores = scores.masked_fill(~dense, -torch.inf)
    expected = torch.einsum("bnqs,bsnk->bqnk", scores.softmax(-1), exact[2])
    grad = torch.randn_like(q)
    out = call(q, k, v)
    pairs = zip(
        (out, *torch.autograd.grad(out, (q, k, v), grad)),
        (expected, *torch.autograd.grad(expected, exact, grad.double())),
        strict=True,
    )
    return [float(((a.double() - b).norm() / b.norm()).detach()) for a, b in pairs]


def main() -> None:
    device, rows = torch.device("cuda"), []
    chunks = tuple(chunk_sizes(21))
    for name, halves in (("chunk-causal", 1), ("teacher forcing", 2)):
        sequence = halves * sum(chunks) * TOKENS
        start = time.perf_counter()
        mask = causal_mask(chunks, TOKENS, None, halves == 2, device)
        torch.cuda.synchronize()
        built = time.perf_counter() - start
        ends = itertools.accumulate(chunks)
        pairs = (
            halves * sum(size * end for size, end in zip(chunks, ends, strict=True)) * TOKENS**2
        )  # noisy as clean
        flex = rates(partial(attention, mask=mask), sequence, sequence, pairs)
        cudnn = rates(attention, sequence, round(pairs / sequence), pairs)
        ratio = [a / b for a, b in zip(flex, cudnn, strict=True)]
        rows.append(f"{name:16}{sequence:8}{pairs / sequence**2:8.1%}{built:10.2f}")
        rows[-1] += "".join(
            f"{rate / 1e12:9.0f}" for rate in flex + cudnn
        ) + "{:9.0%}{:6.0%}".format(*ratio)
    small, dense = (
        causal_mask((3, 3, 3), 100, None, True, place) for place in (device, torch.device("cpu"))
    )
    errors = {
        "flex, teacher forcing": error(partial(attention, mask=small), dense.to(device), 1800),
        "cuDNN, no mask": error(attention, None, 1800),
    }

    print(
        f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}; TFLOP/s forward and backward"
    )
    print(
        f"{'':16}{'tokens':>8}{'visited':>8}{'built, s':>10}{'flex':>9}{'':9}{'cuDNN':>9}{'':9}{'flex / cuDNN':>15}",
        *rows,
        sep="\n",
    )
    for name, values in errors.items():
        print(
            f"{name}: relative error of output, dq, dk, dv: {' '.join(f'{value:.1e}' for value in values)}"
        )


if __name__ == "__main__":
    main()
