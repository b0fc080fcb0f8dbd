"""A script's main() in this process, and what it has written."""

import runpy
import signal
import sys
from pathlib import Path

import av
from safetensors import safe_open

ROOT = Path(__file__).parents[2]


def run(name: str, options: list[str], folder: Path) -> dict:
    """Run a script in a folder: the tensors and the numbers of frames in its new files.

    Raises what the script raises: SystemExit, if it has refused something.
    """
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    argv = sys.argv
    sys.argv = [name, *map(str, options)]
    try:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise
    finally:
        sys.argv = argv
        # A signal that comes from now on does not come to the script.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    found = {}
    for path in sorted(folder.rglob("*")):
        new = path.is_file() and before.get(path) != path.stat().st_mtime_ns
        if new and path.suffix in (".safetensors", ".mp4"):
            found[str(path.relative_to(folder))] = content(path)
    return found


def content(path: Path):
    """The tensors of a safetensors file, or the number of frames of an mp4."""
    if path.suffix == ".mp4":
        return brightness(path)[0]
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def brightness(path: Path) -> tuple[int, float]:
    """The number of frames of a video, and their mean level, from -1 to 1."""
    levels = []
    with av.open(str(path)) as file:
        for frame in file.decode(video=0):
            levels.append(frame.to_ndarray(format="rgb24").mean() / 127.5 - 1)
    return len(levels), sum(levels) / max(len(levels), 1)
