"""What a run leaves to be looked at: config.json, metrics.jsonl, curves.png.

python -m wan5b.extras.log RUN [RUN ...]    # draws curves.png in the first; needs matplotlib
"""

import json
import math
import os
import subprocess
import sys
from functools import lru_cache
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

from torch import Tensor

from wan5b import fsdp
from wan5b.util import write_json

METRICS = "metrics.jsonl"  # a line a step


def begin(out: Path, config: dict, processes: int, start: int) -> None:
    """Make the run's folder; keep the metrics of the steps before `start`."""
    (out / "samples").mkdir(parents=True, exist_ok=True)
    git = ["git", "rev-parse", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent)
    record = {"commit": found.stdout.strip(), "processes": processes, "config": config}
    write_json(out / "config.json", record)
    log = out / METRICS
    if log.exists():
        lines = log.read_text().splitlines()[:start]
        log.write_text("".join(f"{line}\n" for line in lines))


def append(out: Path, metrics: dict[str, float]) -> None:
    with (out / METRICS).open("a") as file:
        file.write(json.dumps(metrics) + "\n")


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
    saved = fsdp.checkpoints(out)
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
    """Every number of the runs' metrics against the step, one panel each; runs of one stage over
    each other.

    Written beside, then renamed: who looks while a run goes on sees a whole picture. None without
    matplotlib.
    """
    if not available():
        return None
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    runs = {}
    for folder in folders:
        lines = (folder / METRICS).read_text().splitlines()
        runs[folder.name] = [json.loads(line) for line in lines]
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
    partial = path.with_name("curves.png.partial")
    figure.savefig(partial, dpi=80, format="png")
    pyplot.close(figure)
    os.replace(partial, path)
    return path


if __name__ == "__main__":
    if not sys.argv[1:] or not all(Path(name, METRICS).exists() for name in sys.argv[1:]):
        sys.exit(f"usage: python -m wan5b.extras.log RUN [RUN ...], folders with a {METRICS}")
    print(curves([Path(name) for name in sys.argv[1:]]))
