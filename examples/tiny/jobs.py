"""What ablations.py, lora.py and stages.py share: processes of one thread each, so many at a time,
and results, which are kept and count as done while they are made as they would be now.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from wan5b.extras.checks import FREE, changed_settings, held_by
from wan5b.extras.digest import digest
from wan5b.extras.formats import read_metadata
from wan5b.util import read_json

# One thread each; malloc keeps its memory, as in make demo (a tenth of a training step).
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
}
AGAIN = 5  # seconds from one SIGTERM to the next: training only notes the first
# Of a config: what may be another one. A seed is the demo's, of whose weights there are digests.
ALIKE = FREE | {"seed"}


@dataclass(frozen=True)
class Job:
    name: str  # in the lines about it
    command: list[str]  # arguments of the interpreter
    log: Path  # takes all that it prints, behind what is there
    cost: float  # the most expensive jobs begin first


def command(script: str, given: dict) -> list[str]:
    """Of a process that does one of the script's jobs: see `parse`."""
    return [str(Path(script).resolve()), "--one", json.dumps(given)]


def parse(parser: argparse.ArgumentParser, run_one: Callable[[dict], None]) -> argparse.Namespace:
    """The options of a script that has jobs for --demos. A process of `command` does its job here,
    and ends.
    """
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        run_one(json.loads(args.one))
        sys.exit()
    if not args.demos:
        parser.error("name --demos")
    return args


@dataclass
class Running:
    job: Job
    process: subprocess.Popen
    began: float


def run_jobs(jobs: list[Job], at_once: int) -> None:
    """Run all of them; a line on stdout when each begins and ends.

    One that fails does not keep the others: ValueError at the end, with the logs of all that did.
    SIGTERM, Ctrl-C and a terminal that closes are passed on as SIGTERM; when all have ended, this
    exits with 143.
    """
    if at_once < 1:
        raise ValueError(f"--jobs {at_once}: must be at least 1")
    waiting = sorted(jobs, key=lambda job: job.cost)
    running: list[Running] = []
    failed: list[Job] = []
    with stopping() as stopped, none_left(running):
        told = 0.0
        while running or (waiting and not stopped):
            while waiting and len(running) < at_once and not stopped:
                running.append(begin(waiting.pop()))
            # Again, because a training that ends at the first goes on to be judged.
            if stopped and time.monotonic() - told > AGAIN:
                told = time.monotonic()
                for each in running:
                    each.process.terminate()
            time.sleep(0.1)
            ended = [each for each in running if each.process.poll() is not None]
            for each in ended:
                running.remove(each)
                if not went_well(each, bool(stopped)):
                    failed.append(each.job)
    if stopped:
        print("stopped; the same command goes on", flush=True)
        sys.exit(143)
    if failed:
        logs = ", ".join(str(job.log) for job in failed)
        raise ValueError(f"{len(failed)} of {len(jobs)} failed; what they said: {logs}")


@contextmanager
def stopping() -> Iterator[list[int]]:
    """A list that takes the signals that ask to stop."""
    seen: list[int] = []
    before = {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue  # nohup
        before[number] = signal.signal(number, lambda number, _: seen.append(number))
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def none_left(running: list[Running]) -> Iterator[None]:
    """Whatever goes wrong (a full disk, a closed pipe): nothing is trained on that nobody sees."""
    try:
        yield
    finally:
        for each in running:
            each.process.terminate()
        for each in running:
            each.process.wait()


def begin(job: Job) -> Running:
    """In a session of its own, so that Ctrl-C reaches it as SIGTERM, on which training saves."""
    print(f"begins  {job.name}", flush=True)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, *job.command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | ENVIRONMENT,
            start_new_session=True,
        )
    return Running(job, process, time.monotonic())


def went_well(ended: Running, stopped: bool) -> bool:
    """Whether one has ended well, or as it was asked to; a line on stdout says it."""
    code = ended.process.returncode
    seconds = f"{time.monotonic() - ended.began:.0f} s"
    if code == 0:
        print(f"done    {ended.job.name}, {seconds}", flush=True)
    elif stopped and code in (143, -signal.SIGTERM):
        print(f"stopped {ended.job.name}, {seconds}", flush=True)
    else:
        print(f"FAILED  {ended.job.name}, {seconds}, code {code}: {ended.job.log}", flush=True)
        return False
    return True


# ----------------------------------------------------------------------------------------- results


class Origin(NamedTuple):
    """What a result is made of."""

    weights: Path  # that are judged
    cfg: Any = None  # train.Config of their training; None: they are the demo's own

    def note(self) -> dict:
        """What the result says of it."""
        if self.cfg is None:
            return {"data": digests(self)}
        return {"training": asdict(self.cfg), "data": digests(self)}


def digests(origin: Origin) -> dict[str, str]:
    """Of what is there by now of all that a result is made of."""
    if origin.cfg is not None:
        return held_by(origin.cfg)
    return {"weights": digest(origin.weights)} if origin.weights.exists() else {}


def known(result: Path, of: Any, origin: Origin) -> dict | None:
    """What an earlier process has left in this file, if any.

    of: the dataclass that says what was to be done. ValueError if it was another then, or was done
    with another config or other data: its figures would pass for this one's.
    """
    if not result.exists():
        return None
    found = read_json(result)
    if found.get("of") != said(of):
        refuse(result, origin, "is of another version of this row")
    check_origin(result, found, origin)
    return found


def said(of: Any) -> dict:
    """A dataclass as a file has it."""
    return json.loads(json.dumps(asdict(of)))


def check_origin(result: Path, found: dict, origin: Origin) -> None:
    """ValueError if a file's result was not made as it would be now, as far as that can be seen:
    data that are gone by now are not compared.
    """
    note = found.get("origin")
    if note is None and origin.cfg is not None and origin.weights.exists():
        # Earlier versions noted nothing, but weights say of themselves how they were trained.
        note = read_metadata(origin.weights)
    if note is None:
        refuse(result, origin, "does not say with which config and data it was made")
    if origin.cfg is not None:
        changed = changed_settings(origin.cfg, note, ALIKE)
        if changed:
            refuse(result, origin, f"was made with another {', '.join(changed)}")
    before = note.get("data", {})
    others = [key for key, now in digests(origin).items() if before.get(key, now) != now]
    if others:
        refuse(result, origin, f"was made with other {', '.join(others)} than there are now")


def refuse(result: Path, origin: Origin, why: str) -> None:
    """ValueError, with the way out: what train.py would not go on with has to go, too."""
    away = [result]
    if origin.cfg is not None:
        chain = result.with_suffix("")  # of lora.py, of which these weights are a part
        away += [folder for folder in (chain, origin.weights.parent) if folder.is_dir()][:1]
    named = " and ".join(map(str, away))
    raise ValueError(f"{result} {why}; remove or rename {named}, or name another demo")
