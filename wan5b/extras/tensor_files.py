"""Tensors -> files of safetensors, one tensor at a time; folders that are whole or not there.

A tensor is read, made, cast and checked when its turn comes, so the host holds one tensor and no
model: `save_file` takes all of them at once.
"""

import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from wan5b.extras.scaled import Made
from wan5b.util import finite, sync, write_json, writing
from wan5b.weights import about, put

GB = 10**9
SHARD = 10 * GB  # diffusers' own limit, by which upstream's three shards were made

# What safetensors calls a dtype, and what a file's name does.
DTYPES = {
    torch.float32: ("F32", "fp32"),
    torch.float16: ("F16", "fp16"),
    torch.bfloat16: ("BF16", "bf16"),
    torch.uint8: ("U8", "u8"),
}

# ---------------------------------------------------------------------------------------- tensors


class Entry(NamedTuple):
    """A tensor to write, and the dtype to write it in."""

    tensor: Tensor | Made
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.tensor.shape.numel() * self.dtype.itemsize

    def label(self, name: str) -> str:
        """What errors call it: also the file that it comes from, if that is known."""
        file = getattr(self.tensor, "file", None)
        return f"{file}: {name}" if file else name

    def value(self) -> Tensor:
        """It in its dtype on the CPU. ValueError for NaN, infinity, float8 without its scale."""
        if isinstance(self.tensor, Tensor) and self.tensor.dtype == self.dtype:
            value = self.tensor.to("cpu").contiguous()
            if not finite(value):
                raise ValueError("NaN or infinity among the weights; download or export them again")
            return value
        value = torch.empty(self.tensor.shape, dtype=self.dtype)
        try:
            put(value, self.tensor)
        except ValueError as error:
            if self.dtype != torch.float16:
                raise
            raise ValueError(f"{error}; or beyond float16's range: take bfloat16") from error
        return value


def written_dtype(tensor: Tensor | Made) -> torch.dtype:
    """The dtype in which a tensor is kept: its own; bfloat16 for float8, with a scale or without;
    float32 for what is wider.
    """
    if isinstance(tensor, Made) or tensor.dtype.itemsize == 1:
        return torch.bfloat16
    return tensor.dtype if tensor.dtype in DTYPES else torch.float32


# ------------------------------------------------------------------------------------------ files


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Fill a folder so that `path` is all of it or not there, even after a crash.

    Yields the folder to fill, path.partial; when the block fails, it is removed. ValueError if path
    exists, or a .partial, which may be another run's at work.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    if path.exists():
        raise ValueError(f"{path} exists; choose another name")
    if partial.exists():
        raise ValueError(f"{partial} exists, of a run at work or one that was killed; delete it")
    with writing(path):
        partial.mkdir(parents=True)
        try:
            yield partial
            for inside in [*partial.rglob("*"), partial]:
                sync(inside)
            partial.rename(path)
            sync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_stream(path: Path, entries: Mapping[str, Entry], header: Mapping[str, str]) -> None:
    """A new file of safetensors, tensor by tensor. header: its metadata.

    OSError, naming the file, if it is there already or the disk is full; ValueError, naming the
    tensor, for weights that are not finite.
    """
    # The header comes first in the file. The widest dtypes lead: so each tensor lies at a multiple
    # of its own width.
    order = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))
    described = {"__metadata__": dict(header)}
    end = 0
    for name in order:
        entry = entries[name]
        start = end
        end += entry.nbytes
        dtype, _ = DTYPES[entry.dtype]
        shape = list(entry.tensor.shape)
        described[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)

    # Then the bytes of one tensor after the other.
    with writing(path, end), path.open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in tqdm(order, path.name, disable=None):  # none where nobody looks
            with about(entries[name].label(name)):
                value = entries[name].value()
            file.write(value.reshape(-1).view(torch.uint8).numpy())


def split(entries: Mapping[str, Entry], limit: int) -> list[dict[str, Entry]]:
    """Shards of at most so many bytes, in order; a larger tensor has one of its own."""
    parts = [{}]
    size = 0
    for name, entry in entries.items():
        if parts[-1] and size + entry.nbytes > limit:
            parts.append({})
            size = 0
        parts[-1][name] = entry
        size += entry.nbytes
    return parts


def write_shards(
    folder: Path, stem: str, entries: Mapping[str, Entry], header: Mapping[str, str], limit: int
) -> None:
    """stem.safetensors; above the limit, in bytes, shards of at most so much and their index."""
    parts = split(entries, limit)
    if len(parts) == 1:
        write_stream(folder / f"{stem}.safetensors", entries, header)
        return

    weight_map = {}
    for i, part in enumerate(parts):
        name = f"{stem}-{i + 1:05}-of-{len(parts):05}.safetensors"
        write_stream(folder / name, part, header)
        weight_map |= dict.fromkeys(part, name)
    total = sum(entry.nbytes for entry in entries.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / f"{stem}.safetensors.index.json", index)
