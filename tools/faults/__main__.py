"""A long campaign of damage: files, kills, signals and full disks, all by chance from one seed.

    python tools/faults [--seed N] [--files N] [--kills N] [--only FORMAT ...] [--workers N]

Every file that the project reads is damaged in many ways and read, each time by a process of its
own. Allowed are: one line of error that names the file; the result of the whole file; another
finite one, if a note says so ("told") or the format carries nothing that could show the damage
("undetectable").
Everything else is a fault: its file is kept, and the campaign ends with 1.

--kills ends saves, exports and runs at any time, or fills their disk, and starts them again:
see kills.py. The last lines are a table of how often each happened.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).parents[2]
sys.path[1:1] = [str(ROOT), str(ROOT / "tests")]
warnings.simplefilter("ignore")

import torch  # noqa: E402
from children import Ended, run_all  # noqa: E402
from damage import FORMS, damaged  # noqa: E402
from kills import LOADING, disturb, while_loading  # noqa: E402
from subjects import Subject, make, subjects  # noqa: E402
from writers import WRITERS, make_references  # noqa: E402

from wan5b.extras import budget, log  # noqa: E402

OUTCOMES = ("error", "same", "told", "undetectable", "whole", "not tried")  # which are right
FAULTS = ("another", "unclear", "traceback", "hang", "crash", "not finite", "memory", "lost")
KEPT = Path("out/faults")
MEMORY = 2 << 30  # bytes, which no whole file here takes


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seed", type=int, help="by default of the clock")
    add("--files", type=int, default=3000, help="damaged files")
    add("--kills", type=int, default=200, help="kills, signals and full disks")
    add("--only", nargs="+", default=[], help="formats whose names hold one of these")
    add("--number", type=int, help="this one file of the campaign alone")
    add("--workers", type=int, default=2, help="processes at a time")
    add("--out", type=Path, default=KEPT, help="where the files of faults are kept")
    args = parser.parse_args(argv)
    if args.seed is None:
        args.seed = int(time.time())
    return args


# -------------------------------------------------------------------------------------------- files


def tasks(listed: list[Subject], whole: Path, args: argparse.Namespace) -> Iterator:
    """(name, attempt) for every damaged file, format by format in turn."""
    numbers = range(args.files) if args.number is None else [args.number]
    for number in numbers:
        chance = random.Random(f"{args.seed} {number}")
        subject = listed[number % len(listed)]
        content = (whole / subject.folder / subject.file).read_bytes()
        kind, content = damaged(content, subject.form, chance)
        yield f"{number} {kind}", attempt(subject, whole, content)


def attempt(subject: Subject, whole: Path, content: bytes | None) -> Callable[[Path], object]:
    """Read a copy of the subject's folder, with this content in the one file."""

    def read(work: Path):
        copy = work / "x"
        shutil.copytree(whole / subject.folder, copy)
        if content is not None:
            (copy / subject.file).write_bytes(content)
        os.chdir(copy)
        return subject.read(copy)

    return read


def judge(ended: Ended, subject: Subject, right: object) -> str:
    """One of OUTCOMES or FAULTS."""
    kind = ended.outcome["kind"]
    said = ended.outcome["said"]
    if "Traceback" in said:
        return "traceback"
    if ended.peak > MEMORY:
        return "memory"
    if kind == "error" or (kind == "exit" and ended.outcome["code"] == 2):
        text = ended.outcome.get("text") or said.strip().rpartition("\n")[2]
        inside = (ended.work / "x").rglob("*")
        names = [str(ended.work), *Path(subject.file).parts, *(path.name for path in inside)]
        if kind == "exit" and ": error: " not in text:
            return "unclear"
        named = any(name in text for name in names) or subject.form == "toml"  # or the key
        named = named or "not finite here" in text  # a run that has diverged
        clear = "\n" not in text and len(text) < 5000
        clear = clear and (kind == "error" or text.isprintable())
        return "error" if clear and named else "unclear"
    if kind != "result":
        return "crash" if kind == "exit" else kind
    if ended.outcome["result"] == right:
        return "same"
    if " left out" in said or "skipped 1 " in said:
        return "told"
    # What is changed and written anew in its own form has new sums and sizes, too.
    damage = ended.name.partition(" ")[2]
    shows = subject.shows == "sums" and damage not in FORMS or subject.shows and damage == "cut"
    return "another" if shows else "undetectable"


def prepare(whole: Path, folder: Path) -> None:
    """The whole files, made by a child: no thread may run here."""

    def make_all(_: Path) -> None:
        make(whole)
        make_references(whole)

    for ended in run_all([("make", make_all)], folder / "make", 1, 120, False):
        if ended.outcome["kind"] != "result":
            sys.exit(f"the whole files: {ended.outcome}")


def damage_files(args: argparse.Namespace, whole: Path, folder: Path) -> Counter:
    """All damaged files -> how often each (format, outcome) happened."""
    every = subjects(whole)
    listed = [subject for subject in every if ".py: " not in subject.format] + every
    if args.only:
        listed = [each for each in listed if any(word in each.format for word in args.only)]
    right = right_results(listed, whole, folder, args.workers)

    counts = Counter()
    began = time.monotonic()
    for done, ended in enumerate(
        run_all(tasks(listed, whole, args), folder / "work", args.workers), 1
    ):
        number, _, kind = ended.name.partition(" ")
        subject = listed[int(number) % len(listed)]
        outcome = judge(ended, subject, right[int(number) % len(listed)])
        counts[subject.format, outcome] += 1
        if outcome in FAULTS or args.number is not None:
            keep(args, ended, subject, outcome)
        shutil.rmtree(ended.work, ignore_errors=True)
        if done % 500 == 0:
            print(f"{done} files, {time.monotonic() - began:.0f} s", flush=True)
    return counts


def kill_writers(args: argparse.Namespace, whole: Path, folder: Path) -> Counter:
    """All kills -> how often each (writer, outcome) happened."""

    def listed() -> Iterator:
        for number in range(args.kills) if args.number is None else [args.number]:
            chance = random.Random(f"{args.seed} kill {number}")
            turn, which = divmod(number, len(WRITERS) + 1)
            if which == len(WRITERS):
                name = list(LOADING)[turn % len(LOADING)]
                yield f"{number} {name}: loading", while_loading(name, chance)
                continue
            writer = WRITERS[which]
            manner = writer.manners[turn % len(writer.manners)]
            yield f"{number} {writer.name}: {manner}", disturb(writer, manner, whole, chance)

    counts = Counter()
    for ended in run_all(listed(), folder / "kills", args.workers, 90, False):
        number, _, name = ended.name.partition(" ")
        kind = ended.outcome["kind"]
        outcome = {"result": "whole", "traceback": "lost", "error": "lost"}.get(kind, kind)
        if ended.outcome.get("code") == 77:
            outcome = "not tried"
        counts[name, outcome] += 1
        if outcome in FAULTS:
            place = args.out / f"{args.seed}-kill-{number}"
            place.mkdir(parents=True, exist_ok=True)
            again = f"python tools/faults --seed {args.seed} --number {number} --files 0"
            report = f"{again}\n{name}\n{ended.outcome.get('trace')}\n{ended.outcome['said']}"
            (place / "report.txt").write_text(report)
            text = ended.outcome.get("text", "")[-300:].replace("\n", " ")
            print(f"{outcome}: {name}: {text} [{place}]", flush=True)
        shutil.rmtree(ended.work, ignore_errors=True)
    return counts


def right_results(listed: list[Subject], whole: Path, folder: Path, workers: int) -> dict:
    """What each whole file reads as."""
    reads = [(str(i), attempt(subject, whole, None)) for i, subject in enumerate(listed)]
    right = {}
    for ended in run_all(reads, folder / "right", workers, 60):
        if ended.outcome["kind"] != "result":
            sys.exit(f"{listed[int(ended.name)]}: the whole file is not read: {ended.outcome}")
        right[int(ended.name)] = ended.outcome["result"]
    return right


def keep(args: argparse.Namespace, ended: Ended, subject: Subject, outcome: str) -> None:
    """The damaged file and how to damage it again."""
    number, _, kind = ended.name.partition(" ")
    place = args.out / f"{args.seed}-{number}"
    place.mkdir(parents=True, exist_ok=True)
    damaged_file = ended.work / "x" / subject.file
    if damaged_file.exists():
        shutil.copy(damaged_file, place)
    text = ended.outcome.get("text") or ended.outcome["said"].strip()[-300:]
    trace = ended.outcome.get("trace", "") or ended.outcome["said"]
    again = f"python tools/faults --seed {args.seed} --number {number} --kills 0"
    if args.only:
        again += " --only " + " ".join(map(repr, args.only))
    (place / "report.txt").write_text(f"{again}\n{subject.file}, {kind}\n{text}\n\n{trace}")
    text = text.replace(str(ended.work), "").replace("\n", " ")[:300]
    print(f"{outcome}: {subject.format}, {subject.file}, {kind}: {text} [{place}]", flush=True)


# -------------------------------------------------------------------------------------------- table


def table(counts: Counter) -> None:
    """Formats down, outcomes across; what never happened is left out."""
    formats = list(dict.fromkeys(name for name, _ in counts))
    shown = [name for name in (*OUTCOMES, *FAULTS) if any(counts[row, name] for row in formats)]
    width = max(map(len, formats))
    print(" " * width, *(f"{name:>12}" for name in shown))
    for row in formats:
        print(f"{row:{width}}", *(f"{counts[row, name] or '':>12}" for name in shown))
    sums = [sum(counts[row, name] for row in formats) for name in shown]
    print(f"{'all':{width}}", *(f"{total:>12}" for total in sums))


def main() -> int:
    args = parse()
    torch.set_num_threads(1)
    budget.matmul_rate = lambda *_: 1.0  # the speed of this machine does not matter
    log.curves = lambda folders: None  # half a second each
    print(f"seed {args.seed}; faults are kept in {args.out}", flush=True)
    began = time.monotonic()
    kept = {"prefix": "faults-", "ignore_cleanup_errors": True}
    with tempfile.TemporaryDirectory(**kept) as folder:
        folder = Path(folder)
        whole = folder / "whole"
        prepare(whole, folder)
        counts = Counter()
        if args.files:
            counts += damage_files(args, whole, folder)
        if args.kills:
            counts += kill_writers(args, whole, folder)
    table(counts)
    print(f"seed {args.seed}: {sum(counts.values())} in {time.monotonic() - began:.0f} s")
    return int(any(outcome in FAULTS for _, outcome in counts if counts[_, outcome]))


if __name__ == "__main__":
    sys.exit(main())
