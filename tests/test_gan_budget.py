"""What the GAN branch costs: memory and FLOP, told before a run loads, against what is counted."""

import dataclasses
import weakref
from types import SimpleNamespace

import pytest
import torch
from test_budget import BIG, SIZE_5B, FusedNorm, on_a_gpu
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode
from training import DIT, config, first_batch, make_run, run_phase

from wan5b import attention, stages
from wan5b.dit import DiTConfig, WanDiT, rope_table
from wan5b.extras import gan
from wan5b.extras.budget import Backward, FlopCount
from wan5b.weights import save_dit

pytestmark = pytest.mark.usefixtures("quick_and_clean")

GAN = {"gan_weight": 0.5, "gan_critic_weight": 0.25}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_budget_s_parts_are_what_is_allocated(data, dtype):
    run = make_run(data, "dmd", dtype=dtype, beta1=0.5, **GAN)
    parts = run.budget["device"]
    networks = (run.generator, run.critic, run.teacher)
    assert parts["weights"] == sum(p.nbytes for net in networks for p in net.parameters())
    kept = [state for optimizer in run.optimizers.values() for state in optimizer.state_of.values()]
    for group in ("exp_avg", "exp_avg_sq"):
        assert parts[f"optimizer: {group}"] == sum(state[group].nbytes for state in kept)
    if dtype == "bfloat16":
        critic = sum(p.numel() for p in run.critic.parameters())
        generator = sum(p.numel() for p in run.generator.parameters())
        assert parts["masters while saving"] == 4 * (critic + generator)
    run_phase(run, run.phases[1])
    assert parts["gradients"] == sum(g.nbytes for g in run.optimizers["critic"].grads.values())


@pytest.mark.parametrize(
    ("checkpointing", "into_clips"), [(True, False), (True, True), (False, True)]
)
def test_activations_are_what_a_backward_needs(monkeypatch, checkpointing, into_clips):
    """Of the critic with its classifier, as wide as the 5B's, on tensors without memory: in its own
    step, and into the rollout.
    """
    monkeypatch.setattr(torch.nn.RMSNorm, "forward", lambda self, x: FusedNorm.apply(x))
    dit = dataclasses.replace(BIG, num_layers=2)
    layers = (0, 1, 1)
    rope_table.cache_clear()
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        critic = WanDiT(dit)
        critic.classifier = gan.Classifier(dit, layers)
        torch.set_default_dtype(torch.float32)
        critic.checkpointing = critic.classifier.checkpointing = checkpointing
        for p in critic.parameters():
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        context = torch.zeros(1, 512, 4096, dtype=torch.bfloat16)
        x = torch.randn(1, 48, 21, 44, 80, requires_grad=into_clips)
        sigma = torch.full((1, 21), 0.5)
        run = SimpleNamespace(critic=critic, cfg=SimpleNamespace(gan_weight=1.0))
        noised = stages.Noised(x * 1, sigma, x)
        tracker = MemTracker()
        tracker.track_external(critic)
        with tracker:
            if into_clips:
                gan.fool(run, SimpleNamespace(context=context), noised, x, None)
            else:
                v, logit = gan.judge(run, noised, context)
                (v.square().mean() + logit.mean()).backward()
    rope_table.cache_clear()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    peak -= sum(p.nbytes for p in critic.parameters())
    known = Backward(21 * 880, 2, checkpointing, read=len(layers))
    assert known.activations(dit) == pytest.approx(peak, rel=0.04)


def test_the_critic_s_graph_is_gone_when_the_generator_runs_again(data, monkeypatch):
    """A backward into the rollout alone would leave the inputs of all of its layers."""
    run = make_run(data, "dmd", checkpointing=True, **GAN)
    inputs = []
    left = []

    def note_input(block, arguments):
        if torch.is_grad_enabled():
            inputs.append(weakref.ref(arguments[0]))

    def into_weights(*arguments):
        left.append(sum(x() is not None for x in inputs))
        inner(*arguments)

    inner = stages.into_weights
    monkeypatch.setattr(stages, "into_weights", into_weights)
    for block in run.critic.blocks:
        block.register_forward_pre_hook(note_input)
    batch = first_batch(run, "generator")
    run.phases[0].step(run, batch)
    assert len(inputs) >= DIT.num_layers
    assert left == [0]


def test_the_budget_of_the_5b(data):
    """In GB: 15 D^2 weights more, in 2 bytes, their gradients in 4, state and masters in 6; and the
    gradients are whole before the last backward of a micro-batch.
    """
    changes = {"dtype": "bfloat16", "batch": 1, **SIZE_5B}
    _, plain = on_a_gpu(config(data, "dmd", **changes))
    _, ours = on_a_gpu(config(data, "dmd", **changes, **GAN))
    weights = 15 * 3072**2
    for part, size in (("weights", 2), ("gradients", 4), ("optimizer: exp_avg_sq", 4)):
        more = ours["device"][part] - plain["device"][part]
        assert more == pytest.approx(size * weights, rel=1e-3)
    more = ours["device"]["activations"] - plain["device"]["activations"]
    assert more == 29 * 21 * 880 * 3072 * 2 + 21 * 880 * 3072 * 2  # the inputs of all layers
    assert ours["host"]["optimizer: ema"] == plain["host"]["optimizer: ema"]


def test_flop_are_those_of_pytorch_s_counter(data, tmp_path, monkeypatch):
    """As in test_budget.py: what is left out are 6 to 10% of so small a network."""
    dit = DiTConfig(128, 512, 2, 6, text_dim=16, text_len=8, freq_dim=16)
    network = tmp_path / "network.safetensors"
    save_dit(WanDiT(dit).init_weights(), network, {})
    same = {"weights": str(network), "teacher": str(network), "batch": 2}
    run = make_run(data, "dmd", **same, **GAN)
    monkeypatch.setattr(attention, "_BACKENDS", [torch.nn.attention.SDPBackend.MATH])

    def share(phase: int) -> float:
        flop = FlopCount()
        for model in (run.generator, run.critic, run.teacher):
            flop.watch(model)
        with FlopCounterMode(display=False) as counter:
            run_phase(run, run.phases[phase])
        return flop.done / counter.get_total_flops()

    assert 0.9 < share(0) < 1.0
    assert 0.9 < share(1) < 1.0
