"""Stopping and going on: what a kill, a signal, a full disk or NaN leave of a run; checkpoints in
the place of weights.
"""

import json
import shutil
import signal
import subprocess
import time
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import filesystem
from torch.testing._internal.distributed.fake_pg import FakeStore
from training import (
    DIT,
    ROOT,
    checkpoint_state,
    config,
    finish,
    names,
    python,
    read_metrics,
    refused,
    same,
    values,
    write_toml,
)

import train
from wan5b import fsdp, stages
from wan5b.dit import WanDiT
from wan5b.extras.checks import check_unchanged, held_by
from wan5b.extras.digest import NOTHING
from wan5b.extras.formats import load_dit, read_metadata
from wan5b.extras.recipes import facts
from wan5b.weights import save_dit

pytestmark = pytest.mark.usefixtures("quick_and_clean")

# ------------------------------------------------------------- a checkpoint in the place of weights


@pytest.mark.parametrize("stage", ["dmd", "teacher"])
def test_a_checkpoint_is_read_like_its_export(trained, stage):
    step = trained / stage / "step-0000002"
    export = trained / stage / f"{stage}.safetensors"
    model = load_dit(step, channels=48)
    assert model.cfg == load_dit(export).cfg == DIT
    assert same(model.state_dict(), load_file(export))
    half = load_dit(str(step), dtype=torch.bfloat16)
    assert same(half.state_dict(), load_dit(export, "cpu", torch.bfloat16).state_dict())
    assert read_metadata(step) == read_metadata(export)
    assert read_metadata(step)["levels"] == [1000, 750, 500, 250]


def test_training_goes_on_from_a_checkpoint(data, trained, tmp_path):
    """As from the export: weights and teacher."""

    def dmd(out, weights, teacher):
        changes = {"weights": str(trained / weights), "teacher": str(trained / teacher)}
        return finish(config(data, "dmd", tmp_path / out, steps=1, **changes))

    exports = dmd("a", "dmd/dmd.safetensors", "teacher/teacher.safetensors")
    assert same(dmd("b", "dmd/step-0000002", "teacher/step-0000002"), exports)


@pytest.fixture
def fake_group():
    """The second of two processes, with collectives that do nothing."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("fake_group")
def test_every_process_reads_a_checkpoint_by_itself(trained):
    state = load_dit(trained / "dmd/step-0000002").state_dict()
    assert same(state, load_file(trained / "dmd/dmd.safetensors"))


@pytest.mark.parametrize(
    ("file", "keep", "says"),
    [
        ("facts.json", None, "facts.json: no such file"),
        ("facts.json", 20, "not JSON"),
        ("__0_0.distcp", None, "its files have 0"),
        ("__0_0.distcp", 3000, "incomplete"),
        ("__0_0.distcp", 0, "incomplete"),
        (".metadata", 100, "incomplete"),
        (".metadata", 0, "incomplete"),
        (".metadata", None, "holds no weights"),
    ],
)
def test_damaged_checkpoints(trained, tmp_path, file, keep, says):
    """A file is gone, or cut to so many bytes."""
    step = tmp_path / "step-0000002"
    shutil.copytree(trained / "dmd/step-0000002", step)
    content = (step / file).read_bytes()
    (step / file).unlink()
    if keep is not None:
        (step / file).write_bytes(content[:keep])
    with pytest.raises(ValueError, match=says) as error:
        load_dit(step)
    assert str(step) in str(error.value)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------ killed

KILLED_IN_A_SAVE = """
import os, signal, sys, train
from wan5b import fsdp
from wan5b.extras.checkpoints import Writer
inner = Writer.write_data
def write_data(self, plan, planner):
    written = inner(self, plan, planner)
    if "step-0000004" in str(self.path):
        os.kill(os.getpid(), signal.SIGKILL)
    return written
Writer.write_data = write_data
train.main(train.parse(sys.argv[1:]), fsdp.World("cpu"))
"""


@pytest.mark.slow
def test_killed_in_a_save_and_resumed_in_a_new_process(data, tmp_path):
    """4 iterations at once equal 2, a save, kill -9 in the next save, and a new process: bit for
    bit.
    """
    out = tmp_path / "out"
    path = write_toml(tmp_path / "a.toml", values(data, "dmd", out))
    killed = python(KILLED_IN_A_SAVE, path)
    straight = finish(config(data, "dmd", tmp_path / "straight"))
    _, errors = killed.communicate(timeout=100)
    assert killed.returncode == -signal.SIGKILL, errors
    assert names(out) == ["step-0000002", "step-0000004.partial"]
    assert len(read_metrics(out)) == 4

    resumed = python("", ROOT / "train.py", path)
    _, errors = resumed.communicate(timeout=100)
    assert resumed.returncode == 0, errors
    assert names(out) == ["step-0000002", "step-0000004"]
    assert same(load_file(out / "dmd.safetensors"), straight)
    state = checkpoint_state(out / "step-0000004")
    assert same(state, checkpoint_state(tmp_path / "straight/step-0000004"))
    assert read_metrics(out) == read_metrics(tmp_path / "straight")

    ending = ".blocks.0.modulation"
    assert {name.removesuffix(ending) for name in state if name.endswith(ending)} == {
        "generator.master",
        "generator.exp_avg_sq",
        "generator.ema",
        "critic.master",
        "critic.exp_avg_sq",
    }


def test_a_failed_save_keeps_the_last_one(data, tmp_path, monkeypatch):
    """A disk that fills up: an error, the checkpoint before is as good as it was, and nothing of
    the new one takes room.
    """
    straight = finish(config(data, "dmd", tmp_path / "straight"))
    items = len(checkpoint_state(tmp_path / "straight/step-0000004"))
    out = tmp_path / "out"
    inner = filesystem._write_item
    written = 0

    def write_item(*arguments, **options):
        nonlocal written
        written += 1
        if written > 1.5 * items:
            raise OSError(28, "No space left on device")
        return inner(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(filesystem, "_write_item", write_item)
        with pytest.raises(OSError, match="step-0000004: .*No space left"):
            train.main(config(data, "dmd", out, keep=1), fsdp.World("cpu"))
    assert written > items
    assert names(out) == ["step-0000002"]
    assert same(finish(config(data, "dmd", out, keep=1)), straight)
    assert names(out) == ["step-0000004"]


# ---------------------------------------------------------------------------------------- signalled


def test_sigterm_saves_and_the_same_command_goes_on(data, tmp_path):
    out = tmp_path / "out"
    keys = values(data, "ar", out, steps=100000, save_every=100000, decay=False)
    running = python("", ROOT / "train.py", write_toml(tmp_path / "a.toml", keys))
    deadline = time.time() + 100
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert running.poll() is None, running.communicate()
        assert time.time() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    printed, errors = running.communicate(timeout=60)
    assert running.returncode == 0, errors
    assert "stopped by SIGTERM" in printed
    done = len(read_metrics(out))
    assert names(out) == [f"step-{done:07d}"]
    finish(config(data, "ar", out, steps=done + 2, save_every=100000))
    assert [row["step"] for row in read_metrics(out)] == list(range(done + 2))


@pytest.mark.parametrize(
    ("step", "phase", "saved"),
    [
        (0, "generator", 0),
        pytest.param(0, "critic", 1, marks=pytest.mark.slow),
        pytest.param(1, "critic", 1, marks=pytest.mark.slow),
    ],
)
def test_sigterm_within_an_iteration(data, tmp_path, monkeypatch, capfd, step, phase, saved):
    """It ends after the micro-batch at work, if no network has moved; the step begins anew, and all
    comes out alike.
    """
    out = tmp_path / "out"
    cfg = config(data, "dmd", out, micro_batch=1, save_every=3)
    world = fsdp.World("cpu")
    inner = stages.micro_batches
    calls = []

    def interrupted(run, phase_now, step_now, moved):
        for batch in inner(run, phase_now, step_now, moved):
            calls.append((step_now, phase_now))
            world.stopping = calls[-1] == (step, phase)
            yield batch

    monkeypatch.setattr(stages, "micro_batches", interrupted)
    train.main(cfg, world)
    assert f"stopped by SIGTERM in step {saved}" in capfd.readouterr().out
    moved = (step, phase) == (0, "critic")  # by the generator's update
    assert calls.count((step, phase)) == (4 if moved else 1)
    assert names(out) == ["step-0000001"] * saved
    assert len(read_metrics(out)) == saved

    monkeypatch.undo()
    resumed = finish(cfg)
    assert same(resumed, finish(config(data, "dmd", tmp_path / "straight", micro_batch=1)))


# ----------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_from_an_earlier_checkpoint(data, tmp_path, capsys, dtype):
    out = tmp_path / "out"
    cfg = config(data, "ar", out, beta1=0.9, warmup=3, decay=True, dtype=dtype)
    first = finish(cfg)
    rows = read_metrics(out)
    state = checkpoint_state(out / "step-0000004")
    assert "generator.exp_avg.blocks.0.modulation" in state
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert [row["step"] for row in rows] == [0, 1, 2, 3]

    # config.json tells all that the run was started with.
    record = json.loads((out / "config.json").read_text())
    git = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True, cwd=ROOT).stdout.strip()
    assert record["commit"] == head
    assert record["processes"] == 1
    lists = {key: value for key, value in vars(cfg).items() if isinstance(value, tuple)}
    assert train.Config(**record["config"] | lists) == cfg

    # A finished run is left as it is.
    capsys.readouterr()
    assert same(finish(cfg), first)
    assert "this run is finished" in capsys.readouterr().out

    # All iterations are done: only the export is left.
    (out / "ar.safetensors").unlink()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"loss": 1.0, "st')  # a full disk tears a line
    assert same(finish(cfg), first)
    assert read_metrics(out) == rows

    (out / "ar.safetensors").unlink()
    shutil.rmtree(out / "step-0000004")
    assert same(finish(cfg), first)
    assert read_metrics(out) == rows
    assert same(checkpoint_state(out / "step-0000004"), state)


@pytest.mark.parametrize("kind", ["no facts", "link", "file"])
def test_what_a_checkpoint_could_not_replace(data, tmp_path, command, capsys, kind):
    """Is found before the steps up to it are trained, not when it is to be saved."""
    out = tmp_path / "out"
    finish(config(data, "ar", out))
    (out / "ar.safetensors").unlink()
    last = out / "step-0000004"
    elsewhere = last.rename(tmp_path / "elsewhere")
    if kind == "no facts":
        shutil.copytree(elsewhere, last)
        (last / "facts.json").unlink()
    elif kind == "link":
        last.symlink_to(elsewhere)
    else:
        last.touch()
    (out / "step-0000001").symlink_to(elsewhere)  # of a step that is done
    capsys.readouterr()
    toml = write_toml(tmp_path / "a.toml", values(data, "ar", out))
    line = refused(command, toml)
    assert f"{last} is in the way of a checkpoint, and is none" in line

    last.rename(tmp_path / "away")
    finish(config(data, "ar", out))


def test_a_changed_config_does_not_resume(data, tmp_path, command, capsys):
    out = tmp_path / "out"
    finish(config(data, "ar", out, steps=2))
    capsys.readouterr()

    def line(stage, **changes):
        keys = values(data, stage, out, **changes)
        return refused(command, write_toml(tmp_path / "a.toml", keys))

    free = {"keep": 1, "steps": 9, "sample_every": 7, "micro_batch": 1, "offload": True}
    finished = out / "ar.safetensors"
    wrong = f"{finished} was made with another lr (0.0001, now 0.0003); choose another out"
    assert wrong in line("ar", lr=3e-4)
    assert f"{finished} is of step 2; move it to go on" in line("ar", **free)

    finished.unlink()
    text = line("ar", lr=3e-4, seed=1, **free)
    assert "step-0000002 was made with another lr (0.0001, now 0.0003), seed (0, now 1);" in text
    assert "another stage" in line("dmd")
    wrong = "with another steps (2, now 9), decay (False, now True); choose"
    assert wrong in line("ar", decay=True, steps=9)
    assert "step-0000002 is beyond steps = 1" in line("ar", steps=1)


def test_changed_data_do_not_resume(data, tmp_path, command, capsys):
    """By what they hold, wherever they lie."""
    out = tmp_path / "out"
    finish(config(data, "ar", out, steps=2))
    (out / "ar.safetensors").unlink()
    capsys.readouterr()
    moved = tmp_path / "moved"
    shutil.copytree(data / "latents", moved)
    finish(config(data, "ar", out, steps=3, latents=str(moved)))
    (out / "ar.safetensors").unlink()
    capsys.readouterr()

    teacher = str(data / "teacher.safetensors")
    keys = values(data, "ar", out, weights=teacher)
    line = refused(command, write_toml(tmp_path / "a.toml", keys))
    assert f"step-0000003 was made with other weights than {teacher} holds now" in line
    (moved / "00000.safetensors").unlink()
    keys = values(data, "ar", out, latents=str(moved))
    line = refused(command, write_toml(tmp_path / "a.toml", keys))
    assert f"step-0000003 was made with other latents than {moved} holds now" in line


def test_what_is_not_known_is_not_called_another(data, tmp_path, command, capsys):
    """A checkpoint from before they noted what data held, and exports that others have written."""
    out = tmp_path / "out"
    finish(config(data, "ar", out, steps=2))
    final = out / "ar.safetensors"
    kept = final.rename(tmp_path / "kept.safetensors")
    capsys.readouterr()
    toml = write_toml(tmp_path / "a.toml", values(data, "ar", out, steps=2))
    facts = out / "step-0000002/facts.json"
    said = json.loads(facts.read_text())
    way_out = "can't be checked; go on with what wrote it, or choose another out"
    settings, held = "with which settings it was made", "what its data held"
    step = "of which step it is"

    facts.write_text(json.dumps(said | {"step": None}))
    assert f"{facts.parent} does not say {step}: " in refused(command, toml)
    del said["data"]
    facts.write_text(json.dumps(said))
    line = refused(command, toml)
    assert f"{facts.parent} does not say {held}: an earlier version or another" in line
    assert line.endswith(way_out)
    del said["training"]
    facts.write_text(json.dumps(said))
    assert f"{facts.parent} does not say {settings}, nor {held}: " in refused(command, toml)
    save_file(load_file(kept), final)
    assert f"{final} does not say {settings}, nor {held}, nor {step}: " in refused(command, toml)


@pytest.mark.parametrize("steps", [-1, 1.5, "1", None])
def test_steps_that_no_optimizer_can_have_taken(data, tmp_path, command, capsys, steps):
    """-1 ended in a division by zero, behind an iteration."""
    out = tmp_path / "out"
    finish(config(data, "ar", out, steps=2))
    (out / "ar.safetensors").unlink()
    toml = write_toml(tmp_path / "a.toml", values(data, "ar", out, steps=3))
    facts = out / "step-0000002/facts.json"
    said = json.loads(facts.read_text()) | {"optimizer_steps": {"generator": steps}}
    facts.write_text(json.dumps(said))
    capsys.readouterr()
    assert "optimizer_steps is " in refused(command, toml)


def test_another_vae_is_noted_where_it_trains(data, tmp_path):
    """Long rollouts learn from its pictures; elsewhere it only shows what is made."""
    for name in ("here", "moved", "other"):
        basis = torch.full((16, 1, 4, 16, 16), float(name == "other"))
        (tmp_path / name).mkdir()
        save_file({"basis": basis}, tmp_path / name / "codec_VAE.safetensors")

    for longer, step in ((0, 1), (12, 2)):
        cfg = config(data, "dmd", vae=str(tmp_path / "here"), rollout_frames=longer)
        moved, other = (replace(cfg, vae=str(tmp_path / name)) for name in ("moved", "other"))
        saved = tmp_path / f"{step}.safetensors"
        save_dit(WanDiT(DIT), saved, facts(cfg, DIT, step, held_by(cfg)))
        check_unchanged(moved, held_by(moved), saved)
        refused = pytest.raises(ValueError, match="made with other vae than .*other holds now")
        with refused if longer else nullcontext():
            check_unchanged(other, held_by(other), saved)

    # A run that began before it was noted, or what is in a pipeline.
    held = held_by(cfg) | {"teacher": NOTHING}
    del held["vae"]
    said = facts(cfg, DIT, step, held)
    save_dit(WanDiT(DIT), saved, said, overwrite=True)
    check_unchanged(other, held_by(other), saved)


def test_keep(data, tmp_path):
    finish(config(data, "ar", tmp_path, steps=5, save_every=1, keep=2, batch=2))
    assert names(tmp_path) == ["step-0000004", "step-0000005"]


@pytest.mark.parametrize("stage", ["ar", "dmd"])
def test_nan_stops_the_run(data, tmp_path, monkeypatch, stage):
    inner = train.iteration

    def iteration(run, step):
        if step == 3:
            with torch.no_grad():
                next(iter(run.generator.parameters())).view(-1)[0] = torch.nan
        return inner(run, step)

    monkeypatch.setattr(train, "iteration", iteration)
    says = r"step 3, rank 0: not finite here: .*loss.*step-0000002"
    with pytest.raises(FloatingPointError, match=says):
        train.main(config(data, stage, tmp_path), fsdp.World("cpu"))
    assert names(tmp_path) == ["step-0000002"]
    assert len(read_metrics(tmp_path)) == 3
    assert not (tmp_path / f"{stage}.safetensors").exists()
    state = checkpoint_state(tmp_path / "step-0000002")
    assert all(value.isfinite().all() for value in state.values())
