"""Full disks: what all that writes says of one, and what is refused before any work is done.

/dev/full stands for a full disk: whatever is written to it, the kernel's own answer is that no
space is left. As a script this is a process of torchrun's, which saves on such disks.
"""

import builtins
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import GOLDEN
from safetensors import SafetensorError
from training import DIT, ENVIRONMENT, config, finish, make_run, names, values, write_toml

import sample
import train
from wan5b import fsdp, util
from wan5b.extras import checkpoints, cli, clips, disk, files, log, mp4, remux, tensor_files
from wan5b.extras.shards import write_shard
from wan5b.optim import AdamW

ROOT = Path(__file__).parent.parent
FULL = r"the disk is full \(No space left on device\): "
NEEDS = r"at least [0-9.]+ [kMG]B are needed, "
FREE = r"[0-9.]+ [kMG]B are free; make room there, or choose another disk"


def on_full_disk(patch, pattern: str) -> None:
    """From now on what is opened for writing under such a name is on a full disk."""
    inner = io.open

    def opened(file, mode="r", *rest, **options):
        if isinstance(file, str | Path) and "r" not in mode and re.search(pattern, str(file)):
            return inner("/dev/full", mode.replace("x", "w"), *rest, **options)
        return inner(file, mode, *rest, **options)

    patch.setattr(io, "open", opened)  # of pathlib
    patch.setattr(builtins, "open", opened)


def little_room(patch, size: int) -> None:
    free = shutil.disk_usage("/")._replace(free=size)
    patch.setattr(shutil, "disk_usage", lambda place: free)


# ---------------------------------------------------------------------------------- what is said


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0.0 kB"), (4096, "4.1 kB"), (2e6, "2.0 MB"), (6.04e10, "60.4 GB")]
)
def test_sizes_in_words(size, text):
    assert util.in_words(size) == text


WRITERS = {
    "json": lambda path: util.write_json(path, {"prompt": "a"}),
    "tensors": lambda path: util.write_tensors(path, {"x": torch.zeros(10_000)}),
    "png": lambda path: files.write_sheet(path, [torch.zeros(32, 32, 3).byte().numpy()]),
    "shard": lambda path: write_shard(path, {"latent": torch.zeros(1, 10_000)}, ["a"]),
}


def full_in_rust(*_):
    """What safetensors raises on a full disk: it opens its files in Rust, which is not patched."""
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    raise SafetensorError(text)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_that_is_replaced(tmp_path, monkeypatch, kind):
    """The old one stays, and nothing else."""
    path = tmp_path / f"x.{kind}"
    path.write_text("old")
    needed = "at least 40.0 kB are needed, " if kind in ("tensors", "shard") else ""
    with monkeypatch.context() as patch:
        patch.setattr(util, "save_file", full_in_rust)
        on_full_disk(patch, f"x.{kind}")
        with pytest.raises(OSError, match=f"^cannot write {path}: {FULL}{needed}{FREE}$"):
            WRITERS[kind](path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [path.name]
    WRITERS[kind](path)


def test_a_line_of_metrics(tmp_path):
    (tmp_path / log.METRICS).symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"^cannot write {tmp_path}/metrics.jsonl: {FULL}{FREE}$"):
        log.append(tmp_path, {"step": 0})


@pytest.mark.parametrize("part", ["transformer/diffusion", "vae/diffusion", "spiece.model"])
def test_a_converted_folder(tmp_path, monkeypatch, part):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import convert

    made = tmp_path / "made"
    command = [str(GOLDEN / "formats/original"), str(made), "--layout", "diffusers"]
    with monkeypatch.context() as patch:
        on_full_disk(patch, part)
        with pytest.raises(OSError, match=f"^cannot write {made}: {FULL}({NEEDS})?{FREE}$"):
            convert.main(command)
    assert not os.listdir(tmp_path)
    convert.main(command)


def test_a_converted_file(tmp_path, monkeypatch):
    """It is named, and not what it is called until it is whole."""
    made = tmp_path / "made.safetensors"
    entries = {"x": tensor_files.Entry(torch.zeros(10_000), torch.float32)}
    with monkeypatch.context() as patch:
        on_full_disk(patch, "made")
        with (
            pytest.raises(OSError, match=f"^cannot write {made}: {FULL}{NEEDS}{FREE}$"),
            util.replacing(made) as partial,
        ):
            tensor_files.write_stream(partial, entries, {})
    assert not os.listdir(tmp_path)


def test_a_pickle(tmp_path, monkeypatch):
    """torch.save ends with an error of its own, of an unexpected place."""
    from wan5b.extras.exports import Model, write_pickle

    entries = {"x": tensor_files.Entry(torch.zeros(100_000), torch.float32)}
    on_full_disk(monkeypatch, "x.pth")
    with pytest.raises(OSError, match=f"^cannot write {tmp_path}/x.pth: {FULL}{FREE}$"):
        write_pickle(tmp_path / "x.pth", Model("vae", None, entries))


def test_other_errors_are_told_as_they_are(tmp_path):
    with pytest.raises(OSError, match=f"^cannot write {tmp_path}: Permission denied$"):
        with util.writing(tmp_path):
            raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "x"))
    with pytest.raises(RuntimeError, match="^a fault$"), util.writing(tmp_path):
        raise RuntimeError("a fault")


def test_what_nobody_has_foreseen(tmp_path, monkeypatch, capsys):
    """The making of a folder, say: told by the script."""

    def full():
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(cli.signals, "while_running", lambda: None)
    with pytest.raises(SystemExit, match="2"):
        cli.script(full)
    said = capsys.readouterr().err
    assert re.fullmatch(f"train.py: error: cannot write {tmp_path}/x: {FULL}{FREE}\n", said)


# ----------------------------------------------------------------------------------------- clips


def clip(path: Path, chunks: int, **options) -> None:
    """A clip of noise, with a record and a sheet."""
    from wan5b.extras.random_weights import random_vae

    latents = list(torch.randn(chunks, 1, 48, 2, 4, 4, generator=torch.manual_seed(0)))
    options |= {"frames": 8 * chunks - 3, "record": {"a": "record"}}
    clips.write(random_vae("tiny", "cpu"), latents, path, **options)


def test_a_clip_on_a_disk_that_is_full_by_then(tmp_path, monkeypatch):
    """FFmpeg writes to /dev/full from the start."""
    inner = remux.hold

    def moved(path):
        path.unlink()
        path.symlink_to("/dev/full")
        return inner(path)

    monkeypatch.setattr(mp4.remux, "hold", moved)
    with pytest.raises(OSError, match=f"^cannot write {tmp_path}/x.mp4: {FULL}{FREE}$"):
        clip(tmp_path / "x.mp4", 4)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("what", ["mp4", "state.safetensors"])
def test_a_clip_tells_of_that_and_not_of_what_lies_beside(tmp_path, monkeypatch, what):
    """Half of it is written; then there is no room for anything."""
    inner = mp4.VideoWriter._mux
    path = tmp_path / f"x.{what}"
    state = tmp_path / "x.state.safetensors"

    def mux(self, packets):
        if self.count > 10:
            full = OSError(errno.ENOSPC, "No space left on device", str(self.partial))
            with util.writing(state) if path == state else nullcontext():
                raise full
        inner(self, packets)

    state.touch()  # as of some seconds before
    on_full_disk(monkeypatch, r"partial\.(png|json)")
    monkeypatch.setattr(mp4.VideoWriter, "_mux", mux)
    said = f"^cannot write {path}: {FULL}{FREE}; x.[0-9a-f]*.partial.mp4 is what is finished; "
    with pytest.raises(OSError, match=f"{said}--resume {state} goes on$"):
        clip(tmp_path / "x.mp4", 4, sheet=True)
    (left,) = tmp_path.glob("*.mp4")
    assert {*tmp_path.iterdir()} == {left, state}


def test_a_whole_clip_without_room_for_its_sheet(tmp_path, monkeypatch):
    """The record is there: it repeats the clip."""
    on_full_disk(monkeypatch, r"x\.png")
    with pytest.raises(OSError, match=f"^cannot write {tmp_path}/x.png: {FULL}{FREE}$"):
        clip(tmp_path / "x.mp4", 1, sheet=True)
    assert sorted(os.listdir(tmp_path)) == ["x.json", "x.mp4"]


def test_a_clip_on_a_full_disk_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(sample.random_weights, "random_context", None)  # the first of the work
    little_room(monkeypatch, 1000)
    given = ["--random-weights", "--preset", "tiny", "--device", "cpu", "--size", "32x64"]
    given += ["--frames", "9", "--prompt", "a", "--out", str(tmp_path / "x")]
    said = f"^cannot write {tmp_path}/x.mp4: the disk is too full: at least 65.5 kB are needed, "
    with pytest.raises(OSError, match=said + "1.0 kB are free"):
        sample.main(sample.parse(given))


# -------------------------------------------------------------------------------------- training

LORA = {"lora": 2, "lora_alpha": 4.0}
GAN = {"gan_weight": 0.5, "gan_critic_weight": 0.5}


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("ar", {}),
        ("ar", {"beta1": 0.9, "ema": 0.0, "dtype": "bfloat16"}),
        ("teacher", LORA),
        ("dmd", {"dtype": "bfloat16"}),
        ("dmd", GAN | {"beta1": 0.9}),
        ("dmd", LORA | {"teacher": ""}),
    ],
)
def test_the_size_of_a_checkpoint_is_known(data, monkeypatch, stage, changes):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    run = make_run(data, stage, **changes)
    held = sum(t.nbytes for each in run.optimizers.values() for t in each.state().values())
    scores = DIT if stage == "dmd" else None
    assert disk.checkpoint_bytes(run.cfg, DIT, scores) == held


def test_a_run_without_room_for_a_checkpoint_loads_nothing(
    data, tmp_path, monkeypatch, quick_and_clean
):
    cfg = config(data, "ar", tmp_path / "out", steps=2)
    needed = disk.checkpoint_bytes(cfg, DIT, None)
    with monkeypatch.context() as patch:
        patch.setattr(train, "network", None)
        little_room(patch, needed - 100)
        said = f"cannot write {tmp_path}/out: the disk is too full: at least "
        said += f"{util.in_words(needed)} are needed"
        with pytest.raises(OSError, match=said):
            train.main(cfg, fsdp.World("cpu"))
        assert not (tmp_path / "out").exists()

        # What a killed process has left goes before a checkpoint is written.
        (tmp_path / "out/step-0000001.partial").mkdir(parents=True)
        (tmp_path / "out/step-0000001.partial/__0_0.distcp").write_bytes(bytes(100))
        with pytest.raises(TypeError, match="must be callable"):
            train.main(cfg, fsdp.World("cpu"))
    finish(cfg)

    # When the last one is there, only the export is missing.
    (tmp_path / "out/ar.safetensors").unlink()
    little_room(monkeypatch, 10)
    finish(cfg)


def test_folders_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    disk.check_folder(tmp_path / "a/b", "out")
    for name in ("file", "file/a/b", "link", "link/a"):
        held = tmp_path / name.partition("/")[0]
        wrong = f"cannot write to {tmp_path / name}: {held} is no folder; choose another --out"
        with pytest.raises(ValueError, match=wrong):
            disk.check_folder(tmp_path / name, "--out")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(ValueError, match=f"{tmp_path}/a: {tmp_path} is read-only"):
        disk.check_folder(tmp_path / "a", "out")
    with pytest.raises(ValueError, match="is read-only; choose another out"):
        log.locked(tmp_path / "a").__enter__()
    assert not (tmp_path / "a").exists()


def optimizer() -> AdamW:
    torch.manual_seed(0)
    model = torch.nn.Linear(300, 300)
    return AdamW(model, fsdp.World("cpu"), {}, 1e-3, (0.9, 0.99), 0.0, ema=True)


def test_a_checkpoint_after_sigterm(tmp_path, monkeypatch, quick_and_clean):
    """It is saved while SIGTERM's exception is handled, which is no cause of what fails there."""
    made = {"generator": optimizer()}
    checkpoints.save(fsdp.World("cpu"), tmp_path, made, {"step": 1})

    def stopped():
        try:
            raise InterruptedError
        except InterruptedError:
            checkpoints.save(fsdp.World("cpu"), tmp_path, made, {"step": 2})

    needed = r"at least 1\.4 MB are needed, "  # four times 300 x 301, float32
    with monkeypatch.context() as patch:
        on_full_disk(patch, "distcp")
        with pytest.raises(OSError, match=f"^cannot write .*step-0000002: {FULL}{needed}{FREE}$"):
            stopped()
    assert names(tmp_path) == ["step-0000001"]
    stopped()


# -------------------------------------------------------------------------- in torchrun's processes

# What is disturbed -> where: the name of the file that is on a full disk, and the process.
SHARES = {"shard": ("__1_0.distcp", 1), "index": (".metadata", 0), "facts": ("facts.json", 0)}


def interrupted(*_, **__):
    """As torch does when its writer or reader is closed half-way."""
    try:
        raise KeyboardInterrupt
    finally:
        raise RuntimeError("unexpected pos 704 vs 598")


def worker(folder: Path) -> None:
    """Save, and be disturbed at it, and save; load, and be disturbed at it, and load."""
    world = fsdp.World("cpu")
    tensors = {name: torch.zeros(100_000) for name in "abcdefgh"}
    states = {"generator": SimpleNamespace(state=tensors.copy, steps=1, loaded=lambda *_: None)}
    told = {}

    def attempt(name: str, disturb, act) -> None:
        try:
            with pytest.MonkeyPatch.context() as patch:
                disturb(patch)
                act()
        except (OSError, ValueError, RuntimeError, KeyboardInterrupt) as error:
            told[name] = f"{type(error).__name__}: {error}"
        world.barrier()
        told[name] = (told.get(name), names(folder / "run"))
        world.barrier()

    def save():
        checkpoints.save(world, folder / "run", states, {"step": len(told)}, keep=1)

    attempt("first", lambda patch: None, save)
    for name, (file, rank) in SHARES.items():
        attempt(name, lambda p: world.rank == rank and on_full_disk(p, file), save)  # noqa: B023
    cut = lambda name: lambda p: world.rank == 1 and p.setattr(torch, name, interrupted)  # noqa: E731
    attempt("save", cut("save"), save)
    attempt("last", lambda patch: None, save)

    (path,) = checkpoints.complete(folder / "run")
    attempt("load", cut("load"), lambda: checkpoints.load(world, path, states))
    attempt("loaded", lambda patch: None, lambda: checkpoints.load(world, path, states))
    (folder / f"told.{world.rank}").write_text(json.dumps(told))
    world.close()


def test_a_full_disk_of_one_process_is_told_by_all(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    command = [*launch, __file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, timeout=200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in range(2):
        told = json.loads((tmp_path / f"told.{rank}").read_text())
        assert told["first"] == [None, ["step-0000000"]]
        for step, name in enumerate(SHARES, 1):
            said, left = told[name]
            needed = r"at least 3\.2 MB are needed, "
            path = f"{tmp_path}/run/step-{step:07d}"
            assert re.fullmatch(f"OSError: cannot write {path}: {FULL}{needed}{FREE}", said), said
            assert left == ["step-0000000"]
        assert told["save"] == ["KeyboardInterrupt: ", ["step-0000000"]]
        assert told["last"] == [None, ["step-0000005"]]
        assert told["load"][0] == "KeyboardInterrupt: "
        assert told["loaded"][0] is None


def member(toml: str) -> None:
    """train.py, of which process 0 alone has no room for its log."""
    sys.argv = ["train.py", toml]
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "0":
            patch.setattr(log, "append", unwritten)
        cli.script(train.run)


def unwritten(out: Path, metrics: dict) -> None:
    with util.writing(out / log.METRICS):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_one_process_writes_alone_ends_the_others_in_a_line(data, tmp_path):
    toml = write_toml(tmp_path / "a.toml", values(data, "ar", tmp_path / "run"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    command = [*launch, "--log-dir", tmp_path, "--redirects", "3", __file__, toml]
    done = subprocess.run(
        [str(part) for part in command], env=environment, timeout=200, capture_output=True
    )
    assert done.returncode == 1
    told = []
    for rank in range(2):
        (said,) = tmp_path.glob(f"*/attempt_0/{rank}/stderr.log")
        assert "Traceback" not in said.read_text()
        told.append(said.read_text().splitlines()[-1])
    assert re.fullmatch(f"train.py: error: cannot write .*metrics.jsonl: {FULL}{FREE}", told[0])
    ended = "another process of this run has ended, its own lines say why"
    assert re.fullmatch(rf"train.py: error: {ended} \(.*Connection closed by peer.*\)", told[1])


@pytest.mark.parametrize(
    "lost", ["Read error [::1]:7: Connection reset by peer", "writev [::1]:7: Broken pipe"]
)
def test_a_killed_process_ends_the_others_in_a_line(capsys, monkeypatch, lost):
    """As gloo says it, if what was sent to that process was still unread."""
    cause = f"[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] {lost}"
    advice = "This is typically caused by a remote worker hanging. GLHF!"

    def main():
        raise RuntimeError(f"{cause}. {advice}")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit, match="2"):
        cli.script(main)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    ended = "another process of this run has ended, its own lines say why"
    assert capsys.readouterr().err == f"train.py: error: {ended} ({cause})\n"


# --------------------------------------------------------------------------------- of what is told


def test_a_file_that_is_read_is_named_itself(tmp_path):
    missing = tmp_path / "source.safetensors"
    with pytest.raises(FileNotFoundError) as caught, tensor_files.new_folder(tmp_path / "target"):
        missing.open("rb")
    assert caught.value.filename == str(missing)


@pytest.mark.parametrize("name", ["target-old", "target.safetensors", "targe"])
def test_a_source_whose_name_begins_alike_is_named_itself(tmp_path, name):
    missing = tmp_path / name / "x"
    with pytest.raises(FileNotFoundError) as caught, util.writing(tmp_path / "target"):
        missing.open("rb")
    assert caught.value.filename == str(missing)


def test_what_safetensors_says_beside_the_system(tmp_path):
    """It has errors that are not the disk's: one line all the same."""
    path = tmp_path / "file"
    with pytest.raises(OSError, match=f"^cannot write {path}: header too large$"):
        with util.writing(path):
            raise SafetensorError("header too large")


def test_what_an_inner_block_needs_is_told(tmp_path):
    def convert() -> None:
        with tensor_files.new_folder(tmp_path / "target") as folder:
            with util.writing(folder / "dit.safetensors", 5e12):
                raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="at least 5000.0 GB are needed") as caught:
        convert()
    assert str(caught.value).startswith(f"cannot write {tmp_path / 'target'}: the disk is full")


def test_an_error_that_was_there_before_is_no_cause(tmp_path):
    def tell() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            with util.writing(tmp_path / "file"):
                raise RuntimeError("of a library")  # noqa: B904

    with pytest.raises(RuntimeError, match="of a library"):
        tell()


def test_the_longest_name_is_one_of_which_all_files_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 2**22)
    length = 255
    while True:
        path = tmp_path / ("x" * length + ".mp4")
        with suppress(ValueError, OSError):
            clips.claim([clips.Clip([""], 0, path)], [], [], overwrite=False, resume=False)
            break
        length -= 1
    util.write_tensors(path.with_suffix(clips.STATE), {"x": torch.zeros(2)})


if __name__ == "__main__":
    if sys.argv[1].endswith(".toml"):
        member(sys.argv[1])
    worker(Path(sys.argv[1]))
