"""What a run leaves to be looked at: config.json, metrics.jsonl, curves.png.

python -m wan5b.extras.log RUN [RUN ...]    # draws curves.png in the first; needs matplotlib
"""

import fcntl
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import TextIO

from torch import Tensor

from wan5b.extras import checkpoints
from wan5b.extras.disk import check_folder
from wan5b.util import first_line, raise_interrupted, replacing, write_json, writing

METRICS = "metrics.jsonl"  # a line a step
LOCK = "lock"  # names the process that has the folder
# In the progress line; metrics.jsonl has everything.
SHOWN = ("loss", "norm", "critic_loss", "critic_norm", "seconds", "tokens_per_second", "mfu", "gib")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """The run's folder for this process alone. ValueError if another process has it.

    The kernel lets go of it when the process ends, however that happens.
    """
    with _locked_file(out) as file:
        try:
            with writing(out / LOCK):
                file.truncate(0)
                os.write(file.fileno(), f"{os.getpid()} on {platform.node()}\n".encode())
                os.fsync(file.fileno())  # so that other machines see it
            yield
        finally:
            # A run that was refused before it began leaves no folder.
            if os.listdir(out) == [LOCK]:
                (out / LOCK).unlink()
                out.rmdir()


def _locked_file(out: Path) -> TextIO:
    """The lock of a run's folder, locked. It is only looked at if another process has it."""
    path = out / LOCK
    if not path.exists():
        check_folder(out, "out")
    while True:
        out.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            with file:
                file.seek(0)
                holder = file.read().strip()
            raise ValueError(f"{out} is in use by process {holder}: one at a time") from error

        # A process that has ended meanwhile may have removed the file that was opened here.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            return file
        file.close()


def begin(out: Path, config: dict, processes: int, start: int) -> None:
    """Make the run's folder; keep the metrics of the steps before `start`."""
    (out / "samples").mkdir(parents=True, exist_ok=True)
    git = ["git", "rev-parse", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent)
    record = {"commit": found.stdout.strip(), "processes": processes, "config": config}
    write_json(out / "config.json", record)
    log = out / METRICS
    log.touch()
    rows = [row for row in read_metrics(log) if row["step"] < start]
    with replacing(log) as partial:
        partial.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def read_metrics(log: Path) -> list[dict[str, float]]:
    """The metrics of each step; a line that was cut, by a full disk or a power cut, is left out."""
    rows = []
    for number, line in enumerate(log.read_text(errors="replace").splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            print(f"note: {log}, line {number}, is damaged and left out", file=sys.stderr)
    return rows


def append(out: Path, metrics: dict[str, float]) -> None:
    with writing(out / METRICS), (out / METRICS).open("a") as file:
        file.write(json.dumps(metrics) + "\n")


def shown(metrics: dict[str, float]) -> dict[str, str]:
    """Those of the metrics that the progress line has, as it shows them."""
    return {name: f"{metrics[name]:.3g}" for name in SHOWN if name in metrics}


def check_finite(
    values: dict[str, Tensor], metrics: dict[str, float], step: int, rank: int, out: Path
) -> None:
    """FloatingPointError unless all are finite: this process's values, and their means over
    processes.
    """
    if all(map(math.isfinite, metrics.values())):
        return
    # Norms are the same on all ranks.
    here = [name for name, value in values.items() if not value.isfinite()]
    saved = checkpoints.complete(out)
    raise FloatingPointError(
        f"step {step}, rank {rank}: not finite here: {', '.join(here) or 'nothing'}; "
        f"means over ranks: {metrics}; last checkpoint: {saved[-1] if saved else 'none'}"
    )


@lru_cache
def available() -> bool:
    """Whether matplotlib is there; says so, once, if not."""
    found = find_spec("matplotlib") is not None
    if not found:
        print("no curves.png: matplotlib is not installed (pip install -e '.[plot]')")
    return found


def curves(folders: list[Path]) -> Path | None:
    """Draw curves.png in the first folder. An error in it never ends a run: a note says so."""
    try:
        return draw(folders)
    except Exception as error:  # a plotting library may raise anything, and only looks are at stake
        raise_interrupted(error)
        print(f"note: no curves.png: {first_line(error)}", file=sys.stderr)
        return None


def draw(folders: list[Path]) -> Path | None:
    """Every number of the runs' metrics against the step, one panel each, runs over each other.

    None without matplotlib.
    """
    if not available():
        return None
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    runs = {folder.name: read_metrics(folder / METRICS) for folder in folders}
    names = {name for rows in runs.values() for row in rows for name in row}

    columns = 4
    height = math.ceil((len(names) - 1) / columns)
    figure, panels = pyplot.subplots(height, columns, figsize=(16, 3 * height))
    for panel, name in zip_longest(panels.flat, sorted(names - {"step"})):
        if name is None:
            panel.axis("off")
            continue
        for run, rows in runs.items():
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                panel.plot(*zip(*points, strict=True), label=run)
        panel.set_title(name, fontsize=9)
    panels.flat[0].legend(fontsize=7)
    figure.tight_layout()

    path = folders[0] / "curves.png"
    with replacing(path) as partial:
        figure.savefig(partial, dpi=80, format="png")
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    if not sys.argv[1:] or not all(Path(name, METRICS).exists() for name in sys.argv[1:]):
        sys.exit(f"usage: python -m wan5b.extras.log RUN [RUN ...], folders with a {METRICS}")
    print(curves([Path(name) for name in sys.argv[1:]]))
