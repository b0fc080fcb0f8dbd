"""What a run costs, told before it loads: memory against what is allocated and what was measured,
FLOP against torch's counter.
"""

import dataclasses
import re
import weakref
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode
from training import (
    DIT,
    ROOT,
    SIZES,
    STAGES,
    config,
    flop_share,
    make_run,
    refused,
    run_phase,
    values,
    write_toml,
)

import train
from wan5b import attention, fsdp, stages
from wan5b.dit import PRESETS, DiTConfig, WanDiT, rope_table
from wan5b.extras import budget
from wan5b.extras.budget import Backward, afford, expected
from wan5b.extras.config import read
from wan5b.extras.training_attention import arrange
from wan5b.kvcache import KVCache
from wan5b.weights import save_dit

pytestmark = pytest.mark.usefixtures("quick_and_clean")

BIG = PRESETS["ti2v-5B"]
SIZE_5B = {"frames": 21, "height": 44, "width": 80, "micro_batch": 1, "beta1": 0.0}

# ----------------------------------------------------------------------- against what is allocated


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_budget_s_parts_are_what_is_allocated(data, stage, dtype):
    run = make_run(data, stage, dtype=dtype, beta1=0.5, window=3)
    networks = list(filter(None, (run.generator, run.critic, run.teacher)))
    parameters = [p for network in networks for p in network.parameters()]
    assert run.budget.keys() == {"device"}
    parts = run.budget["device"]
    assert parts["weights"] == sum(p.nbytes for p in parameters)

    # The optimizers' state.
    groups = ["exp_avg", "exp_avg_sq", "ema"]
    if dtype == "bfloat16":
        groups.append("low")
    kept = [state for optimizer in run.optimizers.values() for state in optimizer.state_of.values()]
    for group in groups:
        held = sum(state[group].nbytes for state in kept if group in state)
        assert parts[f"optimizer: {group}"] == held
    assert sum(name.startswith("optimizer") for name in parts) == len(groups)

    # The cache of a distillation.
    cached = 0
    if stage in stages.DISTILLATIONS:
        cached = run.cache.memory.nbytes + run.cache.text.nbytes
    assert parts.get("KV cache", 0) == cached

    # A save: masters that are no weights.
    addresses = {p.data_ptr() for p in parameters}
    masters = 0
    for optimizer in run.optimizers.values():
        for name, value in optimizer.state().items():
            if name.startswith("master") and value.dtype == torch.float32:
                masters += value.nbytes * (value.data_ptr() not in addresses)
    assert parts.get("masters while saving", 0) == masters

    # Gradients, of one network at a time.
    phase = stages.PHASES[stage][-1]
    run_phase(run, phase)
    grads = run.optimizers[phase.moves].grads.values()
    assert parts["gradients"] == sum(grad.nbytes for grad in grads)


class FusedNorm(torch.autograd.Function):
    """As on a GPU: keeps its input alone. The CPU's norm is made of smaller operations, which keep
    more.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clone()


@pytest.mark.parametrize(
    ("checkpointing", "graphs", "replayed", "keeps"),
    [
        (False, 1, False, False),
        (True, 1, False, False),
        (True, 1, False, True),
        pytest.param(True, 3, False, False, marks=pytest.mark.slow),
        (True, 1, True, False),
        pytest.param(True, 3, False, True, marks=pytest.mark.slow),
        pytest.param(True, 1, True, True, marks=pytest.mark.slow),
    ],
)
def test_activations_are_what_a_backward_needs(monkeypatch, checkpointing, graphs, replayed, keeps):
    """The peak of blocks as wide as the 5B's, at the size it is trained at, on tensors that hold no
    memory.

    Several graphs: into their common input, as SiD's. replayed: over a cache, seven chunks at once.
    """
    monkeypatch.setattr(torch.nn.RMSNorm, "forward", lambda self, x: FusedNorm.apply(x))
    dit = dataclasses.replace(BIG, num_layers=4)
    rope_table.cache_clear()
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        models = [WanDiT(dit) for _ in range(graphs)]
        torch.set_default_dtype(torch.float32)
        for model in models:
            model.checkpointing = checkpointing
            arrange(model, keeps)
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        context = torch.zeros(1, 512, 4096, dtype=torch.bfloat16)
        x = torch.randn(1, 48, 21, 44, 80, requires_grad=graphs > 1)
        cache = KVCache(dit, 1, 21, 880, dtype=torch.bfloat16)
        for chunk in range(7):  # as after a rollout, which leaves the last one uncommitted
            cache.append(3)
            if chunk < 6:
                cache.commit(3)
        options = {"chunks": [3] * 7, "cache": cache} if replayed else {}

        tracker = MemTracker()
        tracker.track_external(*models, cache.memory)
        with tracker:
            loss = sum(model(x, 0.5, context, **options).square().mean() for model in models)
            loss.backward(inputs=[x] if graphs > 1 else None)
    rope_table.cache_clear()

    weights = sum(p.nbytes for model in models for p in model.parameters())
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    peak -= weights + cache.memory.nbytes
    keys = 81 * 880 if replayed else 0  # copies of 6 + 9 + ... + 21 frames
    told = Backward(21 * 880, 2, checkpointing, graphs, keys=keys, keeps=keeps).activations(dit)
    assert told == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_inputs_of_blocks_go_as_gradients_come(checkpointing):
    """So both are never there at once: when the last gradients come, one block's input is left.

    With real memory.
    """
    model = WanDiT(dataclasses.replace(DIT, num_layers=6)).init_weights()
    model.checkpointing = checkpointing
    inputs = []
    left = []

    def note_input(block, arguments):
        inputs.append(weakref.ref(arguments[0]))

    def note_left(weight):
        left.append(sum(x() is not None for x in inputs))

    hooks = [block.register_forward_pre_hook(note_input) for block in model.blocks]
    loss = model(torch.randn(1, *SIZES), 0.5, torch.randn(1, 8, 16)).square().mean()
    for hook in hooks:
        hook.remove()  # before blocks are run again
    for block in model.blocks:
        block.ffn[0].weight.register_post_accumulate_grad_hook(note_left)
    assert [x() is not None for x in inputs] == [True] * 6
    loss.backward()
    assert left == [6, 5, 4, 3, 2, 1]

    whole = Backward(21 * 880, 2, checkpointing)
    late = dataclasses.replace(whole, late=2**30)
    assert late.activations(BIG) == whole.activations(BIG) - 2**30


# ---------------------------------------------------------------------- against what was measured


def on_a_gpu(
    cfg, processes: int = 1, shards: int = 1, sizes: DiTConfig = BIG
) -> tuple[fsdp.World, dict]:
    """A world of GPUs, and the budget that this run would have there, all its networks alike."""
    world = fsdp.World("cpu")
    world.device = torch.device("cuda")
    world.size = processes
    world.shards = shards
    scores = sizes if cfg.stage in stages.DISTILLATIONS else None
    return world, expected(cfg, world, sizes, scores)


def config_5b(data, stage: str, **changes):
    return config(data, stage, dtype="bfloat16", **SIZE_5B, **changes)


@pytest.mark.parametrize("name", ["ar", "ode", "dmd", "sid", "gan"])
def test_what_a_config_says_of_its_memory(name):
    """In GB of 10^9 bytes, without and with offload."""
    file = ROOT / f"configs/{name}-5b.toml"
    text = file.read_text().replace("\n# ", " ")
    said = re.search(r"(\d+) GB .*?(\d+) on the host.*?true (\d+) and (\d+)", text)
    counted = []
    for offload in ("false", "true"):
        cfg = read(train.Config, [str(file), "dtype=bfloat16", f"offload={offload}"])
        _, parts = on_a_gpu(cfg)
        counted += [round(sum(parts[place].values()) / 1e9) for place in ("device", "host")]
    assert [int(number) for number in said.groups()] == counted


@pytest.mark.parametrize(
    ("stage", "offload", "device", "host"),
    [
        ("dmd", False, 125, 20 + 40),
        ("dmd", True, 65, 80 + 40),
        ("sid", True, 72, 120),
        ("ar", False, 76, 20 + 20),
    ],
)
def test_the_budget_of_the_5b(data, stage, offload, device, host):
    """In GB; a GPU holds 10 a network, 6 a weight of state, 4 of gradients, 7 of keys; the average
    is the host's.
    """
    _, parts = on_a_gpu(config_5b(data, stage, offload=offload))
    assert sum(parts["device"].values()) / 1e9 == pytest.approx(device, rel=0.03)
    assert sum(parts["host"].values()) / 1e9 == pytest.approx(host, rel=0.03)
    assert ("optimizer: exp_avg_sq" in parts["host"]) == offload


@pytest.mark.parametrize(
    ("stage", "offload", "batch", "peak"),
    [
        ("dmd", False, 2, 118.5),
        ("dmd", False, 1, 114.1),
        ("ar", True, 1, 37.4),
        ("sid", False, 1, 114.7),
    ],
)
def test_the_budget_is_the_measured_peak(data, stage, offload, batch, peak):
    """In GiB, of an H200: with one micro-batch a phase, the gradients are whole only when the kept
    inputs are gone.
    """
    _, parts = on_a_gpu(config_5b(data, stage, offload=offload, batch=batch))
    assert sum(parts["device"].values()) / 2**30 == pytest.approx(peak, rel=0.01)


def test_the_budget_of_two_processes_is_the_measured_peak(data):
    """One sample each, on two H200s."""
    _, parts = on_a_gpu(config_5b(data, "dmd", batch=2), processes=2, shards=2)
    assert sum(parts["device"].values()) / 2**30 == pytest.approx(64.7, rel=0.04)


def test_the_budget_of_two_copies_is_the_measured_peak(data):
    """Two samples each, on four H100s: their gradients lie there once."""
    options = {"batch": 8, "offload": True, "compile": True, "keep_attention": True}
    cfg = dataclasses.replace(config_5b(data, "dmd", **options), micro_batch=2)
    _, parts = on_a_gpu(cfg, processes=4, shards=2)
    assert sum(parts["device"].values()) / 2**30 == pytest.approx(49.4, rel=0.04)


def test_processes_share_what_is_sharded(data):
    cfg = config_5b(data, "dmd", batch=16)
    _, one = on_a_gpu(cfg)
    _, eight = on_a_gpu(cfg, processes=8, shards=8)
    for place in one:
        for part in one[place].keys() - {"KV cache", "activations"}:
            assert eight[place][part] == pytest.approx(one[place][part] / 8)
    weights = one["device"]["weights"] / 3
    activations = one["device"]["activations"]
    held = eight["device"]["activations"]
    assert max(weights, activations) <= held < weights + activations, "a rollout gathers all"


# ------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_run_that_does_not_fit_is_refused_before_it_loads(
    data, tmp_path, monkeypatch, command, micro_batch
):
    changes = {"micro_batch": micro_batch, "checkpointing": False}
    need = sum(make_run(data, "dmd", **changes).budget["device"].values())
    path = write_toml(tmp_path / "a.toml", values(data, "dmd", tmp_path / "out", **changes))

    monkeypatch.setattr(budget, "free", lambda world: {"device": need - 1, "host": 0})
    line = refused(command, path)
    assert f"{need / 2**30:.2f} GiB are needed on the device" in line
    helps = ["checkpointing = true", "more processes"]
    if micro_batch > 1:
        helps.insert(1, "a smaller micro_batch")
    assert line.endswith(f"what helps: {', '.join(helps)}")
    assert not (tmp_path / "out").exists()

    monkeypatch.setattr(budget, "free", lambda world: {"device": need, "host": 0})
    assert make_run(data, "dmd", **changes).generator is not None


def test_advice_on_a_gpu(data, capsys):
    def check(offload, device, host):
        cfg = config(data, "ar", dtype="bfloat16", micro_batch=1, offload=offload)
        world, parts = on_a_gpu(cfg, sizes=DIT)
        afford(cfg, world, parts, {"device": device, "host": host})

    lacks = "on the device, 0.00 are free; what helps: "
    with pytest.raises(ValueError, match=f"{lacks}offload = true, more processes"):
        check(offload=False, device=0, host=1e9)
    with pytest.raises(ValueError, match=f"{lacks}more processes"):
        check(offload=True, device=0, host=1e9)
    lacks = "on the host, 0.00 are free; what helps: "
    with pytest.raises(ValueError, match=f"{lacks}.*offload = false"):
        check(offload=True, device=1e9, host=0)
    check(offload=True, device=1e9, host=1e9)
    printed = capsys.readouterr().out
    for part in ("weights", "gradients", "activations", "in all", "free"):
        assert f"{part} " in printed


def test_free_memory_is_the_machine_s(monkeypatch):
    world = fsdp.World("cpu")
    free = budget.free(world)
    assert free["device"] == free["host"]
    assert 2**28 < free["host"] < 2**50
    world.local_size = 4
    assert budget.free(world)["host"] == pytest.approx(free["host"] / 4, rel=0.3)
    monkeypatch.setattr(budget, "MEMINFO", Path("/no/such"))
    assert budget.free(world)["host"] == float("inf")


# --------------------------------------------------------------------------------------------- FLOP


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", ["teacher", "dmd", pytest.param("sid", marks=pytest.mark.slow)])
def test_flop_are_those_of_pytorch_s_counter(data, tmp_path, monkeypatch, stage, checkpointing):
    """Where attention is made of matrix products, whose backward does not make the scores again.

    What is outside of the blocks, and the text's keys, are 6 to 10% of so small a network; the
    counter finds it, FlopCount leaves it out.
    """
    dit = DiTConfig(128, 512, 2, 6, text_dim=16, text_len=8, freq_dim=16)
    network = tmp_path / "network.safetensors"
    save_dit(WanDiT(dit).init_weights(), network, {})
    changes = {"weights": str(network), "teacher": str(network)}
    run = make_run(data, stage, checkpointing=checkpointing, **changes)
    share = flop_share(run, monkeypatch)
    assert 0.9 < share < 0.94


@pytest.mark.parametrize("causal", [False, True])
def test_flop_that_are_not_done_again(monkeypatch, causal):
    """What attention's kept results save, to the last one."""
    monkeypatch.setattr(attention, "_BACKENDS", [torch.nn.attention.SDPBackend.MATH])
    x = torch.randn(2, *SIZES)
    options = {"chunks": [3, 3], "clean": x} if causal else {}
    counted = []
    told = []
    for keep in (False, True):
        model = WanDiT(DIT).init_weights()
        model.checkpointing = True
        arrange(model, keep, split=True)
        with FlopCounterMode(display=False) as counter:
            model(x, 0.5, torch.randn(2, 8, 16), **options).mean().backward()
        counted.append(counter.get_total_flops())
        told.append(budget.recomputed_flop(model, x, **options))
    assert counted[0] > counted[1]
    assert counted[0] - counted[1] == told[0] - told[1]
