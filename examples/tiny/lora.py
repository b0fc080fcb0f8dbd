"""LoRA against all parameters: the demo's chain again by adapters, over its teacher as the base.

    python examples/tiny/lora.py --demos out/demo --ranks 16 --factors 1 3 10 --jobs 3
    python examples/tiny/lora.py --demos out/demo out/demo-1 --ranks 4 16 64 --factors 3 --jobs 6
    python examples/tiny/lora.py --demos out/demo out/demo-1 --table

ar -> trajectories -> ode -> dmd, each from the adapter of the stage before, with the demo's configs
but for the learning rates: all are multiplied by the factor. Each stage is judged as the demo
judges it. Of a demo it takes what ablations.py takes, and latents.

A process for each rank, factor and demo; what it finds goes to ablations/lora-RANK-xFACTOR.json in
the demo's folder. SIGTERM saves what is at work: the same command goes on.
"""

from pathlib import Path

import demo
from ablations import (
    judged_as,
    kept,
    mean_and_spread,
    options,
    print_table,
    seed_of,
    train_stage,
)
from jobs import Job, command, parse, run_jobs
from show import check_demos

import train
from wan5b.extras.cli import script
from wan5b.util import read_json, write_json

STAGES = ("ar", "ode", "dmd")
RATES = {"ar": ["lr"], "ode": ["lr"], "dmd": ["lr", "critic_lr"]}
COLUMNS = [
    *((score, 10) for score in ("colour", "shape", "direction")),
    *(("drift", length) for length in (3, 10, 30)),
]


def name_of(rank: int, factor: float) -> str:
    return f"lora-{rank}-x{factor:g}"


def chain(run: Path, rank: int, factor: float, quick: bool = False) -> None:
    """All stages of one rank and factor, trained and judged, unless that has been done."""
    name = name_of(rank, factor)
    out = kept(run, quick) / name
    result = out.parent / f"{name}.json"
    if result.exists():
        return
    found = {}
    adapter = None
    weights = None
    for stage in STAGES:
        print(f"== {run} {name}: {stage}", flush=True)
        keys = keys_of(stage, rank, factor, demo.export(run, "teacher"), adapter)
        if stage == "ar":
            keys["latents"] = run / "latents"
        if stage == "ode":
            keys["trajectories"] = out / "trajectories"
            repeats = 1 if quick else 6
            demo.make_trajectories(run, seed_of(run), weights, keys["trajectories"], repeats)
        weights, seconds = train_stage(run, stage, out / stage, keys, quick)
        adapter = out / stage / f"{stage}-lora"

        # A run that goes on does not judge again what is behind it.
        scores = out / f"{stage}.json"
        if not scores.exists():
            rows = judged_as(run, weights, demo.SAMPLED[stage], quick)
            write_json(scores, {"rows": rows, "training": seconds})
        found[stage] = read_json(scores)
    write_json(result, found)


def keys_of(stage: str, rank: int, factor: float, base: Path, adapter: Path | None) -> dict:
    """Keys of the stage's config. adapter: where it starts, if not from the base."""
    usual = train.parse([str(demo.HERE / f"{stage}.toml")])
    keys = {"lora": rank, "weights": base}
    if adapter:
        keys["lora_weights"] = adapter
    return keys | {rate: factor * getattr(usual, rate) for rate in RATES[stage]}


def run_chains(
    demos: list[Path], ranks: list[int], factors: list[float], jobs: int, quick: bool = False
) -> None:
    """All that are not done, so many at a time, as `ablations.run_rows` has it."""
    check_demos(demos)
    if min(ranks) < 1:
        raise ValueError(f"--ranks {min(ranks)}: must be at least 1; ar would train all parameters")
    todo = []
    for run in demos:
        folder = kept(run, quick)
        for rank in dict.fromkeys(ranks):
            for factor in dict.fromkeys(factors):
                name = name_of(rank, factor)
                if (folder / f"{name}.json").exists():
                    continue
                given = {"run": str(run), "rank": rank, "factor": factor, "quick": quick}
                log = folder / f"{name}.log"
                todo.append(Job(f"{run} {name}", command(__file__, given), log, rank))
    run_jobs(todo, jobs)


def run_one(given: dict) -> None:
    """What `run_chains` has one of its processes do."""
    chain(Path(given["run"]), given["rank"], given["factor"], given["quick"])


# -------------------------------------------------------------------------------------------- table


def table(runs: list[Path], markdown: bool = False, quick: bool = False) -> None:
    """Print mean and spread over the demos: all parameters, then all ranks and factors there."""
    check_demos(runs)
    names = sorted(
        {file.stem for run in runs for file in kept(run, quick).glob("lora-*-x*.json")},
        key=lambda name: [float(part) for part in name.removeprefix("lora-").split("-x")],
    )
    heads = ["stage", "seeds", *(f"{score} x{length}" for score, length in COLUMNS), "seconds"]
    lines = []
    for stage in STAGES:
        full = [full_parameters(run, stage) for run in runs]
        lines.append(line_of(f"{stage}, all parameters", full))
        for name in names:
            files = [kept(run, quick) / f"{name}.json" for run in runs]
            found = [read_json(file)[stage] for file in files if file.exists()]
            rank, _, factor = name.removeprefix("lora-").partition("-x")
            lines.append(line_of(f"{stage}, rank {rank}, learning rate x {factor}", found))
    print_table(heads, lines, markdown)


def full_parameters(run: Path, stage: str) -> dict:
    """What the demo's report says of a stage, as `chain` writes it."""
    report = read_json(run / "report.json")
    rows = {}
    for name, row in report["rows"].items():
        which, _, length = name.partition(" x")
        if which == stage:
            rows[length] = row
    return {"rows": rows, "training": report["seconds"][stage]}


def line_of(about: str, found: list[dict]) -> list[str]:
    """The cells of a row of the table."""
    line = [about, str(len(found))]
    for score, length in COLUMNS:
        rows = [each["rows"].get(str(length)) for each in found]
        line.append(mean_and_spread([row[score] for row in rows if row]))
    return [*line, f"{sum(each['training'] for each in found) / len(found):.0f}"]


def main() -> None:
    parser = options(__doc__)
    add = parser.add_argument
    add("--ranks", nargs="+", type=int, default=[4, 16, 64])
    add("--factors", nargs="+", type=float, default=[1.0], help="of the demo's learning rates")
    args = parse(parser, run_one)
    if not args.table:
        run_chains(args.demos, args.ranks, args.factors, args.jobs, args.quick)
    table(args.demos, args.markdown, args.quick)


if __name__ == "__main__":
    script(main)
