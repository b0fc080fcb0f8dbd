"""extras/fp8_training.py: what has no grad in float8, what has grad as it was, copies that go."""

import copy

import pytest
import torch
from common import compiling, rel
from test_adapters import lora_run, merged
from torch._dynamo.utils import counters
from training import config, first_batch, make_run, run_phase

from wan5b import fuse, stages
from wan5b.extras import adapters, fp8_training
from wan5b.extras.checks import check_config
from wan5b.extras.fp8 import quantize_blocks
from wan5b.extras.fp8_training import linear_layers, without_grad_in_fp8
from wan5b.fsdp import World

pytestmark = pytest.mark.usefixtures("quick_and_clean")


def bf16_run(data, stage="dmd", **changes) -> stages.Run:
    """With `lora` the adapters have an effect."""
    make = lora_run if "lora" in changes else make_run
    return make(data, stage, dtype="bfloat16", **changes)


def copies(run: stages.Run) -> int:
    models = (run.generator, run.critic, run.teacher)
    layers = [layer for model in models for block in model.blocks for layer in linear_layers(block)]
    return sum(layer.copy is not None for layer in layers)


def roll_out(run: stages.Run) -> stages.Rolled:
    return stages.roll_out(run, first_batch(run, "critic", step=2))


def test_rollouts_are_those_of_a_quantised_network(data):
    """To the bit; and of the weights as they are by then."""
    run = bf16_run(data)
    without_grad_in_fp8(run)
    for _ in range(2):
        other = bf16_run(data)
        other.generator.load_state_dict(run.generator.state_dict())
        plain = roll_out(other).x0
        quantize_blocks(other.generator)
        assert torch.equal(roll_out(run).x0, roll_out(other).x0)
        assert 0.01 < rel(roll_out(run).x0, plain) < 0.3
        assert copies(run) == 0
        with torch.no_grad():
            for weight in run.generator.parameters():
                weight.mul_(1.1)


LORA_TARGETS = [adapters.TARGETS, ("self_attn.q", "ffn.2")]


@pytest.mark.parametrize("targets", LORA_TARGETS)
def test_rollouts_under_adapters_are_those_of_the_export(data, tmp_path, targets):
    """Quantised, to the bit; of the adapter as it is by then. The critic scores with its own."""
    run = bf16_run(data, lora=4, lora_targets=targets, ema=0.0)
    without_grad_in_fp8(run)
    batch = first_batch(run, "critic")
    x = batch.draws(torch.randn, *run.shape(run.cfg.frames))
    for _ in range(2):
        plain = bf16_run(data)
        names = plain.generator.state_dict()
        _, exported = adapters.merged(run, tmp_path / "dmd.safetensors", {})
        plain.generator.load_state_dict({name: exported(name) for name in names})
        plain.critic.load_state_dict(merged(run.critic))
        plain.teacher.load_state_dict(run.teacher.state_dict())
        for name in ("generator", "critic", "teacher"):
            quantize_blocks(getattr(plain, name))
        assert torch.equal(roll_out(run).x0, roll_out(plain).x0)
        with torch.no_grad():
            scores = [run.critic(x, 0.5, batch.context), run.teacher(x, 0.5, batch.context)]
            assert rel(scores[0], plain.critic(x, 0.5, batch.context)) < 1e-2
            assert torch.equal(scores[1], plain.teacher(x, 0.5, batch.context))
            assert rel(*scores) > 0.05
            for weight in adapters.adapters(run.generator).values():
                weight.mul_(1.1)
        assert copies(run) == 0


def test_copies_are_made_once_a_rollout(data, monkeypatch):
    made = []
    inner = fp8_training.quantize

    def counted(weight, *rest):
        made.append(weight.shape)
        return inner(weight, *rest)

    monkeypatch.setattr(fp8_training, "quantize", counted)
    run = bf16_run(data)
    without_grad_in_fp8(run)
    roll_out(run)
    assert len(made) == 10 * len(run.generator.blocks)


@pytest.mark.parametrize("method", [{}, {"lora": 4}])
@pytest.mark.parametrize("stage", ["dmd", "sid"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_with_grad_nothing_changes(data, stage, checkpointing, method):
    """The same loss and gradients to the bit, given the same rollout and scores."""
    run = bf16_run(data, stage, checkpointing=checkpointing, **method)
    other = copy.deepcopy(run.critic)
    without_grad_in_fp8(run)
    batch = first_batch(run, "critic")
    x = batch.draws(torch.randn, *run.shape(run.cfg.frames))
    x.requires_grad_()
    found = []
    for model in (run.critic, other):
        v = model(x, 0.5, batch.context)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        found.append((v, *torch.autograd.grad(v.square().mean(), [x, *weights])))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with torch.no_grad():
        assert not torch.equal(run.critic(x, 0.5, batch.context), found[0][0])
    assert copies(run) == 0


@pytest.mark.parametrize("stage", ["dmd", "sid"])
def test_gradients_are_near(data, stage):
    """Of whole phases, and metrics under the same names."""
    changes = {"levels": (1000,), "batch": 2}  # a rollout of one level
    plain = bf16_run(data, stage, **changes)
    fast = bf16_run(data, stage, **changes)
    without_grad_in_fp8(fast)
    for phase in stages.PHASES[stage]:
        rows = [run_phase(run, phase)[0] for run in (plain, fast)]
        assert rows[0].keys() == rows[1].keys()
        assert copies(fast) == 0
        grads = [run.optimizers[phase.moves].grads for run in (plain, fast)]
        whole = [torch.cat([grad.flatten() for grad in each.values()]) for each in grads]
        assert 0 < rel(*whole) < 0.1, phase.name


def test_refusals(data):
    with pytest.raises(ValueError, match=r"^fp8 needs bfloat16 on a GPU .* not torch.float32"):
        check_config(config(data, "dmd", fp8=True), World("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("method", [{}, {"lora": 4}])
def test_compiled(data, method):
    """Copies are inputs of what is compiled: made anew, they compile nothing anew."""
    run = bf16_run(data, **method)
    without_grad_in_fp8(run)
    expected = roll_out(run).x0
    with compiling():
        torch._dynamo.reset()
        fuse.enable()
        assert rel(roll_out(run).x0, expected) < 0.1
        graphs = counters["stats"]["unique_graphs"]
        assert graphs > 0
        with torch.no_grad():
            for weight in run.generator.parameters():
                weight.mul_(1.1)
        roll_out(run)
        assert counters["stats"]["unique_graphs"] == graphs
