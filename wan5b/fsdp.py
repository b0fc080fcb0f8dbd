"""The processes of a run: how they start, shard the networks, write and read checkpoints.

A single process takes the same path, without a process group and without sharded parameters.
"""

import os
import pickle
import re
import shutil
import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from wan5b.util import finite, first_line, read_json, sync, write_json
from wan5b.weights import put

# What the index of a checkpoint is made of, beside dtypes and paths.
INDEX = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "StorageMeta", "MetadataIndex", "TensorStorageMetadata", "TensorProperties"),
        *("ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
}

# torch warns of a checkpoint without a process group: a single process saves like that on purpose.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")


class World:
    """The processes of a run, as torchrun's environment describes them; without it, a single one.

    shard: how many processes share one copy of the weights (FSDP); 0: those of a node. Where there
    are more processes, every such group holds a copy of its own (HSDP). ValueError if the processes
    do not divide into groups of this size.
    """

    def __init__(self, device: str, shard: int = 0):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.device = torch.device(device)
        if device == "cuda":
            self.device = torch.device(device, int(os.environ.get("LOCAL_RANK", 0)))

        # With one process there is no mesh, and nothing is sharded.
        self.shards = 1
        self.mesh: dist.DeviceMesh | None = None
        self.host_mesh: dist.DeviceMesh | None = None
        if self.size > 1:
            self._connect(shard or self.local_size)

        self.stopping = False
        signal.signal(signal.SIGTERM, self._stop)

    def _connect(self, shards: int) -> None:
        """Start the process group, and lay it out as [copies of the weights, shards of a copy]."""
        if self.size % shards:
            raise ValueError(f"{self.size} processes do not divide into groups of {shards}")
        backend = "gloo"
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend)

        # A DTensor lies on its mesh's device: one that is in host memory needs a mesh there.
        self.shards = shards
        self.mesh = self._make_mesh(self.device.type)
        self.host_mesh = self._make_mesh("cpu")

    def _make_mesh(self, device_type: str) -> dist.DeviceMesh:
        shape = (self.size // self.shards, self.shards)
        mesh = dist.init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))
        return mesh["shard"] if shape[0] == 1 else mesh  # of one axis: FSDP; of two: HSDP

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


def cause_of(error: BaseException) -> str:
    """What went wrong, on one line; of a CheckpointException, what a process failed at.

    Raises Ctrl-C again, if that is behind it.
    """
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    first = error
    while first.__context__ and isinstance(first, Exception):
        first = first.__context__
    if not isinstance(first, Exception):
        raise first  # torch wraps it like an error
    return f"{type(error).__name__}: {first_line(error)}"


def save(
    world: World, folder: Path, optimizers: Mapping[str, Any], facts: dict, keep: int = 2
) -> Path:
    """Write the checkpoint folder/step-N: all optimizers (optim.AdamW), and facts, whose "step" is
    N.

    It is written beside and then renamed, so it is whole or not there. The `keep` newest ones stay.
    Any number of processes can read it back. For every process to call.
    """
    path = folder / f"step-{facts['step']:07d}"
    partial = path.with_suffix(".partial")
    state = {who: optimizer.state() for who, optimizer in optimizers.items()}
    steps = {who: optimizer.steps for who, optimizer in optimizers.items()}

    # What a run left unfinished goes, before anyone writes.
    if world.rank == 0:
        for unfinished in folder.glob("step-*.partial"):
            shutil.rmtree(unfinished)
    world.barrier()

    # All write their shards; in the files a tensor's name is that of its keys: who.group.weight.
    try:
        dcp.save(state, checkpoint_id=partial, no_dist=world.mesh is None)
    except dcp.CheckpointException as error:
        raise OSError(f"cannot write the checkpoint {path}: {cause_of(error)}") from error

    # The new one counts from its renaming on, when all of it is on the disk; then older ones go.
    if world.rank == 0:
        write_json(partial / "facts.json", facts | {"optimizer_steps": steps})
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        os.replace(partial, path)
        sync(folder)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old.rename(old.with_suffix(".partial")))
    world.barrier()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first. Links, copies and notes beside them are none."""
    found = []
    for path in folder.glob("step-*"):
        named = re.fullmatch("step-[0-9]+", path.name)
        if named and not path.is_symlink() and (path / "facts.json").is_file():
            found.append(path)
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


# ------------------------------------------------------------------------------ reading checkpoints


class IndexUnpickler(pickle._Unpickler):
    """Opens the index of a checkpoint, a pickle, and runs nothing that does not belong into one.

    This unpickler is in Python: the one in C takes as much memory as a damaged pickle says.
    """

    def find_class(self, module: str, name: str):
        if module.startswith("pathlib"):
            return PurePath
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in INDEX.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} belongs into no index of a checkpoint")
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    """torch's reader of a checkpoint, which opens the shards safely, but not the index."""

    def read_metadata(self, *_, **__) -> dcp.Metadata:
        with Path(self.path, ".metadata").open("rb") as file:
            return IndexUnpickler(file).load()


@contextmanager
def opening(path: Path) -> Iterator[None]:
    """Whatever is wrong with a checkpoint as a ValueError that names the one before it."""
    try:
        yield
    except (Exception, dcp.CheckpointException) as error:  # torch raises anything for damaged files
        cause = cause_of(error)
        earlier = [other.name for other in checkpoints(path.parent) if other.name < path.name]
        way_out = "there is none before it"
        if earlier:
            way_out = f"move it away and take {earlier[-1]}"
        raise ValueError(f"{path} is damaged or incomplete ({cause}); {way_out}") from error


def read_facts(path: Path) -> dict:
    """What a checkpoint says of itself."""
    with opening(path):
        return read_json(path / "facts.json")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The generator's average in a checkpoint, if kept, else its masters: whole float32 tensors.

    Needs no other process, but memory for all that it returns. ValueError if it is damaged.
    """
    with opening(path):
        entries = Reader(path).read_metadata().state_dict_metadata
        averaged = any(key.startswith("generator.ema.") for key in entries)
        prefix = "generator.ema." if averaged else "generator.master."
        state = {key: torch.empty(entries[key].size) for key in entries if key.startswith(prefix)}
        dcp.load(state, storage_reader=Reader(path), no_dist=True)
    return {key.removeprefix(prefix): value for key, value in state.items()}


def load(world: World, path: Path, optimizers: Mapping[str, Any]) -> dict:
    """Read a checkpoint into the optimizers and their models, resharded as needed.

    Returns its facts. For every process to call. ValueError if it is damaged.
    """
    facts = read_facts(path)
    state = {who: optimizer.state() for who, optimizer in optimizers.items()}
    with opening(path):
        dcp.load(state, storage_reader=Reader(path), no_dist=world.mesh is None)
        for who, optimizer in optimizers.items():
            bad = [name for name, value in state[who].items() if not finite(local(value))]
            if bad:
                raise ValueError(f"NaN or infinity in {who}.{bad[0]}")
            optimizer.loaded(state[who], int(facts["optimizer_steps"][who]))
    return facts
