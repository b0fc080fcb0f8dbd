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
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
import training
from scripts import brightness, content, run
from torch import nn

from wan5b import fsdp
from wan5b.data import Store, write_shard
from wan5b.extras import clips, formats, log
from wan5b.optim import AdamW
from wan5b.vae22 import Stream
from wan5b.weights import save_dit

CALLS = ("replace", "fsync", "open", "unlink", "rmdir", "rename", "link", "write", "mkdir")
KILLS = ("calls", "time")
SIGNALS = ("term", "interrupt")
DISKS = ("limit", "disk")


class Writer(NamedTuple):
    """Something that is written; its functions get the folder."""

    name: str
    seconds: float  # about what `go` takes
    begin: Callable[[Path, Path], None]  # (its folder, the folder of whole files)
    go: Callable[[Path], None]  # writes; calls `done` with what is finished
    check: Callable[[Path, int], None]  # AssertionError if what is finished is not there
    result: Callable[[Path, Path], None]  # AssertionError if what it came to is not right
    manners: tuple[str, ...] = (*KILLS, *DISKS)


def done(folder: Path, number: int) -> None:
    """Note that this much is finished, by a call that nothing here disturbs."""
    os.mkdir(folder / f".done-{number}")


def count_done(folder: Path) -> int:
    return max((int(path.name[6:]) for path in folder.glob(".done-*")), default=0)


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
        "term": (143, 0),
        "interrupt": (130, 0),
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


# ------------------------------------------------------------------------------------------ writers


def _optimizer(step: int) -> AdamW:
    model = nn.Linear(64, 64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(step)
    return AdamW(model, fsdp.World("cpu"), {}, 1e-3, (0.9, 0.99), 0.0, ema=True)


def _save(folder: Path, step: int) -> None:
    made = _optimizer(step)
    fsdp.save(made.world, folder / "run", {"generator": made}, {"step": step}, keep=1)


def save_checkpoints(folder: Path) -> None:
    saved = fsdp.checkpoints(folder / "run")
    for step in range(int(saved[-1].name[5:]) + 1 if saved else 1, 5):
        _save(folder, step)
        done(folder, step)


def check_checkpoints(folder: Path, finished: int) -> None:
    """The newest one is whole, and at least as new as the last that was finished."""
    if not finished and not fsdp.checkpoints(folder / "run"):
        return
    path = fsdp.checkpoints(folder / "run")[-1]
    made = _optimizer(0)
    step = fsdp.load(made.world, path, {"generator": made})["step"]
    formats.check_checkpoint(path)
    assert step >= finished, f"{path.name} of {finished}"
    assert (made.parameters["weight"] == step).all(), f"{path.name} holds another step's weights"


def check_only_last(folder: Path, whole: Path) -> None:
    """No parts of other checkpoints are left."""
    assert os.listdir(folder / "run") == ["step-0000004"], os.listdir(folder / "run")


def save_export(folder: Path) -> None:
    for number in range(count_done(folder) + 1, 5):
        model = training.WanDiT(training.DIT)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(number)
        save_dit(model, folder / "x.safetensors", {"step": number}, overwrite=True)
        done(folder, number)


def check_export(folder: Path, finished: int) -> None:
    if not finished and not (folder / "x.safetensors").exists():
        return
    step = formats.read_metadata(folder / "x.safetensors")["step"]
    weights = formats.load_dit(folder / "x.safetensors").state_dict()
    assert step >= finished
    assert all((weight == step).all() for weight in weights.values()), "of two exports"


def save_shards(folder: Path) -> None:
    for number in range(count_done(folder) + 1, 5):
        tensors = {"latent": torch.full((3, 500), float(number))}
        write_shard(folder / f"store/{number:05}.safetensors", tensors, [str(number)] * 3, seed=1)
        done(folder, number)


def check_shards(folder: Path, finished: int) -> None:
    if not finished and not list((folder / "store").glob("*.safetensors")):
        return
    store = Store(folder / "store")
    assert len(store) >= 3 * finished
    for i, prompt in enumerate(store.prompts):
        assert (store[i]["latent"] == float(prompt)).all()


class Flat:
    """A VAE whose pictures have the brightness of the latents."""

    def stream(self) -> Stream:
        return Stream()

    def decode_chunk(self, latent: torch.Tensor, state: Stream) -> torch.Tensor:
        return torch.full((1, 3, 5, 64, 64), latent.mean().item())


def save_clips(folder: Path) -> None:
    for number in range(count_done(folder) + 1, 5):
        latents = [torch.full((1, 48, 1, 4, 4), number / 5)] * 2
        options = {"record": {"number": number}, "sheet": True, "save_latents": True}
        clips.write(Flat(), latents, folder / "x.mp4", frames=10, overwrite=True, **options)
        done(folder, number)


def check_clips(folder: Path, finished: int) -> None:
    """A whole mp4; what lies beside it is its own, or not there."""
    path = folder / "x.mp4"
    assert path.exists() or not finished, "the mp4 is gone"
    if not path.exists():
        return
    count, level = brightness(path)
    number = round(5 * level)
    assert count == 10, f"{count} frames"
    assert number >= finished
    record = path.with_suffix(".json")
    if record.exists():
        said = json.loads(record.read_text())["number"]
        assert said == number, f"the record is clip {said}'s, the mp4 is clip {number}"


def save_metrics(folder: Path) -> None:
    start = count_done(folder)
    log.begin(folder / "run", {"lr": 1e-4}, 1, start)
    for step in range(start, 40):
        log.append(folder / "run", {"step": step, "loss": step / 3})
        done(folder, step + 1)


def check_metrics(folder: Path, finished: int) -> None:
    rows = log.read_metrics(folder / "run/metrics.jsonl") if finished else []
    assert [row["step"] for row in rows][:finished] == list(range(finished)), f"of {finished}"


# ------------------------------------------------------------------------------------------ scripts


def check_same(right: Path, made: Path, pattern: str) -> None:
    """AssertionError unless two folders hold the same tensors."""
    names = sorted(path.name for path in right.glob(pattern))
    assert names == sorted(path.name for path in made.glob(pattern))
    for name in names:
        expected, found = content(right / name), content(made / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), f"another {name}"


def copy_data(folder: Path, whole: Path) -> None:
    shutil.copytree(whole / "run", folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "out")


def go_train(folder: Path) -> None:
    os.chdir(folder)
    run("train.py", ["run.toml"], folder)


def check_run(folder: Path, finished: int) -> None:
    """Every checkpoint that counts is whole."""
    if (folder / "out").exists():
        for path in fsdp.checkpoints(folder / "out"):
            formats.check_checkpoint(path)
            formats.load_dit(path)
    if (folder / "out/dmd.safetensors").exists():
        formats.load_dit(folder / "out/dmd.safetensors")


def check_run_result(folder: Path, whole: Path) -> None:
    check_same(whole / "finished/out", folder / "out", "dmd.safetensors")
    rows = log.read_metrics(folder / "out/metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1], rows


TEXT = ["--per-shard", "2", "--batch", "1", "--prompts", "prompts.txt", "--out", "store"]
CLIP = ["--size", "32x64", "--frames", "13", "--chunk", "1", "--latents", "--prompt", "A fox"]
CLIP += ["--seed", "0", "1", "--release", ".", "--out", "clips/"]


def copy_release(folder: Path, whole: Path) -> None:
    shutil.copytree(whole / "release", folder, dirs_exist_ok=True)


def go_prepare(folder: Path) -> None:
    os.chdir(folder)
    run("prepare.py", ["text", "--release", ".", *TEXT], folder)


def check_store(folder: Path, finished: int) -> None:
    if list((folder / "store").glob("*.safetensors")):
        Store(folder / "store")


def check_store_result(folder: Path, whole: Path) -> None:
    check_same(whole / "reference/store", folder / "store", "*.safetensors")


def go_sample(folder: Path) -> None:
    os.chdir(folder)
    run("sample.py", [*CLIP, "--overwrite"], folder)


def check_sample(folder: Path, finished: int) -> None:
    """Clips that have their name are whole, but for what Ctrl-C has left out."""
    for path in (folder / "clips").glob("*-[01].mp4"):
        count, _ = brightness(path)
        assert count in (1, 5, 9, 13), f"{path.name}: {count} frames"


def check_sample_result(folder: Path, whole: Path) -> None:
    check_same(whole / "reference/clips", folder / "clips", "*.safetensors")


def make_references(whole: Path) -> None:
    copy_release(whole / "reference", whole)
    go_prepare(whole / "reference")
    go_sample(whole / "reference")


def nothing(folder: Path, whole: Path) -> None:
    """Before its beginning there is nothing; at its end `check` sees to everything."""


SCRIPT = (*KILLS, *SIGNALS, *SIGNALS, *DISKS)
WRITERS = [
    Writer("checkpoint", 0.3, nothing, save_checkpoints, check_checkpoints, check_only_last),
    Writer("export", 0.2, nothing, save_export, check_export, nothing),
    Writer("store", 0.1, nothing, save_shards, check_shards, nothing),
    Writer("clip", 0.3, nothing, save_clips, check_clips, nothing),
    Writer("metrics", 0.1, nothing, save_metrics, check_metrics, nothing),
    Writer("train.py", 1.5, copy_data, go_train, check_run, check_run_result, SCRIPT),
    Writer("prepare.py", 1.0, copy_release, go_prepare, check_store, check_store_result, SCRIPT),
    Writer("sample.py", 1.5, copy_release, go_sample, check_sample, check_sample_result, SCRIPT),
]


def disturb(writer: Writer, manner: str, whole: Path, chance: Random) -> Callable:
    """An attempt: begin, be ended once or more often, look at what is there, start again."""

    def attempt(work: Path) -> None:
        folder = work / "x"
        folder.mkdir()
        if manner == "disk":
            size = chance.choice([40, 200, 600, 2000])
            mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", str(folder)]
            if subprocess.run(mount, capture_output=True).returncode:
                raise SystemExit(77)  # nothing can be mounted here
        try:
            _disturb(writer, manner, folder, whole, chance)
        finally:
            os.chdir(work)
            if manner == "disk":
                subprocess.run(["umount", "-l", str(folder)], check=True)

    return attempt


def _disturb(writer: Writer, manner: str, folder: Path, whole: Path, chance: Random) -> None:
    writer.begin(folder, whole)
    for _ in range(chance.choice([1, 1, 2])):
        code, said = end(writer, folder, manner, chance)
        check_ending(manner, code, said)
        writer.check(folder, count_done(folder))
    if manner == "disk":
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
    code, said = end(writer, folder, "", chance)
    check_ending("", code, said)
    writer.check(folder, count_done(folder))
    writer.result(folder, whole)
