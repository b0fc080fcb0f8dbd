"""The ground floor: random numbers by keys, whole files or none, one-line errors."""

import errno
import json
import os
import pickle
import platform
import re
import shutil
import sys
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
def replacing(path: str | Path, needed: float = 0) -> Iterator[Path]:
    """Write a file so that `path` is always the old one or the whole new one, even after a crash.

    Makes the folder and yields the name to write to, beside `path`, which no other process uses.
    When the block ends, that file is put on the disk and renamed; when the block fails, it is
    removed and `path` stays as it was. needed, errors: as of `writing`.
    """
    path = Path(path)
    with writing(path, needed):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _own_partial(path)
        try:
            yield partial

            # The content first, then the name: the disk may reorder what is not waited for.
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def _own_partial(path: Path) -> Path:
    """A name beside `path` for this process alone; what killed ones left is removed."""
    host = platform.node()
    owned = re.compile(re.escape(path.name) + rf"(\.{re.escape(host)}-(\d+))?\.partial(\.folder)?")
    for file in path.parent.iterdir():
        match = owned.fullmatch(file.name)
        if match and not (match[2] and _is_alive(int(match[2]))):
            if match[3]:
                shutil.rmtree(file, ignore_errors=True)
            else:
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
    path = Path(path)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(path, sum(tensor.nbytes for tensor in tensors.values())) as partial:
        # save_file fills a file of a name by chance, and then renames it. What a kill leaves of
        # that is found again by the folder's name.
        folder = partial.with_name(f"{partial.name}.folder")
        try:
            folder.mkdir(exist_ok=True)
            save_file(tensors, folder / path.name, metadata)
            os.replace(folder / path.name, partial)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
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
    except Exception as error:  # the libraries raise anything for a damaged file
        raise_interrupted(error)
        if isinstance(error, pickle.UnpicklingError):
            refused = "is damaged or needs code execution, which is refused"
            way_out = "save a plain state dict with torch.save where it was made"
            raise ValueError(f"{path} {refused}; {way_out}") from error
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

FULL = (errno.ENOSPC, errno.EDQUOT)
MAKE_ROOM = "make room there, or choose another disk"
# What Ctrl-C and SIGTERM have raised in a script (extras/signals.py).
INTERRUPTED: list[BaseException] = []


def origin(error: BaseException, before: BaseException | None = None) -> BaseException:
    """What a library has replaced by an error of its own: Ctrl-C, SIGTERM, or what the system
    said. Else the error itself.

    before: what was being handled already when the library was called.
    """
    found = error
    while found is not None and found is not before:
        if isinstance(found, KeyboardInterrupt | SystemExit):
            return found
        if isinstance(found, OSError) and found.errno:
            return found
        of_rust = re.search(r"\(os error (\d+)\)", str(found))
        if isinstance(found, SafetensorError) and of_rust:
            number = int(of_rust[1])
            return OSError(number, os.strerror(number))
        found = found.__context__
    return error


def raise_interrupted(error: BaseException) -> None:
    """Raise Ctrl-C or SIGTERM again if that has led to an error, which is then no fault of a file.

    Both may come in the midst of a library, and some forget them: torch.asarray, which safetensors
    calls, takes the interrupted look at a storage for one of unknown shape.
    """
    first = origin(error)
    if isinstance(first, KeyboardInterrupt | SystemExit):
        raise first
    if INTERRUPTED:
        raise INTERRUPTED[-1]


@contextmanager
def writing(path: str | Path, needed: float = 0) -> Iterator[None]:
    """Whatever is in the way of what is written, a full disk above all, as an OSError of one line.

    What the block has begun, it should have removed when it fails: of a full disk is said what is
    free then. needed: bytes, if known; or what a block inside of this one has named. What names a
    file that lies elsewhere, one that is read, is raised as it is.
    """
    before = sys.exception()
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        first = origin(error, before)
        if not isinstance(first, OSError):
            raise_interrupted(error)
            if isinstance(error, RuntimeError):
                raise  # of a library
        elif first.errno not in FULL and first.filename and not is_of(path, first.filename):
            raise first from error.__cause__
        needed = needed or getattr(error, "needed", 0)
        raised = OSError(not_written(path, first, needed))
        raised.needed = needed
        raise raised from error


def is_of(path: str | Path, file: str | Path) -> bool:
    """Whether a file belongs to what is written: it is this, its .partial, in it, or around it."""
    whole = os.path.abspath(path)
    file = os.path.abspath(os.fsdecode(file))
    is_partial = file.startswith(f"{whole}.") and ".partial" in file.removeprefix(whole)
    is_inside = file.startswith(f"{whole}/")
    is_around = whole.startswith(os.path.join(file, ""))
    return file == whole or is_partial or is_inside or is_around


def not_written(path: str | Path, error: BaseException, needed: float = 0) -> str:
    """What `writing` says of an error; of a full disk also what is free, and the way out."""
    cause = getattr(error, "strerror", None) or first_line(error)
    if getattr(error, "errno", None) not in FULL:
        return f"cannot write {path}: {cause}"
    room = f"{in_words(free_at(path))} are free"
    if needed:
        room = f"at least {in_words(needed)} are needed, {room}"
    return f"cannot write {path}: the disk is full ({cause}): {room}; {MAKE_ROOM}"


def free_at(path: str | Path) -> int:
    """Bytes that are free on the disk where a file or folder is, or is to be."""
    path = Path(path).absolute()
    return shutil.disk_usage(next(filter(os.path.exists, [path, *path.parents]))).free


def in_words(size: float) -> str:
    """Bytes as "12.3 GB", "0.4 MB" or "0.5 kB"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e3:.1f} kB"


def first_line(error: Exception) -> str:
    """What an error says, without the lines that some libraries add, and not all they quote."""
    return str(error).partition("\n")[0][:300]


def nearest(value: int, step: int, least: int) -> str:
    """The two of least, least + step, ... around `value`, for error messages: "81 or 85"."""
    steps = max((value - least) // step, 0)
    low = least + steps * step
    return f"{low} or {low + step}"
