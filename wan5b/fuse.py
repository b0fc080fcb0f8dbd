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
        return torch.compile(piece, dynamic=False)  # only when needed: it imports the compiler

    @wraps(piece)
    def call(*args):
        return (compiled() if _enabled else piece)(*args)

    return call
