"""What data and weights hold, in a few bytes: by this a run that goes on knows them again.

Read is a header and a few spread blocks of each file, so 20 GB take milliseconds. Data that were
made anew or changed as a whole show; a few changed bytes in the midst of a large file may not.
Of pictures, which are read as a whole anyway, every byte counts.
"""

from functools import partial
from hashlib import blake2b, file_digest
from pathlib import Path

BLOCKS = 16  # of each file, evenly spread
BLOCK = 4096  # bytes
# What of a folder counts: a store's shards, a release's DiT, an adapter, a checkpoint of train.py.
FILES = (
    "*.safetensors",
    "*.bin",
    "config.json",
    "adapter_config.json",
    ".metadata",
    "facts.json",
    "*.distcp",
)
# Of an empty folder; of a diffusers pipeline too, by earlier versions, which did not look into it.
NOTHING = blake2b(digest_size=16).hexdigest()


def digest(path: str | Path) -> str:
    """Of a file, or of a folder's data and weights; it does not depend on where that lies."""
    path = Path(path)
    files = [path]
    if path.is_dir():
        folders = (path, path / "transformer")  # the DiT of a diffusers pipeline
        files = sorted(
            file for pattern in FILES for folder in folders for file in folder.glob(pattern)
        )
        if not files:  # of other names: X.SAFETENSORS
            files = sorted(file for file in path.iterdir() if file.is_file())
    summary = blake2b(digest_size=16)
    for file in files:
        summary.update(file.name.encode("utf-8", "surrogateescape") if path.is_dir() else b"")
        _add(summary, file)
    return summary.hexdigest()


def digest_of_all(path: str | Path) -> str:
    """Of every byte of a file: b2sum --length 128 says the same."""
    with Path(path).open("rb") as file:
        return file_digest(file, partial(blake2b, digest_size=16)).hexdigest()


def sizes(path: str | Path) -> list[tuple[str, int]]:
    """Name and bytes of a file, or of all files in a folder: enough to see that one was replaced,
    and cheap for many. Empty, if they can't be read: whoever reads them says why.
    """
    path = Path(path)
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        return [(file.name, file.stat().st_size) for file in files]
    except OSError:
        return []


def _add(summary, file: Path) -> None:
    size = file.stat().st_size
    summary.update(size.to_bytes(8, "big"))
    with file.open("rb") as opened:
        if file.suffix == ".safetensors":
            # The header names all tensors and holds the prompts of a store.
            length = int.from_bytes(opened.read(8), "little")
            summary.update(opened.read(min(length, size)))
        for block in range(BLOCKS):
            opened.seek(max(size - BLOCK, 0) * block // (BLOCKS - 1))
            summary.update(opened.read(BLOCK))
