"""Kernel fusion by torch.compile, from outside: off until `enable` is called.

`@fused` marks the pieces of the networks that are bound by memory traffic when run op by op.
Attention, convolutions and caches stay outside, so a piece compiles once per shape of its inputs,
whatever the cache holds. With grad it compiles to a forward and a backward of its own, once more
for each combination of inputs and weights that carry grad (a teacher's weights don't). All layers,
and networks of the same sizes, share what is compiled: weights are inputs, read anew at each call.
Hooks and checkpointing are around whole layers, outside the pieces too: FSDP gathers before a piece
runs, and checkpointing runs it again as it is.
"""

from collections.abc import Callable
from functools import cache, wraps

import torch

_enabled = False


def enable(on: bool = True) -> None:
    """Compile the marked pieces at their next call, with grad and without, or run them op by op
    again.

    Compiling takes tens of seconds once per process. A piece has about four kinds of inputs in a
    stage of training; over 256 are an error.
    """
    global _enabled
    _enabled = on
    torch._dynamo.config.recompile_limit = 256  # shapes of one piece: the VAE has about 20
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def fused(piece: Callable) -> Callable:
    """Mark a function of positional arguments: compiled while enabled.

    One that works in place is called without grad only.
    """

    @cache
    def compiled() -> Callable:
        _read_rows_once()
        return torch.compile(piece, dynamic=False)  # only when needed: it imports the compiler

    @wraps(piece)
    def call(*args):
        return (compiled() if _enabled else piece)(*args)

    return call


def _read_rows_once() -> None:
    """Have GPU kernels hold a row of up to 4,096 numbers in registers while they reduce it.

    By itself the compiler does so up to 1,024, and reads the rows of our norms twice. Not for rows
    that RoPE turns, which are read in two orders: for these it is slower.
    """
    from torch._inductor.choices import InductorChoices
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    class Choices(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features, cooperative_reduction: bool) -> bool:
            row = features.get_reduction_hint() == ReductionHint.INNER
            fits = V.graph.sizevars.statically_known_leq(features.reduction_numel, 4096)
            nodes = [node.node for node in features.scheduler_nodes()]
            done = {origin.target for node in nodes for origin in node.get_origins()}
            once = row and fits and torch.ops.prims.rev.default not in done
            by_itself = InductorChoices.should_use_persistent_reduction
            return once or by_itself(features, cooperative_reduction)

    V.set_choices_handler(Choices())
