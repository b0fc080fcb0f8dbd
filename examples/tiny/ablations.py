"""The method's options, one row each: DMD in the tiny world with one thing changed.

    make demo                                                  # or several, with --seed and --out
    python examples/tiny/ablations.py --demos out/demo         # hours: all rows of a training seed
    python examples/tiny/ablations.py --demos out/demo out/demo-1 --rows gan levels
    python examples/tiny/ablations.py --demos out/demo out/demo-1 --table

Every row starts from the stages of a finished demo, trains dmd again with other keys (or samples
the demo's dmd in another way), and is judged as the demo is. What is done is kept in the demo's
folder, under ablations/, and not done again: a run that was stopped goes on.
"""

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import demo
import torch
from torch import Tensor

from wan5b.data import TextStore
from wan5b.extras.cli import script
from wan5b.extras.formats import load_dit, load_vae, read_metadata
from wan5b.extras.sampling import MODES
from wan5b.flow import few_step_sigmas
from wan5b.util import write_json

LENGTHS = (3, 10, 30)  # of which the table tells
# Of the table: a score, and at which of these.
COLUMNS = [
    *((score, 10) for score in ("colour", "shape", "direction", "contrast")),
    *(("shade", length) for length in LENGTHS),
    *(("drift", length) for length in LENGTHS),
]
FEW = [1000, 500]  # levels behind the first chunk


@dataclass(frozen=True)
class Row:
    """One thing changed.

    keys: of dmd.toml; none: the demo's dmd is sampled. how: arguments of `generate`. start: the
    stage whose weights dmd starts from. clips: whether it reads real ones.
    """

    about: str
    keys: dict[str, str] = field(default_factory=dict)
    how: dict = field(default_factory=dict)
    start: str = "ode"
    clips: bool = False


# What `generate` is told, and what dmd.toml.
KEPT = {"clean_pass": False}
TRAINED_KEPT = {"clean_pass": "false"}
FEWER = {"sigmas_after": few_step_sigmas(FEW)}
TRAINED_FEWER = {"levels_after": str(FEW)}
SINK = {"sink": 1}
TRAINED_SINK = {"sink": "1"}
TURNING = SINK | {"sink_rope": "relative"}
TRAINED_TURNING = TRAINED_SINK | {"sink_rope": "relative"}
LONG = {"rollout_frames": "27"}
GAN = {"gan_weight": "0.01"}
ROWS = {
    "dmd": Row("as make demo trains it"),
    # 1. and 2.: real clips
    "gan": Row("GAN branch", GAN, clips=True),
    "gan-relativistic": Row("relativistic", GAN | {"gan_relativistic": "true"}, clips=True),
    "data-forcing": Row("half of the steps on real clips", {"data_forcing": "0.5"}, clips=True),
    "data-forcing-after": Row(
        "120 more steps, half of them on real clips",
        {"data_forcing": "0.5", "steps": "120"},
        start="dmd",
        clips=True,
    ),
    # 3.: fewer forwards
    "levels-untrained": Row("4 levels, then 2: only sampled", how=FEWER),
    "levels": Row("4 levels, then 2", TRAINED_FEWER, FEWER),
    "no-clean-pass-untrained": Row("no clean pass: only sampled", how=KEPT),
    "no-clean-pass": Row("no clean pass", TRAINED_KEPT, KEPT),
    "levels-no-clean-pass": Row("both", TRAINED_FEWER | TRAINED_KEPT, FEWER | KEPT),
    # 4.: longer rollouts, sinks
    "long": Row("rollouts of up to 27 frames", LONG),
    "sink-untrained": Row("a sink of 1: only sampled", how=SINK),
    "sink-turning-untrained": Row("that follows the window: only sampled", how=TURNING),
    "sink": Row("a sink of 1", TRAINED_SINK, SINK),
    "sink-turning": Row("that follows the window", TRAINED_TURNING, TURNING),
    "long-sink-turning": Row("that, in rollouts of up to 27", TRAINED_TURNING | LONG, TURNING),
    # 5.: the init
    "from-ar": Row("from ar, without ode", start="ar"),
    # 6.: the defaults
    "guidance-0": Row("guidance 0", {"guidance": "0.0"}),
    "guidance-1": Row("guidance 1", {"guidance": "1.0"}),
    "ratio-1": Row("1 critic update", {"ratio": "1"}),
    "ratio-6": Row("6 critic updates", {"ratio": "6", "steps": "960"}),
    "batch-2": Row("batch 2", {"batch": "2", "micro_batch": "2"}),
}


def forwards(row: Row) -> tuple[int, int]:
    """Of the first chunk, and of each behind it."""
    usual = few_step_sigmas()
    levels = (usual, row.how.get("sigmas_after", usual))
    first, after = (len(each) - 1 + row.how.get("clean_pass", True) for each in levels)
    return first, after


def trained(run: Path, name: str, row: Row) -> tuple[Path, float]:
    """The row's weights, trained if they are not there; the seconds that it took."""
    if not row.keys and row.start == "ode":
        return demo.export(run, "dmd"), 0.0
    out = run / "ablations" / name
    seed = read_metadata(demo.export(run, "dmd"))["training"]["seed"]
    keys = {"out": out, "seed": seed, **row.keys}
    keys["weights"] = demo.export(run, row.start)
    keys["teacher"] = demo.export(run, "teacher")
    if row.clips:
        keys["latents"] = run / "latents"
    seconds = demo.run_stage(run, "dmd", *(f"{key}={value}" for key, value in keys.items()))
    return out / "dmd.safetensors", seconds


@torch.no_grad()
def judged(run: Path, weights: Path, row: Row) -> dict[str, dict]:
    """Summaries by length."""
    text = TextStore(run / "text")
    frames = demo.TRAINED * LENGTHS[-1]
    model = load_dit(weights)
    few = MODES["few"]
    latents = demo.sample_clips(model, text, few, frames, demo.SAMPLING_SEED, **row.how)
    spread = contrast(latents)
    found = demo.at_lengths(demo.judge(latents, load_vae(run / "release")))
    return {str(length): found[length] | {"contrast": spread[length]} for length in found}


def contrast(latents: Tensor) -> dict[int, float]:
    """Length -> the latents' spread in the last training length there; about 1 in real clips."""
    found = {}
    for length in demo.LENGTHS:
        part = latents[:, :, demo.TRAINED * (length - 1) : demo.TRAINED * length]
        found[length] = float(part.std())
    return found


def measure(run: Path, name: str) -> None:
    """Train and judge one row of one demo, unless that has been done."""
    row = ROWS[name]
    result = run / "ablations" / f"{name}.json"
    if result.exists():
        return
    print(f"== {run} {name}: {row.about}", flush=True)
    began = time.time()
    weights, seconds = trained(run, name, row)
    rows = judged(run, weights, row)
    write_json(result, {"rows": rows, "training": seconds, "total": time.time() - began})


def table(runs: list[Path]) -> None:
    """Mean and spread over the demos."""
    heads = "".join(f"{f'{score} x{length}':>16}" for score, length in COLUMNS)
    print(f"{'row':46}{'seeds':>6}{'forwards':>10}{heads}")
    for name, row in ROWS.items():
        files = [run / "ablations" / f"{name}.json" for run in runs]
        reports = [json.loads(file.read_text())["rows"] for file in files if file.exists()]
        if not reports:
            continue
        first, after = forwards(row)
        line = f"{row.about:46}{len(reports):6}{f'{first}, {after}':>10}"
        for score, length in COLUMNS:
            values = torch.tensor([report[str(length)][score] for report in reports])
            spread = f" +-{values.std():.3f}" if len(values) > 1 else ""
            line += f"{f'{values.mean():.3f}{spread}':>16}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--demos", nargs="+", type=Path, required=True, metavar="DIR", help="finished demos")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    add("--threads", type=int, default=1)
    add("--table", action="store_true", help="only print what there is")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for run in args.demos:
        if not (run / "report.json").exists():
            raise ValueError(f"{run} is no finished demo: make demo first")
    if not args.table:
        for name in args.rows:
            for run in args.demos:
                measure(run, name)
    table(args.demos)


if __name__ == "__main__":
    script(main)
