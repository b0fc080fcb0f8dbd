"""Runs of train.py: progress, curves, sample videos; compiled, in bfloat16, on a GPU."""

import shutil

import imageio.v3 as iio
import pytest
import torch
from common import ON_GPU, compiling
from release import VAE, random_weights
from safetensors.torch import load_file, save_file
from training import (
    DIT,
    PROMPTS,
    SIZES,
    STAGES,
    TIMINGS,
    apart,
    config,
    finish,
    read_metrics,
    same,
)

import train
from wan5b import fsdp
from wan5b.extras import checkpoints, log, previews
from wan5b.extras.adapters import said_by
from wan5b.extras.formats import read_metadata
from wan5b.extras.log import curves
from wan5b.extras.recipes import facts, frame_rate, from_metadata
from wan5b.extras.shards import write_shard
from wan5b.flow import few_step_sigmas
from wan5b.vae22 import VAE22

pytestmark = pytest.mark.usefixtures("quick_and_clean")

# ----------------------------------------------------------------------------------- metrics, looks


def test_progress(data, tmp_path):
    finish(config(data, "dmd", tmp_path, steps=2))
    for row in read_metrics(tmp_path, timings=True):
        assert row["tokens_per_second"] == pytest.approx(4 * 6 * 4 / row["seconds"])
        assert row["mfu"] > 0
        assert row.keys() >= {"critic_loss", "critic_norm", "seconds", "gib"}
    assert set(log.SHOWN) == {"loss", "norm", "critic_loss", "critic_norm", *TIMINGS}


def test_curves_are_drawn_at_every_save(data, tmp_path, monkeypatch, capsys):
    drawn = []

    def spied(folders):
        drawn.append(len(read_metrics(tmp_path / "out")))
        return curves(folders)

    monkeypatch.setattr(log, "curves", spied)
    finish(config(data, "ar", tmp_path / "out", steps=3))
    assert drawn == [2, 3]
    assert (tmp_path / "out/curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "out").glob("*.partial"))
    assert "peak memory: " in capsys.readouterr().out

    # Without matplotlib: it says so once.
    monkeypatch.setattr(log, "find_spec", lambda name: None)
    monkeypatch.setattr(log, "curves", curves)
    log.available.cache_clear()
    finish(config(data, "ar", tmp_path / "bare", steps=3))
    log.available.cache_clear()
    assert capsys.readouterr().out.count("matplotlib is not installed") == 1
    assert drawn == [2, 3]
    assert not (tmp_path / "bare/curves.png").exists()


SAMPLED = [("teacher", 0), ("dmd", 1)]
for slow in (("teacher", 1), ("ar", 0), ("ar", 1), ("ode", 1), ("dmd", 0)):
    SAMPLED.append(pytest.param(*slow, marks=pytest.mark.slow))


@pytest.mark.parametrize(("stage", "prefix"), SAMPLED)
def test_sample_videos_change_nothing(data, tmp_path, monkeypatch, stage, prefix):
    """They are there, and the run comes out as without them."""
    few = [1.0, 0.9, 0.0]
    monkeypatch.setattr(previews, "sampling_sigmas", lambda n, shift: few)  # quicker than 24
    frames = 3 + prefix
    torch.save(random_weights(VAE22(VAE), 1).state_dict(), tmp_path / "Wan2.2_VAE.pth")
    clips = {"latent": torch.randn(2, 48, frames, 2, 2)}
    write_shard(tmp_path / "clips/0.safetensors", clips, PROMPTS[:2])
    paths = {"x": torch.randn(2, 5, 48, frames, 2, 2)}
    write_shard(tmp_path / "ode/0.safetensors", paths, PROMPTS[:2], sigmas=few_step_sigmas())
    changes = {
        "steps": 3,
        "batch": 2,
        "frames": frames,
        "prefix": prefix,
        "height": 2,
        "width": 2,
        "ratio": 1,
        "latents": str(tmp_path / "clips"),
        "trajectories": str(tmp_path / "ode"),
    }
    plain = finish(config(data, stage, tmp_path / "plain", **changes))

    prompts = (PROMPTS[1], PROMPTS[0])
    changes |= {"vae": str(tmp_path), "sample_prompts": prompts, "sample_every": 2}
    assert same(finish(config(data, stage, tmp_path / "out", **changes)), plain)
    assert read_metrics(tmp_path / "out") == read_metrics(tmp_path / "plain")
    files = sorted(path.name for path in (tmp_path / "out/samples").iterdir())
    assert files == ["step-0000002-0.mp4", "step-0000002-1.mp4"]
    video = iio.imread(tmp_path / "out/samples/step-0000002-0.mp4", plugin="pyav")
    assert video.shape == (1 + 4 * (2 + prefix), 32, 32, 3)


def test_clips_of_another_rate(data, tmp_path):
    """Exports and checkpoints say how fast their clips are, and so do those of the stages after;
    sample videos are played like that.
    """
    clips = {"latent": torch.randn(2, *SIZES)}
    write_shard(tmp_path / "clips/0.safetensors", clips, PROMPTS[:2], fps=15.9)
    basis = torch.zeros(16, 1, 4, 16, 16)
    save_file({"basis": basis, "dual": basis.clone()}, tmp_path / "codec_VAE.safetensors")
    shown = {"vae": str(tmp_path), "sample_prompts": PROMPTS[:1], "sample_every": 1, "steps": 1}
    latents = str(tmp_path / "clips")
    finish(config(data, "teacher", tmp_path / "teacher", **shown, latents=latents))
    teacher = tmp_path / "teacher/teacher.safetensors"
    finish(config(data, "dmd", tmp_path / "dmd", **shown, teacher=str(teacher)))
    finish(config(data, "ode", tmp_path / "ode", steps=1, lora=4, weights=str(teacher)))
    names = ["dmd/dmd.safetensors", "dmd/step-0000001", "ode/ode.safetensors"]
    for path in (teacher, *(tmp_path / name for name in names)):
        assert from_metadata(read_metadata(path)).fps == 16
    assert said_by(tmp_path / "ode/ode-lora")["fps"] == 16
    for video in sorted(tmp_path.glob("*/samples/*.mp4")):
        assert iio.immeta(video, plugin="pyav")["fps"] == 16

    # Of 24 nothing is said, as before; nor of what no recipe has.
    for fps in (24, 24.2, 0.1, "16", None):
        write_shard(tmp_path / "clips/0.safetensors", clips, PROMPTS[:2], fps=fps)
        cfg = config(data, "ar", latents=latents)
        assert "fps" not in facts(cfg, DIT, 1, {}, frame_rate(cfg))


# -------------------------------------------------------------- compiled; in bfloat16; on a GPU too


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_compiled_runs_train_alike(data, tmp_path, stage):
    """Also one that goes on compiled from what it saved without."""
    plain = finish(config(data, stage, tmp_path / "plain"))
    torch._dynamo.reset()  # so what the other stage has compiled does not count
    counts = torch._dynamo.utils.counters["stats"]
    before = counts["unique_graphs"]
    with compiling():
        compiled = finish(config(data, stage, tmp_path / "compiled", compile=True))
    assert counts["unique_graphs"] - before >= 3
    assert apart(compiled, plain) < 1e-2

    out = tmp_path / "plain"
    (out / f"{stage}.safetensors").unlink()
    shutil.rmtree(out / "step-0000004")
    with compiling():
        resumed = finish(config(data, stage, out, compile=True))
    assert apart(resumed, plain) < 1e-2


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("stage", [*STAGES[:-1], pytest.param("sid", marks=pytest.mark.slow)])
def test_runs_in_bfloat16(data, tmp_path, stage, device):
    """On a GPU the state may lie in host memory, and a run go on from a checkpoint: the same but
    for rounding.
    """

    def run(out, **changes):
        """Four steps, or what is left of them; the average's float32 in the last checkpoint."""
        changes = {"device": device, "dtype": "bfloat16", **changes}
        train.main(config(data, stage, tmp_path / out, **changes), fsdp.World(device))
        return checkpoints.read_weights(tmp_path / out / "step-0000004")

    plain = run("plain")
    assert all(value.isfinite().all() for value in plain.values())
    assert apart(plain, load_file(data / "generator.safetensors")) > 0.5, "nothing learned"
    assert apart(run("hosted", offload=True), plain) < 0.5

    out = tmp_path / "hosted"
    (out / f"{stage}.safetensors").unlink()
    shutil.rmtree(out / "step-0000004")
    assert apart(run("hosted", offload=True), plain) < 0.5
    assert [row["step"] for row in read_metrics(out)] == [0, 1, 2, 3]
