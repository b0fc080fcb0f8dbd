"""Checkpoints of a run: a folder step-N of shards, by torch.distributed.checkpoint, and facts.json.

What is damaged, or was made to run code, is refused.
"""

import os
import pickle
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from wan5b.extras import untrusted
from wan5b.fsdp import World, local
from wan5b.optim import AdamW
from wan5b.util import (
    finite,
    first_line,
    origin,
    raise_interrupted,
    read_json,
    sync,
    write_json,
    writing,
)

UNFINISHED = "step-*.partial"  # folders, which the next save removes
INDEX = ".metadata"  # what torch.distributed.checkpoint writes into its folder
# What the index is made of, beside dtypes and paths.
PARTS = {
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

# ---------------------------------------------------------------------------------------- failures


@contextmanager
def first_cause() -> Iterator[None]:
    """What was raised first, of all that goes wrong in the block.

    On its way to another process an error loses it, and is what torch has made of it: of a full
    disk, that its writer stands at an unexpected place.
    """
    before = sys.exception()
    try:
        yield
    except Exception as error:
        raise_interrupted(error)
        first = origin(error, before)
        if first is error:
            raise
        raise first from error


def failure(error: BaseException) -> Exception:
    """Of a CheckpointException, what a process failed at. Raises Ctrl-C again, if that is it."""
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    raise_interrupted(error)
    return error


# ------------------------------------------------------------------------------------------ writing


class Writer(dcp.FileSystemWriter):
    """torch's writer. Whatever fails in a process is told to all of them, as it was raised.

    end: called in one process when all of the checkpoint is written.
    """

    def __init__(self, path: Path, end: Callable[[], None]):
        super().__init__(path)
        self.end = end

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner):
        with first_cause():
            return super().write_data(plan, planner)

    def finish(self, metadata: dcp.Metadata, results: list) -> None:
        with first_cause():
            super().finish(metadata, results)
            self.end()


def save(
    world: World, folder: Path, optimizers: Mapping[str, AdamW], facts: dict, keep: int = 2
) -> Path:
    """Write the checkpoint folder/step-N: all optimizers, and facts, whose "step" is N.

    It is written beside and then renamed, so it is whole or not there. The `keep` newest ones stay.
    Any number of processes can read it back. For every process to call. OSError as by `writing`, in
    all processes; then nothing of it is left.
    """
    path = folder / f"step-{facts['step']:07d}"
    partial = path.with_suffix(".partial")
    state = {who: optimizer.state() for who, optimizer in optimizers.items()}
    steps = {who: optimizer.steps for who, optimizer in optimizers.items()}
    needed = sum(tensor.nbytes for tensors in state.values() for tensor in tensors.values())

    def end() -> None:
        """The new one counts from its renaming on, when all of it is on the disk."""
        write_json(partial / "facts.json", facts | {"optimizer_steps": steps})
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        os.replace(partial, path)
        sync(folder)

    # What a run left unfinished goes, before anyone writes.
    if world.rank == 0:
        for unfinished in folder.glob(UNFINISHED):
            shutil.rmtree(unfinished)
    world.barrier()

    # All write their shards; in the files a tensor's name is that of its keys: who.group.weight.
    with writing(path, needed):
        try:
            dcp.save(state, storage_writer=Writer(partial, end), no_dist=world.mesh is None)
        except dcp.CheckpointException as error:
            if world.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            world.barrier()  # so that all see what is free then
            raise failure(error) from error

    # Then older ones go.
    if world.rank == 0:
        for old in complete(folder)[:-keep]:
            shutil.rmtree(old.rename(old.with_suffix(".partial")))
    world.barrier()
    return path


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def named(folder: Path) -> list[Path]:
    """What has the name of a checkpoint, whether it is one or not."""
    return [path for path in folder.glob("step-*") if re.fullmatch("step-[0-9]+", path.name)]


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first. Links, copies and notes beside them are none."""
    found = []
    for path in named(folder):
        if not path.is_symlink() and (path / "facts.json").is_file():
            found.append(path)
    return sorted(found, key=step_of)


def in_the_way(folder: Path, steps: range) -> list[Path]:
    """What has the name of a checkpoint of these steps and is none: a link, or one that has lost
    its facts.json. It can't be saved over.
    """
    known = complete(folder)
    return [path for path in named(folder) if step_of(path) in steps and path not in known]


# ------------------------------------------------------------------------------------------ reading


def is_checkpoint(path: Path) -> bool:
    """Whether this is a checkpoint folder of train.py, perhaps a link to one, or a copy."""
    named = re.match("step-[0-9]+", os.path.basename(os.path.realpath(path)))
    return named is not None and (path / INDEX).is_file()


class IndexUnpickler(pickle._Unpickler):
    """Opens the index of a checkpoint, a pickle, and runs nothing that does not belong into one.

    This unpickler is in Python: the one in C takes as much memory as a damaged pickle says.
    """

    def find_class(self, module: str, name: str):
        if module.startswith("pathlib"):
            return PurePath
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in PARTS.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} belongs into no index of a checkpoint")
        return super().find_class(module, name)


class Reader(dcp.FileSystemReader):
    """torch's reader of a checkpoint, which opens the shards safely, but not the index."""

    def read_metadata(self, *_, **__) -> dcp.Metadata:
        with Path(self.path, INDEX).open("rb") as file:
            return IndexUnpickler(file).load()

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner):
        with first_cause():
            return super().read_data(plan, planner)


@contextmanager
def opening(path: Path) -> Iterator[None]:
    """Whatever is wrong with a checkpoint as a ValueError that names the one before it."""
    try:
        yield
    except (Exception, dcp.CheckpointException) as error:  # torch raises anything for damaged files
        first = origin(failure(error))
        cause = f"{type(first).__name__}: {first_line(first)}"
        earlier = [other.name for other in complete(path.parent) if other.name < path.name]
        way_out = "there is none before it"
        if earlier:
            way_out = f"move it away and take {earlier[-1]}"
        raise ValueError(f"{path} is damaged or incomplete ({cause}); {way_out}") from error


def check_checkpoint(path: Path, prefix: str = "") -> None:
    """ValueError if the index of a checkpoint cannot be true, or a tensor is damaged.

    prefix: of the names of the tensors that are looked at.
    """
    with opening(path):
        index = Reader(path).read_metadata()
        untrusted.check_index(path, index)
        untrusted.check_sums(path, index, prefix)


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


def load(world: World, path: Path, optimizers: Mapping[str, AdamW]) -> dict:
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
