"""Optimizer state in host memory, which takes up to 14 bytes a weight off a GPU.

A step then streams the state through the GPU, weight by weight, while it computes.
"""

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from wan5b.optim import Groups, States, Storage

ALIGNMENT = 64  # bytes


class HostStorage(Storage):
    """The state of one optimizer, of which some groups lie in page-locked host memory.

    everything: all of them do. Otherwise, of a GPU's, the moving average alone: only the
    optimizer's step touches it, so it never takes the GPU's memory.
    """

    def __init__(self, device: torch.device, everything: bool):
        self.device = device
        self.everything = everything
        self.groups: Groups = {}  # those in host memory
        self.memory = torch.empty(0, dtype=torch.uint8)  # all of it, one piece
        self.segments: dict[str, Tensor] = {}  # name of a weight -> its bytes in memory

    def hosted(self, groups: Groups) -> Groups:
        """Those of the groups that are kept in host memory, not on the device."""
        if self.everything:
            return groups
        if self.device.type == "cuda" and "ema" in groups:
            return {"ema": groups["ema"]}
        return {}

    def make(self, weights: dict[str, Tensor], groups: Groups) -> States:
        """State of zeros for all weights; what is not hosted lies on the device."""
        assert not self.segments, "the storage already has the state of another optimizer"
        self.groups = self.hosted(groups)

        # A segment of the memory for each weight, which holds its groups one behind the other.
        width = sum(dtype.itemsize for dtype in self.groups.values())
        sizes = []
        for weight in weights.values():
            sizes.append(-(-width * weight.numel() // ALIGNMENT) * ALIGNMENT)  # rounded up
        self.memory = host_memory(sum(sizes), self.device)
        self.segments = dict(zip(weights, self.memory.split(sizes), strict=True))

        on_device = {g: dtype for g, dtype in groups.items() if g not in self.groups}
        states = super().make(weights, on_device)
        for name, segment in self.segments.items():
            states[name] |= carve(segment, weights[name].shape, self.groups)
        return states

    def stream(self, states: States) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Every weight's name and state in turn, on the device, to be changed in place.

        State in host memory passes through three buffers on the device. While one weight's is
        computed with, the next one's is copied in and the last one's out, each on a stream of its
        own. Events keep the order, so the host never waits. On a CPU the same copies run one after
        the other.
        """
        device = torch.get_device_module(self.device)
        here = device.current_stream()
        inward = device.Stream()
        outward = device.Stream()

        size = max(len(segment) for segment in self.segments.values())
        buffers = torch.empty(3, size, dtype=torch.uint8, device=self.device)
        # A buffer is free once what had its memory before, on this stream, is done with it.
        start = here.record_event()
        free = [start, start, start]

        for turn, (name, state) in enumerate(states.items()):
            slot = turn % 3
            segment = self.segments[name]
            buffer = buffers[slot, : len(segment)]

            inward.wait_event(free[slot])
            with device.stream(inward):
                buffer.copy_(segment, non_blocking=True)
            here.wait_stream(inward)

            yield name, state | carve(buffer, state["exp_avg_sq"].shape, self.groups)

            outward.wait_stream(here)
            with device.stream(outward):
                segment.copy_(buffer, non_blocking=True)
            free[slot] = outward.record_event()

        here.wait_stream(outward)  # so that the buffers' memory can go to others


def host_memory(size: int, device: torch.device) -> Tensor:
    """Zeroed bytes in host memory, page-locked for a GPU as long as the tensor lives.

    They are registered as one piece, since torch's own pinned memory comes in powers of two.
    """
    # Filled by all threads at once, so that the pages are there to be locked.
    memory = torch.zeros(size, dtype=torch.uint8)
    if size and device.type == "cuda":
        runtime = torch.cuda.cudart()
        torch.cuda.check_error(runtime.cudaHostRegister(memory.data_ptr(), size, 0))
        unlock = weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr())
        unlock.atexit = False  # CUDA may be gone before the interpreter is
    return memory


def carve(memory: Tensor, shape: torch.Size, groups: Groups) -> dict[str, Tensor]:
    """Views of bytes as one tensor of this shape for each group, one behind the other."""
    tensors = {}
    start = 0
    for group, dtype in groups.items():
        end = start + shape.numel() * dtype.itemsize
        tensors[group] = memory[start:end].view(dtype).view(shape)
        start = end
    return tensors
