"""Kills, signals and full disks while something is written, and what is there afterwards.

Every writer begins with something old, is ended somewhere on its way to something new, and then
starts again. Nothing that was finished may be lost or half there, and the second start must come
to what an undisturbed one comes to.

- calls    SIGKILL at a call that changes the disk, of Python's own functions
- time     SIGKILL at any time
- term, interrupt    SIGTERM or SIGINT at any time; of scripts only
- limit    files may not grow beyond some size, which looks like a full disk
- disk     a file system of a few hundred KB, where one can be mounted
"""

import builtins
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random

from scripts import ROOT
from writers import Writer, count_done

# Calls of Python's that change the disk.
CALLS = ("replace", "fsync", "open", "unlink", "rmdir", "rename", "link", "write", "mkdir")


# ------------------------------------------------------------------------------------------ endings


def _kill_at_call(number: int) -> None:
    """From now on, the number-th call that changes the disk is this process's last."""
    left = number

    def counted(call):
        def wrapper(*args, **options):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return wrapper

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    builtins.open = counted(builtins.open)


def _go(writer: Writer, folder: Path, said: int, prepare: Callable[[], None]) -> None:
    """In a process of its own, which ends as a script does, and never returns. said: stdout."""
    code = 1
    try:
        os.dup2(said, 1)
        os.dup2(said, 2)
        prepare()
        writer.go(folder)
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except (OSError, ValueError) as error:
        os.write(2, f"error: {error}\n".encode())
        code = 2
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def end(writer: Writer, folder: Path, manner: str, chance: Random) -> tuple[int, str]:
    """Run the writer and end it in this manner -> its exit code and what it said."""
    calls = round(2 ** chance.uniform(0, 8))
    seconds = chance.uniform(0, 1.2 * writer.seconds)
    size = chance.choice([0, 100, 1000, 8000, 30_000, 100_000, 300_000])

    def prepare() -> None:
        if manner == "calls":
            _kill_at_call(calls)
        elif manner == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    # What is said goes through a pipe, which is never full here.
    said, written = os.pipe()
    process = os.fork()
    if not process:
        _go(writer, folder, written, prepare)
    os.close(written)
    number = {"time": signal.SIGKILL, "term": signal.SIGTERM, "interrupt": signal.SIGINT}
    if manner in number:
        time.sleep(seconds)
        os.kill(process, number[manner])
    with open(said, errors="replace") as lines:
        text = lines.read()
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), text


def check_ending(manner: str, code: int, said: str) -> None:
    """AssertionError unless a process has ended as it should."""
    allowed = {
        "calls": (-signal.SIGKILL, 0),
        "time": (-signal.SIGKILL, 0),
        "term": (143, -signal.SIGTERM, 0),  # by the signal itself, while modules load
        "interrupt": (130, -signal.SIGINT, 0),
        "limit": (2, 0),
        "disk": (2, 0),
        "": (0,),  # undisturbed
    }[manner]
    assert "Traceback" not in said, f"{manner}: {said[-1500:]}"
    assert code in allowed, f"{manner}: exit code {code}: {said[-1500:]}"
    if code == 2:
        line = said.strip().rpartition("\n")[2]
        assert "error: " in line, said[-500:]
        assert "/" in line or ".jsonl" in line, f"it names no file: {line}"


def disturb(writer: Writer, manner: str, whole: Path, chance: Random) -> Callable:
    """An attempt: begin, be ended once or more often, look at what is there, start again."""

    def attempt(work: Path) -> None:
        folder = work / "x"
        disk = folder / writer.disk
        disk.mkdir(parents=True)
        if manner == "disk":
            size = chance.choice([40, 200, 600, 2000])
            mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", str(disk)]
            if subprocess.run(mount, capture_output=True).returncode:
                raise SystemExit(77)  # nothing can be mounted here
        try:
            _disturb(writer, manner, folder, whole, chance)
        finally:
            os.chdir(work)
            if manner == "disk":
                subprocess.run(["umount", "-l", str(disk)], check=True)

    return attempt


def _disturb(writer: Writer, manner: str, folder: Path, whole: Path, chance: Random) -> None:
    writer.begin(folder, whole)
    for _ in range(chance.choice([1, 1, 2])):
        code, said = end(writer, folder, manner, chance)
        check_ending(manner, code, said)
        writer.check(folder, count_done(folder))
    if manner == "disk":
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder / writer.disk)], check=True)
    code, said = end(writer, folder, "", chance)
    check_ending("", code, said)
    writer.check(folder, count_done(folder))
    writer.result(folder, whole)


# ------------------------------------------------------------------------------------ while loading

LOADING = {"sample.py": "--help", "prepare.py": "--help", "train.py": "none.toml"}


def while_loading(name: str, chance: Random) -> Callable:
    """An attempt: a signal to a new process, most of whose time goes by with loading torch."""
    number = chance.choice([signal.SIGINT, signal.SIGINT, signal.SIGTERM])
    seconds = chance.uniform(0.05, 4)

    def attempt(_: Path) -> None:
        command = [sys.executable, str(ROOT / name), LOADING[name]]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, text=True, **pipes)
        time.sleep(seconds)
        process.send_signal(number)
        _, said = process.communicate()
        # Python itself begins before the script does.
        assert str(ROOT) not in said and said.count("\n") <= 1 or "<frozen" in said, said
        assert process.returncode in (-number, 128 + number, 0, 2), process.returncode

    return attempt
