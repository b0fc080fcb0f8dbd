"""Curves of runs: python -m wan5b.extras.curves runs/dmd-5b [more runs ...] -> curves.png in the first. Needs matplotlib."""

import json
import os
import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path


@lru_cache
def available() -> bool:
    """Whether matplotlib is there; says so, once, if not."""
    found = find_spec("matplotlib") is not None
    if not found:
        print("no curves.png: matplotlib is not installed (pip install -e '.[plot]')")
    return found


def curves(folders: list[Path]) -> Path | None:
    """Every number of metrics.jsonl against the step, one panel each, runs of one stage over each other.

    Written beside, then renamed: who looks while a run goes on sees a whole picture. None without matplotlib.
    """
    if not available():
        return None
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    runs = {
        folder: [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in folders
    }
    names = sorted({name for rows in runs.values() for row in rows for name in row} - {"step"})
    columns = 4
    figure, panels = pyplot.subplots(
        -(-len(names) // columns), columns, figsize=(16, 3 * -(-len(names) // columns))
    )
    for panel, name in zip(panels.flat, names, strict=False):
        for folder, rows in runs.items():
            points = [(row["step"], row[name]) for row in rows if name in row]
            panel.plot(*zip(*points, strict=True), label=folder.name) if points else None
        panel.set_title(name, fontsize=9)
    panels.flat[0].legend(fontsize=7)
    for panel in panels.flat[len(names) :]:
        panel.axis("off")
    figure.tight_layout()
    path = folders[0] / "curves.png"
    partial = path.with_name("curves.png.partial")
    figure.savefig(partial, dpi=80, format="png")
    pyplot.close(figure)
    os.replace(partial, path)
    return path


if __name__ == "__main__":
    if not sys.argv[1:] or not all(Path(name, "metrics.jsonl").exists() for name in sys.argv[1:]):
        sys.exit("usage: python -m wan5b.extras.curves RUN [RUN ...], folders with a metrics.jsonl")
    print(curves([Path(name) for name in sys.argv[1:]]))
