"""What a run with LoRA costs, told before it loads: memory and FLOP."""

import dataclasses

import pytest
import torch
from test_budget import BIG, FusedNorm, config_5b, on_a_gpu
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from training import STAGES, flop_share, make_run, run_phase

from wan5b import stages
from wan5b.dit import DiTConfig, WanDiT, rope_table
from wan5b.extras.adapters import TARGETS, attach
from wan5b.extras.budget import Backward, parameters
from wan5b.extras.merging import copied_bytes
from wan5b.weights import save_dit

pytestmark = pytest.mark.usefixtures("quick_and_clean")

DISTILLATIONS = stages.DISTILLATIONS
SMALLER = {"height": 30, "width": 52}  # 480x832


@pytest.mark.parametrize("stage", STAGES)
def test_the_budget_s_parts_are_what_is_allocated(data, stage):
    """One base in the compute dtype, adapters and their state in float32."""
    changes = {"teacher": ""} if stage in DISTILLATIONS else {}
    run = make_run(data, stage, lora=4, dtype="bfloat16", beta1=0.5, **changes)
    networks = filter(None, (run.generator, run.critic, run.teacher))
    parameters = {p.data_ptr(): p.nbytes for network in networks for p in network.parameters()}
    parts = run.budget["device"]
    assert parts["weights"] == sum(parameters.values())
    kept = [state for optimizer in run.optimizers.values() for state in optimizer.state_of.values()]
    for group in ("exp_avg", "exp_avg_sq", "ema"):
        held = sum(state[group].nbytes for state in kept if group in state)
        assert parts[f"optimizer: {group}"] == held
    assert "optimizer: low" not in parts
    assert "masters while saving" not in parts
    phase = stages.PHASES[stage][-1]
    run_phase(run, phase)
    grads = run.optimizers[phase.moves].grads.values()
    assert parts["gradients"] == sum(grad.nbytes for grad in grads)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_a_backward_needs(monkeypatch, checkpointing):
    """Of blocks as wide as the 5B's at the size it is trained at, on tensors without memory."""
    monkeypatch.setattr(torch.nn.RMSNorm, "forward", lambda self, x: FusedNorm.apply(x))
    dit = dataclasses.replace(BIG, num_layers=2)
    rope_table.cache_clear()
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        model = WanDiT(dit).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        attach(model, 128, 1.0, TARGETS)
        model.checkpointing = checkpointing
        for name, p in list(model.named_parameters()):
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            else:  # the tracker takes no frozen parameters
                owner, _, own = name.rpartition(".")
                delattr(model.get_submodule(owner), own)
                model.get_submodule(owner).register_buffer(own, p.detach())
        context = torch.zeros(1, 512, 4096, dtype=torch.bfloat16)
        x = torch.randn(1, 48, 21, 44, 80)
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            model(x, 0.5, context).square().mean().backward()
    rope_table.cache_clear()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    peak -= sum(tensor.nbytes for tensor in model.state_dict().values())
    told = Backward(21 * 880, 2, checkpointing, ranks=10 * 128).activations(dit)
    assert told == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "gib"),
    [
        ({"keep_attention": True}, 32.8),
        ({"keep_attention": True, "lora_merge": False}, 32.8),
        (SMALLER, 27.9),
        (SMALLER | {"lora_merge": False}, 21.75),
        (SMALLER | {"lora": 64}, 24.9),
        (SMALLER | {"lora": 64, "lora_merge": False}, 18.75),
    ],
)
def test_the_budget_of_the_5b(data, changes, gib):
    """By arithmetic: 9.3 GiB of base, 6 of adapters of rank 128 and what is kept of them. Copies
    of a rollout, 9.6, are less than the activations of a backward, or more.
    """
    changes = {"lora": 128} | changes
    cfg = dataclasses.replace(config_5b(data, "dmd", teacher=""), **changes)
    _, parts = on_a_gpu(cfg)
    assert sum(parts["device"].values()) / 2**30 == pytest.approx(gib, rel=0.01)


def test_processes_share_base_and_adapters(data):
    cfg = config_5b(data, "dmd", teacher="", lora=128, batch=16)
    _, one = on_a_gpu(cfg)
    _, eight = on_a_gpu(cfg, processes=8, shards=8)
    for part in one["device"].keys() - {"KV cache", "activations", "merged weights"}:
        assert eight["device"][part] == pytest.approx(one["device"][part] / 8)
    base = 2 * parameters(BIG)
    adapter = (8 * eight["device"]["weights"] - base) / 2
    gathered = base + adapter
    held = max(gathered, one["device"]["activations"])
    assert eight["device"]["activations"] == pytest.approx(held)
    assert gathered > one["device"]["activations"], "a rollout gathers all"
    assert eight["device"]["merged weights"] == pytest.approx(copied_bytes(cfg, BIG))


def product(y: list[int], a: list[int], b: list[int], **_) -> int:
    """FLOP of y + a @ b, by their shapes."""
    return 2 * a[0] * a[1] * b[1]


@pytest.mark.parametrize("stage", ["teacher", pytest.param("sid", marks=pytest.mark.slow)])
def test_flop_are_those_of_pytorch_s_counter(data, tmp_path, monkeypatch, stage):
    """As in test_budget: what is once a text or a frame is left out."""
    dit = DiTConfig(128, 512, 2, 6, text_dim=16, text_len=8, freq_dim=16)
    network = tmp_path / "network.safetensors"
    save_dit(WanDiT(dit).init_weights(), network, {})
    changes = {"teacher": ""} if stage in DISTILLATIONS else {}
    run = make_run(data, stage, lora=16, weights=str(network), **changes)
    in_place = {torch.ops.aten.addmm_: product}  # which the counter does not know
    share = flop_share(run, monkeypatch, custom_mapping=in_place)
    assert 0.9 < share < 0.96
