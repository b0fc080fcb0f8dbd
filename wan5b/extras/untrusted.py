"""What strangers' files say, checked before it is believed. ValueError of one line for what is
wrong.

JSON: `checked` compares values with a table of kinds. Zips of torch.save: torch maps them as they
lie and believes what they say of their sizes; `check_zip` does not. Tensors: `check_tensors`.
"""

import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from mmap import ACCESS_READ, mmap
from pathlib import Path, PurePath
from reprlib import repr as short
from typing import Any, NamedTuple
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.serialization import StorageType

from wan5b.util import reading

MANY = 5000  # tensors; the largest of our networks has 1095

# ------------------------------------------------------------------------------------------- values


class Kind(NamedTuple):
    """What a value may be: in words, and as a test."""

    words: str
    fits: Callable[[Any], bool]


TEXT = Kind("a text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
NAMED = Kind("names and values", lambda value: isinstance(value, dict))
NUMBER = Kind("a number", lambda value: type(value) in (int, float) and abs(value) < 1e300)
POSITIVE = Kind("a number above 0", lambda value: NUMBER.fits(value) and value > 0)


def whole(least: int, most: int) -> Kind:
    """The whole numbers from least to most; 3.0 is one."""

    def fits(value: Any) -> bool:
        return NUMBER.fits(value) and least <= value <= most and value == int(value)

    return Kind(f"a whole number from {least} to {most}", fits)


def as_whole(value: Any) -> Any:
    """3.0 as 3, in lists too; other values as they are."""
    if isinstance(value, list):
        return [as_whole(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def each(kind: Kind) -> Kind:
    """Lists of a kind, with something in them."""

    def fits(value: Any) -> bool:
        return isinstance(value, list) and len(value) > 0 and all(map(kind.fits, value))

    return Kind(f"a list, each {kind.words}", fits)


def named(kind: Kind) -> Kind:
    """Values of a kind, each under a name."""

    def fits(value: Any) -> bool:
        return NAMED.fits(value) and all(map(kind.fits, value.values()))

    return Kind(f"names and values, each {kind.words}", fits)


COUNT = whole(0, 2**53)
SIZE = whole(1, 2**20)  # no network is anywhere near so large
LAYERS = whole(1, 1000)
CONFIG = {  # of all three networks
    **dict.fromkeys(("dim", "ffn_dim", "in_dim", "out_dim", "text_dim", "freq_dim"), SIZE),
    **dict.fromkeys(("dec_dim", "z_dim", "vocab", "dim_attn", "dim_ffn", "num_buckets"), SIZE),
    "num_heads": SIZE,
    "num_layers": LAYERS,
    "num_res_blocks": LAYERS,
    "dim_mult": each(SIZE),
    "temperal_downsample": each(FLAG),
    "text_len": whole(1, 2**14),
    "patch_size": each(SIZE),
    "eps": POSITIVE,
    "model_type": TEXT,
    "qk_norm": FLAG,
    "cross_attn_norm": FLAG,
}
METADATA = {
    "config": NAMED,
    "stage": TEXT,
    "recipe": TEXT,
    "step": COUNT,
    "optimizer_steps": named(COUNT),
    "levels": each(NUMBER),
    "shift": Kind("a number from 1e-6", lambda value: NUMBER.fits(value) and value >= 1e-6),
    "chunk": SIZE,
    "prefix": whole(0, 2**20),
    "training": NAMED,
    "data": NAMED,
}


def checked(where: Path, values: dict, kinds: dict[str, Kind]) -> dict:
    """The values, if those that kinds names are of its kind. Those that are absent are no fault."""
    for name, kind in kinds.items():
        if name in values and not kind.fits(values[name]):
            raise ValueError(f"{where}: {name} is {short(values[name])}, not {kind.words}")
    return values


def metadata(where: Path, said: dict) -> dict:
    """What an export or a checkpoint says of itself. A null says nothing."""
    return checked(where, {name: v for name, v in said.items() if v is not None}, METADATA)


# -------------------------------------------------------------------------------------------- files


class Nothing(dict):
    """Stands for every class and function in a pickle: takes what it is given and does nothing."""

    __hash__ = object.__hash__

    def __init__(self, *_, **__):
        super().__init__()

    def ignore(self, *_):
        pass

    append = extend = add = __setstate__ = __setitem__ = ignore


class Storages(pickle._Unpickler):
    """Reads a pickle only for the bytes that its storages should have; nothing in it is called.

    This one is in Python: the one in C takes as much memory as a damaged pickle says.
    """

    def __init__(self, file):
        super().__init__(file)
        self.sizes = {}

    def find_class(self, module: str, name: str) -> Any:
        return name if name.endswith("Storage") else Nothing

    def persistent_load(self, saved: tuple) -> Nothing:
        _, kind, key, _, numbers = saved
        dtype = torch.uint8 if kind == "UntypedStorage" else StorageType(kind).dtype
        self.sizes[key] = numbers * dtype.itemsize
        return Nothing()


def check_zip(path: Path) -> None:
    """Whether a file of torch.save holds its tensors as they are mapped: whole, stored, apart, and
    as they were written. A file that stays as it is is read through once.
    """
    found = path.stat() if path.is_file() else None
    _check_zip(path, found and (found.st_ino, found.st_size, found.st_mtime_ns))


@lru_cache
def _check_zip(path: Path, state: tuple[int, int, int] | None) -> None:
    with reading(path, "no zip of a state dict"), zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) < len(archive.infolist()):
            raise ValueError("two entries of one name")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise ValueError("compressed entries, which torch.save never writes")
        top = archive.namelist()[0].partition("/")[0]
        pickled = entries[f"{top}/data.pkl"]
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            start = _check_sums(content, archive)[pickled.filename]
            storages = Storages(io.BytesIO(content[start : start + pickled.file_size]))

        # Each storage must have the bytes that its tensors are made of.
        storages.load()
        for key, size in storages.sizes.items():
            held = entries[f"{top}/data/{key}"].file_size
            if held != size:
                raise ValueError(f"storage {key} has {held} bytes, should have {size}")


def _check_sums(content: mmap | memoryview, archive: zipfile.ZipFile) -> dict[str, int]:
    """Where the content of each entry begins, by name.

    content: the whole zip. ValueError unless its entries lie one behind the other and fit their
    checksums.
    """
    # Each entry must end before the next one, or the index at the end, begins.
    starts = {}
    following = archive.start_dir
    for entry in sorted(archive.infolist(), key=lambda entry: -entry.header_offset):
        archive.fp.seek(entry.header_offset + 26)
        name, extra = struct.unpack("<HH", archive.fp.read(4))
        starts[entry.filename] = start = entry.header_offset + 30 + name + extra
        if start + entry.file_size > following:
            raise ValueError(f"{entry.filename} overlaps what follows it")
        following = entry.header_offset

    def check(entry: zipfile.ZipInfo) -> None:
        start = starts[entry.filename]
        with memoryview(content) as whole, whole[start : start + entry.file_size] as held:
            # torch.save can be told to leave checksums out, which are 0 then.
            if entry.CRC and crc32(held) != entry.CRC:
                raise ValueError(f"{entry.filename} does not fit its checksum")

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(check, archive.infolist()))  # raises what a check raised
    return starts


def check_tensors(path: Path, tensors: dict[str, Tensor], room: float) -> None:
    """Whether tensors are as networks have them, before anything is made from their sizes.

    room: bytes of the files that they come from.
    """
    if len(tensors) > MANY:
        raise ValueError(f"{path} holds {len(tensors)} tensors, more than any network here has")
    for name, tensor in tensors.items():
        if not name.isprintable():
            raise ValueError(f"{path} holds a tensor named {name!r}, which no network has")
        # Not sparse, not a part of many processes', not on a device without memory.
        dense = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
        if not dense or tensor.device.type != "cpu":
            raise ValueError(f"{path}: {name} is no plain tensor; save a plain state dict")
        # ComfyUI marks its scaled files by a tensor that may have no elements.
        empty = not tensor.numel() and name.split(".")[-1] != "scaled_fp8"
        if empty or tensor.nbytes > room:
            shape = list(tensor.shape)
            raise ValueError(f"{path}: {name} of shape {shape} is empty, or larger than its file")


def check_index(path: Path, index: Any) -> None:
    """Whether the files of a checkpoint can hold what its index says, and the index all of it.

    index: of checkpoints.Reader. Whatever is raised, is raised for a damaged or a dishonest index.
    """
    needed = 0
    for name, entry in index.state_dict_metadata.items():
        numbers = math.prod(entry.size)
        needed += numbers * entry.properties.dtype.itemsize
        if numbers != sum(math.prod(chunk.sizes) for chunk in entry.chunks):
            raise ValueError(f"the chunks of {name} are not the whole of it")
    held = sum(file.stat().st_size for file in path.glob("*.distcp"))
    if needed > held:
        raise ValueError(f"its tensors need {needed} bytes, its files have {held}")
    names = {place.relative_path for place in index.storage_data.values()}
    if any(PurePath(name).name != name for name in names):
        raise ValueError("it names files that do not lie in it")


def check_sums(path: Path, index: Any, prefix: str = "") -> None:
    """Whether a checkpoint's tensors fit their checksums; of several processes each looks at a
    part.

    index: as of `check_index`. prefix: of the names of those that are looked at.
    """
    places = set()
    for key, place in index.storage_data.items():
        if key.fqn.startswith(prefix):
            places.add((place.relative_path, place.offset, place.length))
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    for name, offset, length in sorted(places)[rank::size]:
        with Path(path, name).open("rb") as file:
            file.seek(offset)
            content = file.read(length)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            _check_sums(memoryview(content), archive)
