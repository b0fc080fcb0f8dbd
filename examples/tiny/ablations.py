"""The method's options, one row each: DMD in the tiny world with one thing changed.

    make demo                                                  # or several, with --seed and --out
    python examples/tiny/ablations.py --demos out/demo         # hours: all rows of a training seed
    python examples/tiny/ablations.py --demos out/demo out/demo-1 --rows gan levels --jobs 4
    python examples/tiny/ablations.py --demos out/demo out/demo-1 --table
    python examples/tiny/ablations.py --demos out/demo --quick    # do all rows start and end?

Every row starts from the stages of a finished demo, trains dmd again with other keys (or samples
the demo's dmd in another way), and is judged as the demo is. Of a demo it takes report.json,
release, text, latents for rows with real clips, and the exports, */*.safetensors.

Each row of each demo is a process of one thread, --jobs at a time; what it prints goes to
ablations/ROW.log in the demo's folder, what it found to ROW.json. What is done is not done again
(of another config or of other data it is refused), and SIGTERM saves what is at work: the same
command goes on.
"""

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import demo
import torch
from jobs import ALIKE, Job, Origin, command, known, parse, run_jobs, said
from show import check_demos
from torch import Tensor

import train
from wan5b.data import TextStore
from wan5b.extras import signals
from wan5b.extras.checks import changed_settings
from wan5b.extras.cli import script
from wan5b.extras.formats import load_dit, load_vae, read_metadata
from wan5b.extras.log import METRICS, read_metrics
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
PLAIN_COLUMNS = [column for column in COLUMNS if column[0] != "shade"]  # with --markdown
FEW = [1000, 500]  # levels, of all chunks or behind the first
QUICK = {"steps": 2, "longest": 3}  # of --quick: of training, and up to which length it is judged


@dataclass(frozen=True)
class Row:
    """One thing changed.

    keys: of dmd.toml; none: the demo's dmd is sampled. how: arguments of `demo.sample_clips`, what
    JSON can hold. start: the stage whose weights dmd starts from. clips: whether it reads real
    ones.
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
TWO = {"sigmas": few_step_sigmas(FEW)}
LONG = {"rollout_frames": "27"}
LONGER = {"rollout_frames": "54"}
TWICE = {"steps": "960"}
LARGE = {"batch": "16", "micro_batch": "16"}
GAN = {"gan_weight": "0.01"}
ROWS = {
    "dmd": Row("as make demo trains it"),
    "data": Row("each chunk behind real frames", {"rollout": "data"}, clips=True),
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
    "two-levels-untrained": Row("2 levels in all chunks: only sampled", how=TWO),
    "two-levels": Row("2 levels in all chunks", {"levels": str(FEW)}, TWO),
    "no-clean-pass-untrained": Row("no clean pass: only sampled", how=KEPT),
    "no-clean-pass": Row("no clean pass", TRAINED_KEPT, KEPT),
    "levels-no-clean-pass": Row("both", TRAINED_FEWER | TRAINED_KEPT, FEWER | KEPT),
    # 4.: longer rollouts, sinks
    "long": Row("rollouts of up to 27 frames", LONG),
    "long-54": Row("rollouts of up to 54 frames", LONGER),
    "long-levels": Row("rollouts of up to 27, 4 levels, then 2", LONG | TRAINED_FEWER, FEWER),
    "sink-untrained": Row("a sink of 1: only sampled", how=SINK),
    "sink-turning-untrained": Row("that follows the window: only sampled", how=TURNING),
    "sink": Row("a sink of 1", TRAINED_SINK, SINK),
    "sink-turning": Row("that follows the window", TRAINED_TURNING, TURNING),
    "long-sink": Row("a sink of 1, rollouts of up to 27", TRAINED_SINK | LONG, SINK),
    "long-sink-turning": Row("that follows, rollouts of up to 27", TRAINED_TURNING | LONG, TURNING),
    "long-54-sink-turning": Row("that, of up to 54", TRAINED_TURNING | LONGER, TURNING),
    # 5.: the init
    "from-ar": Row("from ar, without ode", start="ar"),
    "from-ar-sink-turning": Row("and a sink that follows", TRAINED_TURNING, TURNING, "ar"),
    "from-ar-levels-no-clean-pass": Row(
        "and 4 levels, then 2, no clean pass", TRAINED_FEWER | TRAINED_KEPT, FEWER | KEPT, "ar"
    ),
    # 6.: the defaults
    "guidance-0": Row("guidance 0", {"guidance": "0.0"}),
    "guidance-0.5": Row("guidance .5", {"guidance": "0.5"}),
    "guidance-1": Row("guidance 1", {"guidance": "1.0"}),
    "ratio-1": Row("1 critic update", {"ratio": "1"}),
    "ratio-6": Row("6 critic updates", {"ratio": "6", "steps": "960"}),
    "ratio-6-480": Row("6 critic updates, 80 of the generator", {"ratio": "6"}),
    "batch-2": Row("batch 2", {"batch": "2", "micro_batch": "2"}),
    "critic-lr-quarter": Row("critic's learning rate / 4", {"critic_lr": "1.25e-4"}),
    "critic-lr-4": Row("critic's learning rate x 4", {"critic_lr": "2e-3"}),
    "lr-half": Row("generator's learning rate / 2", {"lr": "1e-4"}),
    "lr-2": Row("generator's learning rate x 2", {"lr": "4e-4"}),
    "ema-0": Row("no average of the weights", {"ema": "0.0"}),
    "ema-0.98": Row("ema .98", {"ema": "0.98"}),
    "decay": Row("learning rates fall to 0", {"decay": "true"}),
    # 7.: more training, and that with what may lower the drift
    "twice": Row("960 steps", TWICE),
    "batch-16": Row("batch 16", LARGE),
    "twice-decay": Row("960 steps, learning rates fall to 0", TWICE | {"decay": "true"}),
    "twice-batch-16": Row("960 steps, batch 16", TWICE | LARGE),
    "twice-ratio-2": Row("960 steps, 2 critic updates", TWICE | {"ratio": "2"}),
    "twice-long": Row("960 steps, rollouts of up to 27", TWICE | LONG),
    "twice-long-54": Row("960 steps, rollouts of up to 54", TWICE | LONGER),
    "twice-sink-turning": Row("960 steps, a sink that follows", TWICE | TRAINED_TURNING, TURNING),
    "twice-long-batch-16": Row("960 steps, batch 16, up to 27", TWICE | LONG | LARGE),
    "twice-data": Row(
        "960 steps, each chunk behind real frames", TWICE | {"rollout": "data"}, clips=True
    ),
}


def forwards(row: Row) -> tuple[int, int]:
    """Of the first chunk, and of each behind it."""
    usual = row.how.get("sigmas", few_step_sigmas())
    levels = (usual, row.how.get("sigmas_after", usual))
    first, after = (len(each) - 1 + row.how.get("clean_pass", True) for each in levels)
    return first, after


# ---------------------------------------------------------------------------------------- measuring


def kept(run: Path, quick: bool = False) -> Path:
    """Where results lie; those of --quick never among others."""
    return run / ("ablations-quick" if quick else "ablations")


def seed_of(run: Path) -> int:
    """With which the demo was trained."""
    return read_metadata(demo.export(run, "dmd"))["training"]["seed"]


def is_trained(row: Row) -> bool:
    """Or the demo's dmd is sampled."""
    return bool(row.keys) or row.start != "ode"


def trained(run: Path, name: str, row: Row, quick: bool = False) -> tuple[Path, float]:
    """The row's weights, trained if they are not there; the seconds that it took."""
    if not is_trained(row):
        return demo.export(run, "dmd"), 0.0
    return train_stage(run, "dmd", kept(run, quick) / name, keys_of(run, row), quick)


def keys_of(run: Path, row: Row) -> dict:
    """Of dmd.toml, for a row that is trained."""
    keys = dict(row.keys)
    keys["weights"] = demo.export(run, row.start)
    keys["teacher"] = demo.export(run, "teacher")
    if row.clips:
        keys["latents"] = run / "latents"
    return keys


def origin(run: Path, name: str, row: Row, quick: bool = False) -> Origin:
    """What the row's result is made of."""
    if not is_trained(row):
        return Origin(demo.export(run, "dmd"))
    return origin_of(run, "dmd", kept(run, quick) / name, keys_of(run, row), quick)


def origin_of(run: Path, stage: str, out: Path, keys: dict, quick: bool = False) -> Origin:
    """What `train_stage` makes, by the same arguments."""
    cfg = demo.config(run, stage, *overrides(out, keys, quick))
    return Origin(out / f"{stage}.safetensors", cfg)


def overrides(out: Path, keys: dict, quick: bool) -> list[str]:
    """Of a stage's config, but for the seed, which is the demo's."""
    keys = {"out": out, **keys}
    if quick:
        keys["steps"] = QUICK["steps"]
    return [f"{key}={value}" for key, value in keys.items()]


def train_stage(
    run: Path, stage: str, out: Path, keys: dict, quick: bool = False
) -> tuple[Path, float]:
    """One run of train.py into a folder of its own -> its weights, and the seconds of its steps.

    Ends this process with 143 if SIGTERM has stopped it: the state is saved then.
    """
    demo.run_stage(run, stage, f"seed={seed_of(run)}", *overrides(out, keys, quick))
    signals.while_running()  # training has taken SIGTERM for itself
    weights = out / f"{stage}.safetensors"
    if not weights.exists():
        sys.exit(143)
    return weights, sum(row["seconds"] for row in read_metrics(out / METRICS))


def judged(run: Path, weights: Path, row: Row, quick: bool = False) -> dict[str, dict]:
    """Summaries by length."""
    return judged_as(run, weights, "few", quick, **row.how)


@torch.no_grad()
def judged_as(run: Path, weights: Path, mode: str, quick: bool, **how) -> dict[str, dict]:
    """Summaries by length. mode: of MODES. how: of `demo.sample_clips`."""
    text = TextStore(run / "text")
    frames = demo.TRAINED * (QUICK["longest"] if quick else LENGTHS[-1])
    model = load_dit(weights)
    latents = demo.sample_clips(model, text, MODES[mode], frames, demo.SAMPLING_SEED, **how)
    found = demo.at_lengths(demo.judge(latents, load_vae(run / "release")))
    return {
        str(length): found[length] | {"contrast": contrast(latents, length)} for length in found
    }


def contrast(latents: Tensor, length: int) -> float:
    """The latents' spread in the last training length there; about 1 in real clips."""
    return float(latents[:, :, demo.TRAINED * (length - 1) : demo.TRAINED * length].std())


def measure(run: Path, name: str, row: Row, quick: bool = False) -> None:
    """Train and judge one row of one demo, unless that has been done."""
    result = kept(run, quick) / f"{name}.json"
    made_of = origin(run, name, row, quick)
    if known(result, row, made_of):
        return
    print(f"== {run} {name}: {row.about}", flush=True)
    weights, seconds = trained(run, name, row, quick)
    began = time.time()
    rows = judged(run, weights, row, quick)
    total = seconds + time.time() - began
    found = {"rows": rows, "training": seconds, "total": total}
    write_json(result, found | {"of": said(row), "origin": made_of.note()})


def run_rows(rows: dict[str, Row], demos: list[Path], jobs: int, quick: bool = False) -> None:
    """Measure all that is not done, so many at a time, each in a process of one thread.

    Those that fail don't keep the others: ValueError at the end. SIGTERM is passed on, and exits
    when all have saved: see `jobs.run_jobs`.
    """
    check_demos(demos)
    todo = []
    for run in demos:
        for name, row in rows.items():
            folder = kept(run, quick)
            if known(folder / f"{name}.json", row, origin(run, name, row, quick)):
                continue
            given = {"run": str(run), "name": name, "row": said(row), "quick": quick}
            log = folder / f"{name}.log"
            todo.append(Job(f"{run} {name}", command(__file__, given), log, cost(row)))
    run_jobs(todo, jobs)


def run_one(given: dict) -> None:
    """What `run_rows` has one of its processes do."""
    measure(Path(given["run"]), given["name"], Row(**given["row"]), given["quick"])


def cost(row: Row) -> float:
    """Of the training, in frames that networks see: to begin with the longest."""
    if not is_trained(row):
        return 0.0
    keys = [f"{key}={value}" for key, value in row.keys.items()]
    cfg = train.parse([str(demo.HERE / "dmd.toml"), *keys])
    rolled = (cfg.frames + max(cfg.frames, cfg.rollout_frames)) / 2
    levels = len(cfg.levels) / 2 + cfg.clean_pass
    rollouts = (1 + 1 / cfg.ratio) * rolled * levels
    return cfg.steps * cfg.batch * (rollouts + (3 + 5 / cfg.ratio) * cfg.frames)


# -------------------------------------------------------------------------------------------- table


def table(runs: list[Path], rows: dict[str, Row] = ROWS, markdown=False, quick=False) -> None:
    """Print mean and spread over the demos of all that there is."""
    check_demos(runs)
    columns = PLAIN_COLUMNS if markdown else COLUMNS
    heads = ["row", "seeds", "forwards", *(f"{score} x{length}" for score, length in columns)]
    lines = []
    for name, row in rows.items():
        reports = []
        for run in runs:
            made_of = origin(run, name, row, quick)
            report = known(kept(run, quick) / f"{name}.json", row, made_of)
            if report:
                reports.append(report)
        if not reports:
            continue
        first, after = forwards(row)
        line = [row.about, str(len(reports)), f"{first}, {after}"]
        for score, length in columns:
            found = [report["rows"].get(str(length)) for report in reports]
            line.append(mean_and_spread([each[score] for each in found if each]))
        line.append(f"{sum(report['training'] for report in reports) / len(reports):.0f}")
        lines.append(line)
    print_table([*heads, "seconds"], lines, markdown)


def mean_and_spread(values: list[float]) -> str:
    if not values:
        return "-"
    drawn = torch.tensor(values)
    spread = f" +-{drawn.std():.3f}" if len(values) > 1 else ""
    return f"{drawn.mean():.3f}{spread}"


def print_table(heads: list[str], lines: list[list[str]], markdown: bool) -> None:
    """In columns, or as Markdown has them."""
    if markdown:
        for line in (heads, ["---"] * len(heads), *lines):
            print(f"| {' | '.join(line)} |")
        return
    for line in (heads, *lines):
        first, *others = line
        print(f"{first:46}{''.join(f'{cell:>16}' for cell in others)}")


def note_demos(runs: list[Path]) -> None:
    """A line for each stage of a demo that its config, as it is now, would train otherwise: what is
    built on it is as it was trained.
    """
    for run in runs:
        for name in demo.SAMPLED:
            weights = demo.export(run, name)
            if not weights.exists():
                continue
            cfg = demo.config(run, name)
            # Of dmd-data the demo gives it beside the config.
            changed = changed_settings(cfg, read_metadata(weights), ALIKE | {"rollout"})
            if changed:
                text = f"note: {weights} was made with another {', '.join(changed)}; so is what "
                text += "starts from it, until there is a new demo"
                print(text, file=sys.stderr)


def options(doc: str) -> argparse.ArgumentParser:
    """What ablations.py and lora.py are told alike."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--demos", nargs="+", type=Path, default=[], metavar="DIR", help="finished demos")
    add("--jobs", type=int, default=1, metavar="N", help="processes at a time")
    add("--table", action="store_true", help="only print what there is")
    add("--markdown", action="store_true", help="print the table as Markdown")
    quick = f"{QUICK['steps']} steps a stage, judged up to {QUICK['longest']} lengths, kept apart"
    add("--quick", action="store_true", help=f"whether all works: {quick}")
    return parser


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    args = parse(parser, run_one)
    rows = {name: ROWS[name] for name in args.rows}
    note_demos(args.demos)
    if not args.table:
        run_rows(rows, args.demos, args.jobs, args.quick)
    table(args.demos, rows, args.markdown, args.quick)


if __name__ == "__main__":
    script(main)
