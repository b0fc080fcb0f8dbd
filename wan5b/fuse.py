"""Speed from outside, off until `enable` is called: kernel fusion by torch.compile, launches by CUDA graphs.

`@fused` marks the pieces of the networks that are bound by memory traffic when run op by op. Attention, convolutions
and caches stay outside, so a piece compiles once per shape, whatever the cache holds. `Graphs` replays whole forwards
that work on the same memory again: starting a thousand kernels one by one takes longer than fast ones run.
"""

from collections.abc import Callable
from functools import cache, wraps

import torch
from torch import Tensor

_enabled = _graphs = False


def enable(on: bool = True, graphs: bool = True) -> None:
    """Compile the marked pieces at their next call without grad (tens of seconds once per process), or stop it.

    graphs: use graphs too, which is for weights that stay where they are (those of FSDP don't).
    """
    global _enabled, _graphs
    _enabled, _graphs = on, on and graphs
    torch._dynamo.config.recompile_limit = 256  # shapes of one piece: the VAE has about 20
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def fused(piece: Callable) -> Callable:
    compiled = cache(
        lambda: torch.compile(piece, dynamic=False)
    )  # when it is needed: it imports the compiler

    @wraps(piece)
    def call(*args):
        return (compiled() if _enabled and not torch.is_grad_enabled() else piece)(*args)

    return call


class Graphs:
    """CUDA graphs of one network's forwards by key, which must tell all that is not among the inputs.

    A graph knows all other memory that a forward reads and writes by its address. All share one pool of memory.
    """

    def __init__(self):
        self.graphs, self.pool = {}, None

    def run(self, key, forward: Callable, *inputs: Tensor) -> Tensor:
        """forward(*inputs): as ever at the first call with a key (which may compile), recorded at the second."""
        if not _graphs or not inputs[0].is_cuda or torch.is_grad_enabled():
            return forward(*inputs)
        if key not in self.graphs:
            self.graphs[key] = None
            return forward(*inputs)
        if self.graphs[key] is None:
            graph, own = torch.cuda.CUDAGraph(), [x.clone() for x in inputs]
            with torch.cuda.graph(
                graph, pool=self.pool, capture_error_mode="thread_local"
            ):  # other threads may copy
                self.graphs[key] = graph, own, forward(*own)
            self.pool = graph.pool()
        graph, own, out = self.graphs[key]
        for mine, given in zip(own, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        return out.clone()  # the next replay writes there again
