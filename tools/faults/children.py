"""Every attempt runs in a process of its own: what it takes too much of, or dies of, is its end.

The processes are forked from one that has imported everything, so that each costs milliseconds.
"""

import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from wan5b.util import finite

LIMIT = 20.0  # seconds
MEMORY = 4 << 30  # bytes beyond what is mapped already


class Ended(NamedTuple):
    """How an attempt has ended."""

    name: str
    work: Path
    outcome: dict  # what the child has written
    status: int  # exit code, negative: the signal
    seconds: float
    peak: int  # bytes


# ------------------------------------------------------------------------------------ what was read


def summary(value: Any) -> Any:
    """Anything that was read, as JSON; tensors and pictures as a digest of their bytes.

    FloatingPointError if a tensor is not finite.
    """
    if hasattr(value, "_asdict"):
        value = value._asdict()
    elif hasattr(value, "__dataclass_fields__"):
        value = vars(value)
    if isinstance(value, dict):
        return {str(key): summary(entry) for key, entry in sorted(value.items(), key=str)}
    if isinstance(value, list | tuple):
        return [summary(entry) for entry in value]
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, torch.Tensor):
        if not finite(value):
            raise FloatingPointError("not finite")
        content = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return [str(value.dtype), *value.shape, blake2b(content, digest_size=8).hexdigest()]
    return repr(value)


# -------------------------------------------------------------------------------------------- child


def _outcome(attempt: Callable[[Path], Any], work: Path) -> dict:
    """What an attempt comes to, as JSON."""
    try:
        return {"kind": "result", "result": summary(attempt(work))}
    except FloatingPointError as error:
        return {"kind": "not finite", "text": str(error)}
    except (ValueError, OSError) as error:
        return {"kind": "error", "text": str(error), "trace": traceback.format_exc()}
    except SystemExit as error:
        return {"kind": "exit", "code": error.code}
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        return {"kind": "traceback", "text": text[:500], "trace": traceback.format_exc()}


def _child(attempt: Callable[[Path], Any], work: Path, limited: bool) -> None:
    """Never returns."""
    status = 70
    try:
        os.setsid()
        os.chdir(work)
        said = os.open(work / ".said", os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1)
        os.dup2(said, 2)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if limited:
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
            resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
        outcome = _outcome(attempt, work)
        sys.stdout.flush()
        sys.stderr.flush()
        (work / ".outcome").write_text(json.dumps(outcome))
        status = 0
    finally:
        os._exit(status)


# ------------------------------------------------------------------------------------------- parent


class Child:
    def __init__(self, name: str, attempt: Callable[[Path], Any], work: Path, limited: bool):
        self.name = name
        self.work = work
        work.mkdir(parents=True)
        sys.stdout.flush()
        self.began = time.monotonic()
        self.process = os.fork()
        if not self.process:
            _child(attempt, work, limited)

    def ended(self, limit: float) -> Ended | None:
        """How it has ended, if it has; one that takes too long is ended."""
        process, status, usage = os.wait4(self.process, os.WNOHANG)
        seconds = time.monotonic() - self.began
        if not process:
            if seconds > limit:
                os.killpg(self.process, signal.SIGKILL)
            return None
        outcome = {"kind": "hang" if seconds > limit else "crash"}
        if status == 0 and (self.work / ".outcome").exists():
            outcome = json.loads((self.work / ".outcome").read_text())
        said = self.work / ".said"
        outcome["said"] = said.read_text(errors="replace") if said.exists() else ""
        code = os.waitstatus_to_exitcode(status)
        return Ended(self.name, self.work, outcome, code, seconds, usage.ru_maxrss << 10)


Task = tuple[str, Callable[[Path], Any]]


def run_all(
    tasks: Iterable[Task], folder: Path, workers: int, limit: float = LIMIT, limited: bool = True
) -> Iterator[Ended]:
    """Each attempt(work) in a process of its own, some at a time; work is a new folder for it."""
    waiting = iter(enumerate(tasks))
    running: list[Child] = []
    more = True
    try:
        while more or running:
            while more and len(running) < workers:
                number, task = next(waiting, (0, None))
                more = task is not None
                if more:
                    running.append(Child(*task, folder / f"{number:06}", limited))
            time.sleep(0.002)
            for child in list(running):
                ended = child.ended(limit)
                if ended is not None:
                    running.remove(child)
                    yield ended
    finally:
        for child in running:
            os.killpg(child.process, signal.SIGKILL)
