"""The benchmarks: they start, they run to the end on a CPU, and their arithmetic is right; and the
files of real size.
"""

import math
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from common import compiling, randn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import bench
import bench_loading
import bench_recipes
import bench_training
import real_size

from wan5b import stages
from wan5b.dit import PRESETS, WanDiT
from wan5b.extras import disk
from wan5b.extras.budget import GIB, FlopCount, forward_flop
from wan5b.extras.random_weights import random_vae
from wan5b.extras.recipes import recognise
from wan5b.flow import few_step_sigmas

ROOT = Path(__file__).parent.parent
TINY = ["--preset=tiny", "--device=cpu", "--size=32x32", "--frames=3", "--ratio=1"]


def table(printed: str) -> dict[str, list[str]]:
    """The rows of bench_training's table: name -> times, seconds, slowest, TFLOP, work,
    MFU.
    """
    rows = {}
    for line in printed.splitlines():
        figures = line[26:].split()
        if len(figures) == 6 and figures[-1].endswith("%"):
            rows[line[:26].strip()] = figures
    return rows


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.name)
def test_help(path, monkeypatch, capsys):
    """In this process, where torch is imported already."""
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert not end.value.code
    assert f"python tools/{path.name}" in capsys.readouterr().out


# ------------------------------------------------------------------------------- bench_training.py


def test_training_starts_from_the_root():
    """As a command, which finds the repository by itself."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "tools/bench_training.py", *TINY, "--stage=teacher"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "losses and gradients finite: True" in done.stdout


@pytest.mark.parametrize("stage", stages.STAGES)
def test_training(stage, capsys, monkeypatch):
    functions = dict(vars(stages))
    monkeypatch.setattr(disk, "free_at", lambda path: 0)  # nothing is saved
    with compiling():
        bench_training.main([*TINY, "--stage", stage, "--iterations=2"])
    assert dict(vars(stages)) == functions, "the clock has left something behind"

    printed = capsys.readouterr().out
    first, last = re.search(r"fixed batch: (\S+) -> (\S+)", printed).groups()
    assert first != last
    assert "losses and gradients finite: True" in printed
    assert printed.count("iteration ") == 2
    times = {name: int(figures[0]) for name, figures in table(printed).items()}
    if stage in stages.DISTILLATIONS:
        # Two samples in each of two phases, every one with a rollout.
        assert "exit level" in printed
        generator = {"a rollout, generator": 4, "optimizer, generator": 2, "generator phase": 2}
        critic = {"a rollout, critic": 4, "optimizer, critic": 2, "critic phase": 2}
        assert times == generator | critic | {"generator + 1 critic": 1}
    else:
        assert times == {"optimizer, generator": 2, "phase": 2}


def test_the_first_time_is_not_counted(capsys):
    run = SimpleNamespace(generator=None, critic=None, teacher=None, device=torch.device("cpu"))
    clock = bench_training.Clock(run)
    clock.rows["phase"] = [np.array([seconds, 1e12, 0]) for seconds in (9.0, 1.0, 2.0, 6.0)]
    clock.rows["once"] = [np.array([5.0, 0, 0])]
    bench_training.print_parts(clock, 1, ceiling=1e12)
    rows = table(capsys.readouterr().out)
    assert rows["phase"][:3] == ["4", "3.000", "6.000"]  # times, mean, slowest
    assert rows["once"][:3] == ["1", "5.000", "5.000"]


@pytest.mark.parametrize("options", [["--gan", "--relativistic", "--slopes"], ["--dfd"]])
def test_training_with_real_clips(options, capsys):
    with compiling():
        bench_training.main([*TINY, "--stage=dmd", "--iterations=1", "--batch=1", *options])
    printed = capsys.readouterr().out
    assert "losses and gradients finite: True" in printed
    assert "forced 1" in printed if "--dfd" in options else "gan_critic_loss" in printed


def test_training_from_a_release(tmp_path, capsys):
    """It is made by the first call; the second one finds it, and the same weights in it."""
    release = tmp_path / "release"
    arguments = [*TINY, "--stage=dmd", "--iterations=1", "--batch=1", f"--release={release}"]

    def losses() -> list[str]:
        with compiling():
            bench_training.main(arguments)
        return re.findall(r"^iteration .*", capsys.readouterr().out, re.MULTILINE)

    first = losses()
    made = {path: path.stat().st_mtime_ns for path in release.iterdir()}
    assert made
    assert losses() == first
    assert made == {path: path.stat().st_mtime_ns for path in release.iterdir()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_repeated_flop(checkpointing):
    """What is left is a forward and the two products of its backward."""
    cfg = PRESETS["tiny"]
    model = WanDiT(cfg)
    model.checkpointing = checkpointing
    flop = FlopCount()
    repeated = bench_training.RepeatedFlop()
    flop.watch(model)
    repeated.watch(model)
    x = randn(1, cfg.in_dim, 3, 4, 4)
    model(x, 0.5, randn(1, cfg.text_len, cfg.text_dim), chunks=[1, 2])
    assert repeated.done > 0
    forward = sum(forward_flop(cfg, x, chunks=[1, 2]))
    assert flop.done - repeated.done == pytest.approx(3 * forward)


# ---------------------------------------------------------------------------------------- bench.py


def test_uneven_chunks():
    """They are found before anything is measured."""
    args = bench.parse(["--frames", "29", "--chunk", "4", "--long", "93"])
    assert bench.chunks_of(args.frames, args.chunk) == [4, 4]
    with pytest.raises(ValueError, match="nearest valid: 24 or 28"):
        bench.parse(["--frames", "29", "--chunk", "4", "--long", "97"])


@torch.no_grad()
@pytest.mark.parametrize("clean_pass", [False, True])
@pytest.mark.parametrize("after", [(1000, 500), (1000, 750, 500, 250)])
def test_flop_of_a_clip(monkeypatch, after, clean_pass):
    """As they are counted where its forwards run."""
    monkeypatch.setattr(bench, "decoding_flop", lambda *_: 0.0)
    monkeypatch.setattr(bench, "place_of", lambda _: "cpu")
    cfg = PRESETS["tiny"]
    model = WanDiT(cfg)
    noise = randn(1, cfg.in_dim, 7, 4, 4)
    clip = bench.Clip(noise, [1, 3, 3], None, 0, few_step_sigmas(after), clean_pass)
    flop = FlopCount()
    flop.watch(model)
    context = randn(1, cfg.text_len, cfg.text_dim)
    assert len(list(clip.make(model, context, clip.new_cache(cfg, torch.float32)))) == 3
    expected = clip.flop(cfg, None)["DiT"]
    assert expected.linear + expected.attention == pytest.approx(flop.done)


def test_rates():
    """Three chunks of 2, 3, 3 latent frames, finished after 1, 3 and 4 seconds."""
    marks = [1.0, 3.0, 4.0]
    assert bench.durations(marks) == [1.0, 2.0, 1.0]
    assert bench.rate_of(marks, [2, 3, 3], slice(1)) == 8
    assert bench.rate_of(marks, [2, 3, 3], slice(-2, None)) == 8
    row = bench.row("eager both", marks, bound=1.0, frames=29, peak=3 * GIB)
    assert row.split()[2:] == ["4.00", "25%", "7.2", "1.00", "1.000", "2.000", "3.0"]
    assert len(row) == len(bench.HEADER)


def test_bounds():
    flop = bench.Flop(linear=6, attention=8, conv=10)
    assert flop.bound({"ffn": 2, "attention": 4, "conv3d": 5, "matmul": 1}) == 3 + 2 + 2


def test_decoding_flop():
    vae = random_vae("tiny", "cpu")
    noise = randn(1, vae.cfg.z_dim, 5, 2, 2)
    with torch.no_grad():
        found = bench.decoding_flop(vae, noise)
        with FlopCounterMode(display=False) as counted:
            state = vae.stream()
            for chunk in noise.split([1, 1, 3], 2):
                vae.decode_chunk(chunk, state)
    assert found == counted.get_total_flops()


def test_clip():
    """Its cache holds all frames, or the window; its parts add up."""
    cfg = PRESETS["tiny"]
    noise = randn(1, cfg.in_dim, 6, 4, 4)
    clip = bench.Clip(noise, [3, 3])
    assert clip.pixel_frames == 21
    assert clip.new_cache(cfg).capacity == 6
    cache = bench.Clip(noise, [3, 3], window=4, sink=1).new_cache(cfg, torch.float32)
    assert (cache.capacity, cache.window, cache.sink) == (4, 4, 1)
    assert cache.memory.dtype == torch.float32
    vae = random_vae("tiny", "cpu")
    with torch.no_grad():
        flop = clip.flop(cfg, vae)
    assert sum(flop["both"]) == sum(flop["DiT"]) + sum(flop["VAE"])
    # Four levels and a clean pass, causal; the teacher sees everything.
    assert flop["DiT"].linear == 5 * flop["teacher"].linear
    assert flop["DiT"].attention < 5 * flop["teacher"].attention


def test_errors():
    a = torch.ones(1, 2, 6, 2, 2)
    b = a.clone()
    b[:, :, :3] *= 2  # the first chunk
    assert bench.apart(a, b, 3) == (
        f"{math.sqrt(1 / 5):.1e} (5.0e-01 in the first chunk, 0.0e+00 in the last)"
    )


def test_seams():
    """Chunk by chunk the VAE gives what it gives at once; what is wrong at a seam is told."""
    vae = random_vae("tiny", "cpu")
    latents = randn(1, vae.cfg.z_dim, 6, 2, 2)
    pattern = r"decoded at seams (\S+), elsewhere (\S+)"
    with torch.no_grad():
        video = vae.decode(latents)
        seam, elsewhere = re.fullmatch(pattern, bench.seams(vae, latents, video)).groups()
        assert max(float(seam), float(elsewhere)) < 1e-5
        video[:, :, 9] *= 2
        seam, elsewhere = re.fullmatch(pattern, bench.seams(vae, latents, video)).groups()
        assert float(seam) == 0.5
        assert float(elsewhere) < 1e-5


def test_variants():
    """CUDA graphs are around a compiled network, and gone when it is no longer one."""
    model = WanDiT(PRESETS["tiny"])
    vae = random_vae("tiny", "cpu")
    with compiling():
        for variant, recorded in (("eager", False), ("compiled", True), ("compiled fp8", True)):
            with bench.running_as(variant, model, vae):
                assert ("compute" in vars(model)) == recorded
            assert "compute" not in vars(model)


# -------------------------------------------------------------------------------- bench_recipes.py


@pytest.mark.parametrize("low_memory", [False, True])
def test_recipes(low_memory, capsys, tmp_path):
    """One call, a line each: as sample.py makes them, and in its order."""
    own = tmp_path / "own.toml"
    own.write_text("causal = true\nsteps = 2\nguidance = 3.0\nchunk = 2\nwindow = 4\nsink = 1\n")
    options = ["--preset=tiny", "--device=cpu", "--geometry=32x32", *["--low-memory"] * low_memory]
    bench.main(["--recipe", "fastwan", str(own), "--frames", "13", *options])
    header, *lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["fastwan", "own"]
    assert header.split() == [*bench_recipes.COLUMNS]
    for line in lines:
        frames, dit, vae, both, rate, first, p50, p99, memory = line.split()[1:10]
        assert (frames, memory) == ("13", "-")
        assert float(rate) == pytest.approx(13 / float(both), rel=0.2, abs=0.1)
        assert 0 < float(first) <= float(both)
        assert min(float(dit), float(vae)) >= 0
        if line.startswith("own"):  # two chunks: one time between them
            assert p50 == p99
            assert float(first) + float(p50) == pytest.approx(float(both), abs=0.02)
        else:
            assert p50 == p99 == "-"
    assert lines[0].endswith("the whole clip at once, 3 steps of renoise, shift 1, guidance 1")
    assert lines[1].endswith("2 steps of unipc, shift 5, guidance 3, chunks of 2, window 4, sink 1")
    with pytest.raises(ValueError, match="nearest: 61 or 93"):
        bench.main(["--recipe", "fastwan", "longlive2", "--frames", "81", *options])
    with pytest.raises(ValueError, match="float8 attention needs a Hopper GPU"):
        bench.main(["--recipe", str(own), "--frames", "13", "--fp8-attention", *options])


def test_shares_and_rows():
    """Two clips of three chunks: medians, and all times between chunks."""
    times = [0.1 * n for n in range(1, 101)]
    assert bench_recipes.share(times, 0.5) == times[49]
    assert bench_recipes.share(times, 0.99) == times[98]
    assert bench_recipes.share([3.0, 1.0, 2.0], 0.99) == 3.0
    runs = [bench_recipes.Figures(1.0, 2.0, [1.0, 1.5, 3.0])]
    runs.append(bench_recipes.Figures(3.0, 4.0, [2.0, 2.25, 5.0]))
    line = bench_recipes.row("a", runs, 40, "how")
    assert line.split()[1:9] == ["40", "2.00", "3.00", "4.00", "10.00", "1.50", "0.500", "2.750"]


# -------------------------------------------------------------------------------- bench_loading.py


def test_peak_memory():
    """What is freed again inside the block counts."""
    before = bench_loading.private_memory()
    with bench_loading.PeakMemory() as peak:
        held = torch.ones(64 << 20, dtype=torch.uint8)
        deadline = time.monotonic() + 10
        while peak.bytes < before + (32 << 20) and time.monotonic() < deadline:
            time.sleep(0.01)
        del held
    assert peak.bytes >= before + (32 << 20)


# ------------------------------------------------------------------------------------ real_size.py


def test_real_size(tmp_path, capsys):
    """Lengths are the published ones, but for a note of 56 bytes in one header; the folders call
    for the recipes that README names.
    """
    real_size.main([str(tmp_path)])
    printed = capsys.readouterr().out
    apart = dict(re.findall(r"/(\S+) +([+-]\d+) of the published", printed))
    assert apart == dict.fromkeys(real_size.PUBLISHED, "+0") | {real_size.KIJAI: "-56"}

    asked = {"Wan2.2-TI2V-5B": "wan22", "Wan2.2-TI2V-5B-Diffusers": "wan22"}
    asked["FastWan2.2-TI2V-5B-FullAttn-Diffusers"] = "fastwan"
    for name, recipe in asked.items():
        assert recognise(str(tmp_path / name), None, {}).name == recipe
    release = str(tmp_path / "Wan2.2-TI2V-5B")
    longlive = str(tmp_path / "LongLive-2.0-5B" / "model_bf16.pt")
    assert recognise(release, longlive, {}).name == "longlive2"
