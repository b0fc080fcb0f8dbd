"""The ground floor: random numbers by keys, whole files or none, one-line errors."""

import json
import os
import pickle
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

# ------------------------------------------------------------------------------------------- chance


def rng(device: str | torch.device, *keys: int | str) -> torch.Generator:
    """A generator of random numbers that the keys alone determine: (seed, step, sample, "noise").

    All chance in training comes from here. So it does not depend on the number of processes, and
    a checkpoint has no state of generators to save. CPU and CUDA give different numbers.
    """
    assert all(isinstance(key, int | str) for key in keys), keys
    digest = blake2b(repr(keys).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))


# -------------------------------------------------------------------------------------------- files


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file so that `path` is always the old one or the whole new one, even after a crash.

    Makes the folder and yields the name to write to, beside `path`, which no other process uses.
    When the block ends, that file is put on the disk and renamed; when the block fails, it is
    removed and `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _own_partial(path)
    try:
        yield partial

        # The content first, then the name: the disk may reorder what is not waited for.
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:  # a full disk, say
        raise OSError(f"cannot write {path}: {first_line(error)}") from error
    finally:
        partial.unlink(missing_ok=True)


def _own_partial(path: Path) -> Path:
    """A name beside `path` for this process alone; what killed ones left is removed."""
    host = platform.node()
    owned = re.compile(re.escape(path.name) + rf"(\.{re.escape(host)}-(\d+))?\.partial")
    for file in path.parent.iterdir():
        match = owned.fullmatch(file.name)
        if match and not (match[2] and _is_alive(int(match[2]))):
            file.unlink(missing_ok=True)
    return path.with_name(f"{path.name}.{host}-{os.getpid()}.partial")


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except OSError as error:
        return isinstance(error, PermissionError)  # it is somebody else's
    return True


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file, with metadata in its header, written as by `replacing`."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(path) as partial:
        save_file(tensors, partial, metadata)
        partial.chmod(0o644)  # save_file lets nobody else read it


def write_json(path: str | Path, value: Any) -> None:
    """An indented UTF-8 file, written as by `replacing`."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with replacing(path) as partial:
        # What a command line holds that is not UTF-8 comes as lone surrogates: written as escapes.
        partial.write_text(text, "utf-8", "backslashreplace")


# ------------------------------------------------------------------------------------------ reading

# What a file is in place of what its name says, by how it begins.
IMPOSTORS = {
    rb"version https://git-lfs": "a Git LFS pointer; run `git lfs pull` in its repository",
    rb"GGUF": "a GGUF file, whose quantised weights cannot be read; take the original ones",
    rb"\W*<(!doctype|html|\?xml)": "a web page in the file's place; log in and download it again",
}


@contextmanager
def reading(path: Path, otherwise: str) -> Iterator[None]:
    """Whatever is wrong with a file as a ValueError of one line, with the way out.

    otherwise: what it is if it is not damaged, as "not JSON".
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file, but it belongs there; download or copy it too")
    with path.open("rb") as file:
        start = file.read(64)
    for pattern, what in IMPOSTORS.items():
        if re.match(pattern, start, re.IGNORECASE):
            raise ValueError(f"{path} is {what}")
    try:
        yield
    except pickle.UnpicklingError as error:
        refused = "is damaged or needs code execution, which is refused"
        way_out = "save a plain state dict with torch.save where it was made"
        raise ValueError(f"{path} {refused}; {way_out}") from error
    except Exception as error:  # the libraries raise anything for a damaged file
        cause = f"{otherwise} ({type(error).__name__}: {first_line(error)})"
        raise ValueError(
            f"{path} is truncated, corrupt or {cause}; download it again or resave"
        ) from error


def read_json(path: Path) -> dict:
    """The names and values in a JSON file, which may begin with a byte order mark."""
    with reading(path, "not JSON"):
        values = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(values, dict):
            raise ValueError("no names and values")
        return values


def finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. A sum shows it in a tenth of the time that looking
    takes.
    """
    if tensor.is_meta or not tensor.is_floating_point():
        return True
    if tensor.dtype.itemsize == 1:
        tensor = tensor.float()  # of float8 torch can do neither
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


# ------------------------------------------------------------------------------------------- errors


def first_line(error: Exception) -> str:
    """What an error says, without the lines that some libraries add, and not all they quote."""
    return str(error).partition("\n")[0][:300]


def nearest(value: int, step: int, least: int) -> str:
    """The two of least, least + step, ... around `value`, for error messages: "81 or 85"."""
    steps = max((value - least) // step, 0)
    low = least + steps * step
    return f"{low} or {low + step}"
