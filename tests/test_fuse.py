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
    for phase in stages.PHASES[run.cfg.stage]:
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


SLOW = [pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES if stage != "sid"]


@pytest.mark.parametrize("stage", ["sid", *SLOW])  # sid has all cases: teachers that carry grad too
def test_gradients_of_traced_pieces(data, traced, stage):
    torch._dynamo.reset()
    check_compiled(make_run(data, stage, ratio=1))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_of_compiled_pieces(data, stage):
    with compiling():
        torch._dynamo.reset()
        check_compiled(make_run(data, stage, ratio=1))


# ------------------------------------------------------------------------- at the widths of the 5B


def distance(a: dict, b: dict) -> float:
    """Relative error of all gradients together."""
    return rel(*(torch.cat([x[name].flatten() for name in b]) for x in (a, b)))


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
    """As far from float32's as those of plain bfloat16, compiled and arranged in any way."""
    monkeypatch.setitem(PRESETS, "ti2v-5B", DiTConfig(num_layers=2))
    run = wide_run(tmp_path, stage, "bfloat16")
    exact = wide_run(tmp_path, stage, "float32")
    for model, like in zip(networks(exact), networks(run), strict=True):
        model.load_state_dict(like.state_dict())
    truth = gradients(exact)
    plain = distance(gradients(run), truth)
    assert 1e-3 < plain < 0.1

    with compiling():
        fuse.enable()
        errors = {"compiled": distance(gradients(run), truth)}
        for keep, split in ((True, False), (False, True), (True, True)):
            for model in networks(run):
                arrange(model, keep, split)
            errors[f"keep {keep}, split {split}"] = distance(gradients(run), truth)
            for model in networks(run):
                vars(model).pop("compute", None)
    print(stage, "plain", plain, errors)
    assert max(errors.values()) < 1.2 * plain
