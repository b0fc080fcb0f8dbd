"""Training with compiled pieces and with attention as extras/training_attention.py arranges it:
gradients as without, nothing compiled twice.
"""

import dataclasses
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from common import compiling, gpu, rel
from training import STAGES, furthest, make_run, run_phase

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import bench_training

from wan5b import fuse, stages
from wan5b.dit import PRESETS, Block, DiTConfig
from wan5b.extras.training_attention import arrange
from wan5b.fsdp import World

pytestmark = pytest.mark.usefixtures("quick_and_clean")
GRAPHS = torch._dynamo.utils.counters["stats"]


def gradients(run: stages.Run, step: int = 0) -> dict[str, torch.Tensor]:
    """Those of all phases of an iteration; no network moves."""
    found = {}
    for phase in run.phases:
        run_phase(run, phase, step)
        grads = run.optimizers[phase.moves].grads
        found |= {f"{phase.name}.{name}": grad for name, grad in grads.items()}
        run.optimizers[phase.moves].grads = {}
    return found


def networks(run: stages.Run) -> list:
    return [model for model in (run.generator, run.critic, run.teacher) if model is not None]


@pytest.fixture
def traced(monkeypatch):
    """The pieces compiled in all but the last step, code of their own: seconds, not minutes."""
    compile = partial(torch.compile, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(torch, "compile", compile)
    for name in ("before", "between", "after"):
        monkeypatch.setattr(Block, name, fuse.fused(getattr(Block, name).__wrapped__))
    with compiling():
        yield


def check_compiled(run: stages.Run) -> None:
    """Gradients of two micro-batches as without; then nothing more is compiled."""
    plain = gradients(run)
    before = GRAPHS["unique_graphs"]
    fuse.enable()
    assert furthest(gradients(run), plain) < 1e-5
    assert GRAPHS["unique_graphs"] >= before + 3
    made = GRAPHS["unique_graphs"]
    for step in range(3):
        stages.iteration(run, step)
    assert GRAPHS["unique_graphs"] == made

    # Weights that moved are the ones that compiled pieces read.
    moved = gradients(run, 3)
    fuse.enable(False)
    assert furthest(moved, gradients(run, 3)) < 1e-5


@pytest.mark.slow
def test_gradients_of_traced_pieces(data, traced):
    """sid has all cases: teachers that carry grad too."""
    check_compiled(make_run(data, "sid", ratio=1))


@pytest.mark.slow
def test_gradients_of_traced_pieces_with_a_gan(data, traced):
    """Taps come and go with every forward, and nothing is compiled for them."""
    check_compiled(make_run(data, "dmd", ratio=1, gan_weight=0.5, keep_attention=True))


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["teacher", "ar", "dmd", "sid"])
def test_gradients_behind_a_first_frame(data, traced, monkeypatch, stage):
    """Chunks of two sizes; arranged and compiled at once."""
    monkeypatch.setattr(bench_training.train, "check_fit", lambda *_: None)
    run = make_run(data, stage, prefix=1, frames=4, ratio=1)
    clips = Clips({"latent": item["latent"][:, :4]} for item in run.data.store)
    run.data.store = clips
    for model in networks(run):
        arrange(model, keep=True, split=True)
    check_compiled(run)


class Clips(list):
    """In a store's place, for shorter clips."""


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_of_compiled_pieces(data, stage):
    with compiling():
        torch._dynamo.reset()
        check_compiled(make_run(data, stage, ratio=1))


# ------------------------------------------------------------------------- at the widths of the 5B


def errors(run: stages.Run, truth: dict) -> dict[str, float]:
    """Of each phase, the relative error of all gradients together."""
    found = gradients(run)
    parts = {}
    for phase in stages.PHASES[run.cfg.stage]:
        names = [name for name in truth if name.startswith(f"{phase.name}.")]
        whole = (torch.cat([x[name].flatten() for name in names]) for x in (found, truth))
        parts[phase.name] = rel(*whole)
    return parts


def wide_run(folder, stage: str, dtype: str) -> stages.Run:
    """Two layers of the 5B's, 6 frames of 24x40 tokens, on the GPU."""
    options = ["--stage", stage, "--size", "768x1280", "--frames", "6", "--batch", "1"]
    args = bench_training.parse(options)
    sizes = PRESETS[args.preset]
    stores = bench_training.make_data(folder, stage, sizes, (sizes.in_dim, 6, 48, 80))
    cfg = bench_training.make_config(args, stores)
    return bench_training.build(dataclasses.replace(cfg, dtype=dtype), World("cuda"))


@gpu
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_in_bfloat16(tmp_path, monkeypatch, stage):
    """About as far from float32's as those of plain bfloat16, compiled and arranged in any way."""
    monkeypatch.setitem(PRESETS, "ti2v-5B", DiTConfig(num_layers=2))
    run = wide_run(tmp_path, stage, "bfloat16")
    exact = wide_run(tmp_path, stage, "float32")
    for model, like in zip(networks(exact), networks(run), strict=True):
        model.load_state_dict(like.state_dict())
    truth = gradients(exact)
    plain = errors(run, truth)
    assert all(1e-3 < error < 0.1 for error in plain.values()), plain

    with compiling():
        fuse.enable()
        for keep, split in ((False, False), (True, True)):
            for model in networks(run):
                vars(model).pop("compute", None)
                arrange(model, keep, split)
            found = errors(run, truth)
            for phase, error in found.items():
                assert error < 1.3 * plain[phase], (keep, split, found, plain)
