"""Kernel fusion by torch.compile, off until `enable` is called.

`@fused` marks the pieces of the networks that are bound by memory traffic when run op by op. Attention, convolutions
and caches stay outside, so a piece compiles once per shape, whatever the cache holds.
"""

from collections.abc import Callable
from functools import wraps

import torch

_enabled = False


def enable(on: bool = True) -> None:
    """Compile the marked pieces at their next call (tens of seconds once per process), or stop using them."""
    global _enabled
    _enabled = on
    torch._dynamo.config.recompile_limit = 64  # shapes of one piece: the VAE has about 20
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def fused(piece: Callable) -> Callable:
    compiled = None

    @wraps(piece)
    def call(*args):
        nonlocal compiled
        if not _enabled:
            return piece(*args)
        compiled = compiled or torch.compile(piece, dynamic=False)  # not before: it imports the compiler
        return compiled(*args)

    return call
