"""`fuse.enable` for scripts, with what makes the compiled kernels faster: `enable`."""

import torch

from wan5b import fuse

LONGEST_ROW = 4096  # that fits into the registers of a kernel's program


def enable(on: bool = True) -> None:
    """Compile the marked pieces from now on, or run them op by op again."""
    fuse.enable(on)
    if on:
        read_rows_once()


def read_rows_once() -> None:
    """Have compiled GPU kernels hold a row in registers while they reduce it, as norms do.

    By itself the compiler does so up to 1,024 numbers and reads longer rows twice. Holds for what
    this thread compiles. Kernels that an earlier version has left in the compiler's cache on disk
    stay as they are.
    """
    from torch._inductor.choices import InductorChoices  # only when needed: the compiler
    from torch._inductor.virtualized import V

    class Choices(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features, cooperative_reduction: bool) -> bool:
            if holds(features):
                return True
            default = InductorChoices.should_use_persistent_reduction
            return default(features, cooperative_reduction)

    V.set_choices_handler(Choices())


def holds(features) -> bool:
    """Whether a kernel is to hold its rows. features: torch's SIMDKernelFeatures."""
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.virtualized import V

    if features.get_reduction_hint() != ReductionHint.INNER:  # it reduces across rows
        return False
    if not V.graph.sizevars.statically_known_leq(features.reduction_numel, LONGEST_ROW):
        return False
    # Rows that RoPE turns are read flipped as well, and that is slower from registers.
    operations = set()
    for node in features.scheduler_nodes():
        operations |= {origin.target for origin in node.node.get_origins()}
    return torch.ops.prims.rev.default not in operations
