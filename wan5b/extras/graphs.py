"""CUDA graphs around a network's cached forwards, from outside: `record(model)`.

Starting a thousand kernels one by one takes longer than fast ones run, so a forward that works on
the same memory as an earlier one is replayed as one launch. For weights that stay where they are:
those of FSDP don't.
"""

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from wan5b.dit import WanDiT
from wan5b.fsdp import World
from wan5b.kvcache import CachedAttention
from wan5b.stages import DISTILLATIONS


class Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]  # the graph reads its inputs from here
    out: Tensor  # and writes its result here


class Graphs:
    """Stands in the place of `WanDiT.compute` and takes its arguments.

    A graph knows by its address all memory that a forward reads and writes besides its inputs: the
    weights, the places of the cache that `CachedAttention.place` names, the cache's keys of the
    text, which a text's first forward writes. The position in the video is in one of the inputs,
    the RoPE table, so graphs serve again at every turn of the cache's ring. They go with their
    cache, and share one pool of memory.
    """

    def __init__(self, compute):
        self.compute = compute
        # cache -> key -> Recorded, or None after a first forward
        self.of_cache = WeakKeyDictionary()
        self.stream = None  # in which they are recorded: blocks of a pool belong to one

    def __call__(self, x, sigma, rope, frames, attend, context, text=None) -> Tensor:
        cached = isinstance(attend, CachedAttention) and text is not None
        if not cached or not x.is_cuda or torch.is_grad_enabled():
            return self.compute(x, sigma, rope, frames, attend, context, text)

        inputs = (x, sigma, rope) if context is None else (x, sigma, rope, context)
        recorded = self.of_cache.setdefault(attend.cache, {})
        key = (attend.place, *(given.shape for given in inputs))
        if key not in recorded:
            # The first forward of its kind runs as usual: it may compile, which can't be recorded.
            recorded[key] = None
            return self.compute(x, sigma, rope, frames, attend, context, text)

        if recorded[key] is None:
            recorded[key] = self._record(inputs, frames, attend, text)
        graph, own, out = recorded[key]
        for mine, given in zip(own, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        return out.clone()  # the next replay writes there again

    def _record(self, inputs, frames, attend, text) -> Recorded:
        graph = torch.cuda.CUDAGraph()
        # A pool is gone with the last of its graphs: a new one begins then.
        others = (one for known in self.of_cache.values() for one in known.values() if one)
        pool = next((other.graph.pool() for other in others), None)
        own = tuple(x.clone() for x in inputs)
        # On the network's GPU, which need not be the current one. Thread-local: other threads may
        # copy meanwhile.
        place = own[0].device
        self.stream = self.stream or torch.cuda.Stream(place)
        how = {"pool": pool, "stream": self.stream, "capture_error_mode": "thread_local"}
        with torch.cuda.device(place), torch.cuda.graph(graph, **how):
            x, sigma, rope, *context = own
            context = context[0] if context else None
            out = self.compute(x, sigma, rope, frames, attend, context, text)
        return Recorded(graph, own, out)


def record(model: WanDiT) -> None:
    """Put CUDA graphs around the model's cached forwards without grad."""
    model.compute = Graphs(model.compute)


def record_rollouts(cfg, world: World, who: str, model: WanDiT) -> None:
    """`record` for the generator of a distillation with compile = true, where its weights stay: in
    one process, on a GPU.

    cfg: train.py's Config. who: the network's part in the run; the "base" under adapters gets none.
    """
    rolls_out = who == "generator" and cfg.stage in DISTILLATIONS
    stays = world.device.type == "cuda" and world.mesh is None
    # A sink that a TurningCache turns as it reads it lies elsewhere at each turn of the ring, and
    # a place does not say where: a graph would turn it as at the first one.
    turns = cfg.sink_rope == "relative"
    if rolls_out and cfg.compile and stays and not turns:
        record(model)


def forget(model: WanDiT) -> None:
    """Undo `record`, for weights that have been replaced or will move."""
    del model.compute
