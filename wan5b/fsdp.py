"""The processes of a run: how they start, and how they shard the networks.

A single process takes the same path, without a process group and without sharded parameters.
"""

import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from wan5b.weights import put


class World:
    """The processes of a run, as torchrun's environment describes them; without it, a single one.

    shard: how many processes share one copy of the weights (FSDP); 0: those of a node. Where there
    are more processes, every such group holds a copy of its own (HSDP): `average` brings their
    gradients together. ValueError if the processes do not divide into groups of this size.
    """

    def __init__(self, device: str, shard: int = 0):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.device = torch.device(device)
        if device == "cuda":
            self.device = torch.device(device, int(os.environ.get("LOCAL_RANK", 0)))

        # With one process there is no mesh, and nothing is sharded. A mesh is of those processes
        # that share this one's copy of the weights.
        self.shards = 1
        self.mesh: dist.DeviceMesh | None = None
        self.host_mesh: dist.DeviceMesh | None = None
        if self.size > 1:
            self._connect(shard or self.local_size)

        self.stopping = False
        signal.signal(signal.SIGTERM, self._stop)

    def _connect(self, shards: int) -> None:
        """Start the process group, and lay it out in copies of the weights and their shards."""
        if self.size % shards:
            raise ValueError(f"{self.size} processes do not divide into groups of {shards}")
        backend = "gloo"
        if self.device.type == "cuda":
            # Gathered weights and activations take turns in memory. What one leaves must join to
            # blocks large enough for the other: segments that grow let it.
            if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # an older name of the same
                os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
            torch.cuda.set_device(self.device)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend)

        # A DTensor lies on its mesh's device: one that is in host memory needs a mesh there.
        self.shards = shards
        layout = {"mesh_shape": (self.size // shards, shards), "mesh_dim_names": ("copy", "shard")}
        mesh = dist.init_device_mesh(self.device.type, **layout)
        self.mesh = mesh["shard"]
        # The processes that hold what this one holds, one in each copy.
        self.same_shard = mesh.get_group("copy")
        self.host_mesh = dist.init_device_mesh("cpu", **layout)["shard"]

    def _stop(self, *_) -> None:
        """SIGTERM is only noted: a run asks `stops` where it can leave off."""
        self.stopping = True

    def close(self) -> None:
        """End the process group."""
        if self.mesh is not None:
            dist.destroy_process_group()
            # gloo's threads take the interpreter's lock to drop their last works, and abort the
            # process if the interpreter is gone by then.
            time.sleep(0.2)

    def shard(self, model: nn.Module) -> nn.Module:
        """Shard a model that still lies on the meta device. It has no memory yet."""
        if self.mesh is not None:
            policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
            for unit in units(model):
                fully_shard(unit, mesh=self.mesh, mp_policy=policy, reshard_after_forward=True)
        return model

    @contextmanager
    def gathered(self, model: nn.Module) -> Iterator[None]:
        """Keep the parameters of a sharded model gathered over many forwards without grad."""
        if self.mesh is not None:
            model.set_reshard_after_forward(False)
        yield
        if self.mesh is not None:
            model.set_reshard_after_forward(True)
            for unit in units(model):
                unit.reshard()

    def average(self, grads: Iterable[Tensor]) -> None:
        """Replace each by its mean over the copies of the weights (HSDP).

        Done once a step, in place of FSDP's own after every backward: that would move as much for
        each micro-batch, and keep all gradients a second time until the backward ends.
        """
        copies = self.size // self.shards
        if copies > 1:
            for grad in grads:
                dist.all_reduce(grad.div_(copies), group=self.same_shard)

    def share(self, count: int) -> range:
        """This process's part of `count` samples. ValueError unless all get the same number."""
        if count % self.size:
            raise ValueError(f"the global batch {count} does not divide over {self.size} processes")
        part = count // self.size
        return range(self.rank * part, (self.rank + 1) * part)

    def mean(self, values: dict[str, Tensor]) -> dict[str, float]:
        """Means of scalars over processes, which must name them in the same order."""
        stacked = torch.stack([value.detach().float() for value in values.values()])
        if self.mesh is not None:
            dist.all_reduce(stacked)
        return dict(zip(values, (stacked / self.size).tolist(), strict=True))

    def stops(self) -> bool:
        """Whether any process has got SIGTERM: the same answer everywhere.

        Asked through host memory, so only the host waits for the other processes, not the device.
        """
        return self.mean({"stopping": torch.tensor(float(self.stopping))})["stopping"] > 0

    def exchange(self, value: Any) -> list:
        """What each process gives, by its rank; for every process to call."""
        values = [value] * self.size
        if self.mesh is not None:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.mesh is not None:
            dist.barrier()


def units(model: nn.Module) -> list[nn.Module]:
    """What FSDP gathers and frees as one: each block, and last the model for all that is left."""
    return [*model.blocks, model]


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor (all, if it isn't sharded); shares memory, has no grad."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, which may be sharded: then for every process to call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_for(parameter: Tensor, full: Tensor) -> Tensor:
    """The rows of the full tensor that are this process's shard of the parameter."""
    if not isinstance(parameter, DTensor):
        return full
    # FSDP2 splits axis 0, rounded up: the last shards may have fewer rows, or none.
    mesh = parameter.device_mesh
    rows = -(-len(full) // mesh.size(-1))
    return full[mesh.get_local_rank("shard") * rows :][:rows]


def copy_part(parameter: Tensor, full: Tensor) -> None:
    """Fill this process's shard of the parameter from the full tensor, as `weights.put` does."""
    put(local(parameter), part_for(parameter, full))
