"""Kernel fusion by torch.compile, from outside: off until `enable` is called.

`@fused` marks the pieces of the networks that are bound by memory traffic when run op by op.
Attention, convolutions and caches stay outside, so a piece compiles once per shape of its inputs,
whatever the cache holds.
"""

from collections.abc import Callable
from functools import cache, wraps

import torch

_enabled = False


def enable(on: bool = True) -> None:
    """Compile the marked pieces at their next call without grad, or run them op by op again.

    Compiling takes tens of seconds once per process.
    """
    global _enabled
    _enabled = on
    torch._dynamo.config.recompile_limit = 256  # shapes of one piece: the VAE has about 20
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def fused(piece: Callable) -> Callable:
    """Mark a function of positional arguments: compiled while enabled and without grad."""

    @cache
    def compiled() -> Callable:
        return torch.compile(piece, dynamic=False)  # only when needed: it imports the compiler

    @wraps(piece)
    def call(*args):
        if _enabled and not torch.is_grad_enabled():
            return compiled()(*args)
        return piece(*args)

    return call
