"""Everything that is written: how, how far it has come, and what must be there at any time."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import training
from scripts import brightness, content, run
from torch import nn

from wan5b import fsdp
from wan5b.data import Store
from wan5b.extras import checkpoints, clips, formats, log
from wan5b.extras.shards import write_shard
from wan5b.optim import AdamW
from wan5b.vae22 import Stream
from wan5b.weights import save_dit

# See kills.py.
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
    disk: str = ""  # the part of the folder that it writes to


def nothing(folder: Path, whole: Path) -> None:
    """Before its beginning there is nothing; at its end `check` sees to everything."""


def done(folder: Path, number: int) -> None:
    """Note that this much is finished, by a call that nothing here disturbs."""
    os.mkdir(folder / f".done-{number}")


def count_done(folder: Path) -> int:
    return max((int(path.name[6:]) for path in folder.glob(".done-*")), default=0)


# ------------------------------------------------------------------------------------------ writers


def _optimizer(step: int) -> AdamW:
    model = nn.Linear(64, 64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(step)
    return AdamW(model, fsdp.World("cpu"), {}, 1e-3, (0.9, 0.99), 0.0, ema=True)


def _save(folder: Path, step: int) -> None:
    made = _optimizer(step)
    checkpoints.save(made.world, folder / "run", {"generator": made}, {"step": step}, keep=1)


def save_checkpoints(folder: Path) -> None:
    saved = checkpoints.complete(folder / "run")
    for step in range(int(saved[-1].name[5:]) + 1 if saved else 1, 5):
        _save(folder, step)
        done(folder, step)


def check_checkpoints(folder: Path, finished: int) -> None:
    """The newest one is whole, and at least as new as the last that was finished."""
    if not finished and not checkpoints.complete(folder / "run"):
        return
    path = checkpoints.complete(folder / "run")[-1]
    made = _optimizer(0)
    step = checkpoints.load(made.world, path, {"generator": made})["step"]
    formats.check_checkpoint(path)
    assert step >= finished, f"{path.name} of {finished}"
    assert (made.parameters["weight"] == step).all(), f"{path.name} holds another step's weights"


def check_only_last(folder: Path, whole: Path) -> None:
    """Of other checkpoints nothing is left that the next save would not remove."""
    left = {path.name for path in (folder / "run").iterdir() if path.suffix != ".partial"}
    assert left == {"step-0000004"}, left


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


class Flat(torch.nn.Module):
    """A VAE whose pictures have the brightness of the latents."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))  # says where it is

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
    there = sorted(path.name for path in made.glob(pattern) if ".partial" not in path.name)
    assert names == there, f"{there}, not {names}"
    for name in names:
        expected, found = content(right / name), content(made / name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), f"another {name}"


def copy_data(folder: Path, whole: Path) -> None:
    shutil.copytree(whole / "run", folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "out")


def go_train(folder: Path) -> None:
    os.chdir(folder)
    run("train.py", ["run.toml", "out=disk/out"], folder)


def check_run(folder: Path, finished: int) -> None:
    """Every checkpoint that counts is whole."""
    if (folder / "disk/out").exists():
        for path in checkpoints.complete(folder / "disk/out"):
            formats.check_checkpoint(path)
            formats.load_dit(path)
    if (folder / "disk/out/dmd.safetensors").exists():
        formats.load_dit(folder / "disk/out/dmd.safetensors")


def check_run_result(folder: Path, whole: Path) -> None:
    check_same(whole / "finished/out", folder / "disk/out", "dmd.safetensors")
    rows = log.read_metrics(folder / "disk/out/metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1], rows


TEXT = ["--per-shard", "2", "--batch", "1", "--prompts", "prompts.txt", "--out", "disk/store"]
CLIP = ["--size", "32x64", "--frames", "13", "--chunk", "1", "--latents", "--prompt", "A fox"]
CLIP += ["--seed", "0", "1", "--release", ".", "--out", "disk/clips/"]


def copy_release(folder: Path, whole: Path) -> None:
    shutil.copytree(whole / "release", folder, dirs_exist_ok=True)


def go_prepare(folder: Path) -> None:
    os.chdir(folder)
    run("prepare.py", ["text", "--release", ".", *TEXT], folder)


def check_store(folder: Path, finished: int) -> None:
    if list((folder / "disk/store").glob("*.safetensors")):
        Store(folder / "disk/store")


def check_store_result(folder: Path, whole: Path) -> None:
    check_same(whole / "reference/disk/store", folder / "disk/store", "*.safetensors")


def go_sample(folder: Path) -> None:
    os.chdir(folder)
    run("sample.py", [*CLIP, "--overwrite"], folder)


def check_sample(folder: Path, finished: int) -> None:
    """Clips that have their name are whole, but for what Ctrl-C has left out."""
    for path in (folder / "disk/clips").glob("*-[01].mp4"):
        count, _ = brightness(path)
        assert count in (1, 5, 9, 13), f"{path.name}: {count} frames"


def check_sample_result(folder: Path, whole: Path) -> None:
    check_same(whole / "reference/disk/clips", folder / "disk/clips", "*.safetensors")


def make_references(whole: Path) -> None:
    copy_release(whole / "reference", whole)
    go_prepare(whole / "reference")
    go_sample(whole / "reference")


SCRIPT = ((*KILLS, *SIGNALS, *SIGNALS, *DISKS), "disk")
WRITERS = [
    Writer("checkpoint", 0.3, nothing, save_checkpoints, check_checkpoints, check_only_last),
    Writer("export", 0.2, nothing, save_export, check_export, nothing),
    Writer("store", 0.1, nothing, save_shards, check_shards, nothing),
    Writer("clip", 0.3, nothing, save_clips, check_clips, nothing),
    Writer("metrics", 0.1, nothing, save_metrics, check_metrics, nothing),
    Writer("train.py", 1.5, copy_data, go_train, check_run, check_run_result, *SCRIPT),
    Writer("prepare.py", 1.0, copy_release, go_prepare, check_store, check_store_result, *SCRIPT),
    Writer("sample.py", 1.5, copy_release, go_sample, check_sample, check_sample_result, *SCRIPT),
]
