"""LoRA against all parameters: the demo's chain again by adapters, over its teacher as the base.

    python examples/tiny/lora.py --demos out/demo --ranks 16 --factors 1 3 10 --jobs 3
    python examples/tiny/lora.py --demos out/demo out/demo-1 --ranks 4 16 64 --factors 3 --jobs 6
    python examples/tiny/lora.py --demos out/demo out/demo-1 --table

ar -> trajectories -> ode -> dmd, each from the adapter of the stage before, with the demo's configs
but for the learning rates: all are multiplied by the factor. Each stage is judged as the demo
judges it. Of a demo it takes what ablations.py takes, and latents.

A process for each rank, factor and demo; what it finds goes to ablations/lora-RANK-xFACTOR.json in
the demo's folder. What is done is not done again; of another config or of other data it is refused.
SIGTERM saves what is at work: the same command goes on.
"""

from pathlib import Path

import demo
from ablations import (
    judged_as,
    kept,
    mean_and_spread,
    note_demos,
    options,
    origin_of,
    print_table,
    seed_of,
    train_stage,
)
from jobs import Job, check_origin, command, parse, run_jobs
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
    if known(run, rank, factor, quick):
        return
    name = name_of(rank, factor)
    out = kept(run, quick) / name
    found = {}
    weights = None
    for stage in STAGES:
        print(f"== {run} {name}: {stage}", flush=True)
        keys = keys_of(run, out, stage, rank, factor)
        made_of = origin_of(run, stage, out / stage, keys, quick)
        if stage == "ode":
            repeats = 1 if quick else 6
            demo.make_trajectories(run, seed_of(run), weights, keys["trajectories"], repeats)
        weights, seconds = train_stage(run, stage, out / stage, keys, quick)

        # A run that goes on does not judge again what is behind it.
        scores = out / f"{stage}.json"
        if not scores.exists():
            rows = judged_as(run, weights, demo.SAMPLED[stage], quick)
            write_json(scores, {"rows": rows, "training": seconds, "origin": made_of.note()})
        found[stage] = read_json(scores)
        check_origin(scores, found[stage], made_of)
    write_json(out.parent / f"{name}.json", found)


def keys_of(run: Path, out: Path, stage: str, rank: int, factor: float) -> dict:
    """Keys of the stage's config. out: of the chain."""
    usual = train.parse([str(demo.HERE / f"{stage}.toml")])
    keys = {"lora": rank, "weights": demo.export(run, "teacher")}
    if stage == "ar":
        keys["latents"] = run / "latents"
    else:
        before = STAGES[STAGES.index(stage) - 1]
        keys["lora_weights"] = out / before / f"{before}-lora"
    if stage == "ode":
        keys["trajectories"] = out / "trajectories"
    return keys | {rate: factor * getattr(usual, rate) for rate in RATES[stage]}


def known(run: Path, rank: int, factor: float, quick: bool) -> dict | None:
    """What a chain has found, if it has been done; ValueError if it would be another by now."""
    out = kept(run, quick) / name_of(rank, factor)
    result = out.parent / f"{out.name}.json"
    if not result.exists():
        return None
    found = read_json(result)
    for stage in STAGES:
        keys = keys_of(run, out, stage, rank, factor)
        check_origin(result, found[stage], origin_of(run, stage, out / stage, keys, quick))
    return found


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
                if known(run, rank, factor, quick):
                    continue
                name = name_of(rank, factor)
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
            rank, _, factor = name.removeprefix("lora-").partition("-x")
            there = [known(run, int(rank), float(factor), quick) for run in runs]
            found = [each[stage] for each in there if each]
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
    note_demos(args.demos)
    if not args.table:
        run_chains(args.demos, args.ranks, args.factors, args.jobs, args.quick)
    table(args.demos, args.markdown, args.quick)


if __name__ == "__main__":
    script(main)
