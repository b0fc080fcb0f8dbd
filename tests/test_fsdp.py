"""The optimizer against torch's, and several processes against one.

As a script it is a process of torchrun's: it does the jobs of a JSON file one after the other.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import rel
from safetensors.torch import load_file
from test_train import (
    ENVIRONMENT,
    apart,
    checkpoint_state,
    config,
    finish,
    make_data,
    names,
    read_metrics,
    same,
    values,
    without_std,
)
from torch import nn
from torch.distributed.tensor import DTensor

import train
from wan5b import fsdp, optim, stages
from wan5b.extras.offload import HostStorage

STEPS = {"ar": 2, "ode": 2, "dmd": 4, "sid": 2}
STAGES = tuple(STEPS)
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="not two CUDA devices")


@pytest.fixture(scope="module", autouse=True)
def _quick_and_clean():
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


# ------------------------------------------------------------------------------------ the optimizer


def make_mlp(dtype=torch.float32) -> tuple[nn.Module, dict]:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))
    initial = {name: value.clone() for name, value in mlp.state_dict().items()}
    return mlp.to(dtype), initial


def loss_of(mlp, seed) -> torch.Tensor:
    g, dtype = torch.Generator().manual_seed(seed), mlp[0].weight.dtype
    return (
        (mlp(torch.randn(8, 6, generator=g).to(dtype)).float() - torch.randn(8, 3, generator=g))
        .square()
        .mean()
    )


def make_optimizer(
    mlp, initial, lr=1e-2, betas=(0.0, 0.999), weight_decay=0.01, **options
) -> optim.AdamW:
    return optim.AdamW(mlp, fsdp.World("cpu"), initial, lr, betas, weight_decay, **options)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("clip", [1e9, 0.05])
def test_adamw_is_torch_s(beta1, weight_decay, clip):
    (ours, initial), (theirs, _) = make_mlp(), make_mlp()
    optimizer = make_optimizer(ours, initial, 1e-2, (beta1, 0.95), weight_decay)
    reference = torch.optim.AdamW(
        theirs.parameters(), 1e-2, (beta1, 0.95), weight_decay=weight_decay
    )
    for step in range(6):
        for part in range(2):
            loss_of(ours, 2 * step + part).backward()
            (loss_of(theirs, 2 * step + part) / 2).backward()
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        reference.step()
        reference.zero_grad()
        norm = optimizer.step(0.5, clip)
        assert norm.item() == pytest.approx(expected.item(), rel=1e-5)
        assert not optimizer.grads
        assert all(p.grad is None for p in ours.parameters())
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all(("exp_avg" in state) == (beta1 > 0) for state in optimizer.state_of.values())
    assert any(name.startswith("exp_avg.") for name in optimizer.state()) == (beta1 > 0)


def test_a_master_is_its_bfloat16_and_16_bits():
    """Bit for bit: against integers of numpy, for patterns of all kinds, ties, zeros and denormals
    among them.
    """
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=g).int()
    ties = torch.randint(-(2**15), 2**15, (5000,), generator=g).int() * 65536 + 0x8000
    edges = torch.tensor([0, -(2**31), 1, 0x7FFF, 0x8000, 0x8001, 0x3F7FFFFF, 0x7F7F7FFF]).int()
    value = torch.cat([bits, ties, edges]).view(torch.float32)
    value = value[value.isfinite() & value.bfloat16().isfinite()].view(-1, 2)
    high, low = (
        torch.empty_like(value, dtype=torch.bfloat16),
        torch.empty_like(value, dtype=torch.int16),
    )
    optim.split(value, high, low)
    numbers = value.numpy().view("uint32").astype("int64")
    upper = (numbers + 0x8000) >> 16
    assert (high.view(torch.int16).numpy().view("uint16") == upper).all()
    assert (low.numpy() == numbers - (upper << 16)).all()
    assert torch.equal(optim.join(high, low).view(torch.int32), value.view(torch.int32))
    tie = (value.view(torch.int32) & 0xFFFF) == 0x8000
    assert tie.sum() > 4000
    assert torch.equal(high[~tie], value.bfloat16()[~tie]), "rounding to nearest, but for ties"


class AverageInHostMemory(HostStorage):
    """What a GPU's storage keeps there without offload."""

    def hosted(self, groups):
        return {"ema": groups["ema"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_streamed_state_gives_the_same_bits(tmp_path, dtype, beta1):
    """Nothing, all state, or the average alone passes through buffers; and a checkpoint goes from
    one to the other.
    """
    cpu = torch.device("cpu")

    def train_one(storage, resume=None):
        mlp, initial = make_mlp(dtype)
        optimizer = make_optimizer(mlp, initial, betas=(beta1, 0.99), ema=True, storage=storage)
        start = (
            fsdp.load(fsdp.World("cpu"), resume, {"generator": optimizer})["step"] if resume else 0
        )
        for step in range(start, 6):
            loss_of(mlp, step).backward()
            if step == 2:
                optimizer.grads["2.bias"][0] = torch.nan
            optimizer.step(0.5, 0.3, 0.9)
            if step == 3 and not resume:
                saved = fsdp.save(
                    fsdp.World("cpu"),
                    tmp_path / type(storage).__name__,
                    {"generator": optimizer},
                    {"step": 4},
                )
        return optimizer, mlp.state_dict(), None if resume else saved

    resident, weights, _ = train_one(None)
    hosted, other, saved = train_one(HostStorage(cpu, everything=True))
    groups, memory = hosted.storage.groups, hosted.storage.memory
    assert groups == optim.state_groups(dtype, beta1, True)
    low, high = memory.data_ptr(), memory.data_ptr() + len(memory)
    for state in hosted.state_of.values():
        assert list(state) == list(groups)
        assert all(low <= value.data_ptr() < high for value in state.values())
    assert same(hosted.state(), resident.state())
    assert same(other, weights)
    for storage, bytes_there in (
        (None, None),
        (HostStorage(cpu, everything=False), False),
        (AverageInHostMemory(cpu, everything=False), True),
    ):
        resumed, third, _ = train_one(storage, saved)
        assert storage is None or (len(storage.memory) > 0) == bytes_there
        assert same(resumed.state(), resident.state())
        assert same(third, weights)


def test_what_the_state_costs():
    """The average never lies on a GPU; with offload nothing does. A bfloat16 weight's master costs
    2 bytes more.
    """
    cpu, cuda, half, full = torch.device("cpu"), torch.device("cuda"), torch.bfloat16, torch.float32

    def placed(dtype, beta1, ema, everything, device):
        """The groups kept (on the device, in host memory)."""
        groups = optim.state_groups(dtype, beta1, ema)
        hosted = HostStorage(device, everything).hosted(groups)
        assert optim.Storage().hosted(groups) == {}
        assert all(groups[group] == kept for group, kept in hosted.items())
        return [group for group in groups if group not in hosted], list(hosted)

    assert placed(half, 0.0, True, False, cuda) == (["exp_avg_sq", "low"], ["ema"])
    assert placed(half, 0.0, False, False, cuda) == (["exp_avg_sq", "low"], [])
    assert placed(half, 0.9, True, True, cuda) == ([], ["exp_avg_sq", "exp_avg", "ema", "low"])
    assert placed(full, 0.0, True, False, cpu) == (["exp_avg_sq", "ema"], [])
    mlp, initial = make_mlp(half)
    weights = sum(p.numel() for p in mlp.parameters())
    states = make_optimizer(mlp, initial, ema=True).state_of.values()
    assert sum(value.nbytes for state in states for value in state.values()) == weights * (
        4 + 4 + 2
    )


def test_bfloat16_weights_follow_masters_that_move_by_little():
    mlp, initial = make_mlp(torch.bfloat16)
    optimizer = make_optimizer(mlp, initial, lr=2e-6, weight_decay=0.0)
    assert all(torch.equal(optimizer.master(name), initial[name]) for name in initial), (
        "not from rounded weights"
    )
    before = {name: p.detach().clone() for name, p in mlp.named_parameters()}
    for step in range(3):
        loss_of(mlp, step).backward()
        optimizer.step(1.0, 1e9)
    still = [(before[name] == p).float().mean().item() for name, p in mlp.named_parameters()]
    assert min(still) > 0.9, "a step of 2e-6 is below half a spacing of nearly every bfloat16"
    moved = {name: (optimizer.master(name) - initial[name]).abs().max().item() for name in initial}
    assert all(1e-6 < distance < 1e-5 for distance in moved.values()), moved
    for _ in range(3000):
        for name in optimizer.parameters:
            optimizer.grads[name] = torch.ones_like(optimizer.master(name))
        optimizer.step(1.0, 1e9)
    for name, p in mlp.named_parameters():
        assert torch.equal(p.detach(), optimizer.master(name).bfloat16())
        torch.testing.assert_close(optimizer.master(name), initial[name] - 6e-3, rtol=0, atol=1e-4)


def test_gradients_add_up_in_float32():
    mlp, initial = make_mlp(torch.bfloat16)
    optimizer, added = make_optimizer(mlp, initial), {}
    for seed in range(300):
        loss = loss_of(mlp, seed)
        for name, grad in zip(
            initial,
            torch.autograd.grad(loss, list(mlp.parameters()), retain_graph=True),
            strict=True,
        ):
            added[name] = added.get(name, 0) + grad.double()
        loss.backward()
    for name, grad in optimizer.grads.items():
        assert grad.dtype == torch.float32
        assert rel(grad, added[name]) < 1e-5  # in bfloat16: 1e-2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_updates_nothing(bad):
    mlp, initial = make_mlp()
    optimizer = make_optimizer(mlp, initial, ema=True)
    loss_of(mlp, 0).backward()
    optimizer.step(1.0, 1.0)
    before = {name: value.clone() for name, value in optimizer.state().items()}
    loss_of(mlp, 1).backward()
    optimizer.grads["0.weight"][0, 0] = bad
    assert not optimizer.step(1.0, 1.0).isfinite()
    assert same(before, optimizer.state())
    assert (optimizer.steps, optimizer.grads) == (1, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averaged_swaps_and_restores(dtype):
    mlp, initial = make_mlp(dtype)
    optimizer = make_optimizer(mlp, initial, ema=True)
    for seed in range(2):
        loss_of(mlp, seed).backward()
        optimizer.step(1.0, 1e9, 0.5)
    held = {
        name: value.clone() for name, value in {**optimizer.state(), **mlp.state_dict()}.items()
    }
    with optimizer.averaged():
        for name, p in mlp.named_parameters():
            assert torch.equal(p.detach(), held[f"ema.{name}"].to(dtype))
            assert not torch.equal(p.detach(), held[name])
    assert same(held, {**optimizer.state(), **mlp.state_dict()})


def test_checkpoints(tmp_path):
    """keep; half-written ones are no checkpoints and go with the next save; what is read back is
    what was saved.
    """
    mlp, initial = make_mlp()
    optimizers, world = (
        {"generator": make_optimizer(mlp, initial, betas=(0.9, 0.99), ema=True)},
        fsdp.World("cpu"),
    )
    (tmp_path / "step-0000099.partial").mkdir()
    (tmp_path / "samples").mkdir()
    assert fsdp.checkpoints(tmp_path) == []
    for step in range(1, 6):
        loss_of(mlp, step).backward()
        optimizers["generator"].step(1.0, 1.0)
        fsdp.save(world, tmp_path, optimizers, {"step": step, "stage": "ar"}, keep=3)
    assert names(tmp_path) == ["step-0000003", "step-0000004", "step-0000005"]
    other, _ = make_mlp(torch.bfloat16)
    loaded = {"generator": make_optimizer(other, initial, betas=(0.9, 0.99), ema=True)}
    facts = fsdp.load(world, fsdp.checkpoints(tmp_path)[-1], loaded)
    assert (facts["step"], facts["stage"], loaded["generator"].steps) == (5, "ar", 5)
    assert same(loaded["generator"].state(), optimizers["generator"].state())
    assert all(
        torch.equal(p.detach(), mlp.get_parameter(n).bfloat16())
        for n, p in other.named_parameters()
    )


def test_world_refuses(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ValueError, match="6 processes do not divide into groups of 4"):
        fsdp.World("cpu", 4)
    monkeypatch.delenv("WORLD_SIZE")
    world = fsdp.World("cpu")
    world.size = 4
    with pytest.raises(ValueError, match="the global batch 6 does not divide over 4 processes"):
        train.check(train.Config("ar", "x", "x", latents="x", batch=6), world)


# -------------------------------------------------------------------------------- several processes


@pytest.fixture(
    scope="module", params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, TWO_GPUS])]
)
def place(request) -> str:
    return request.param


def torchrun(processes: int, folder: Path, jobs: list[dict]) -> list[list]:
    """Do the jobs in new processes -> for every process the results of all jobs."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
    ]
    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, __file__, str(folder / "jobs.json")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"jobs.json.{rank}").read_text()) for rank in range(processes)]


def job(kind: str, keys: dict) -> dict:
    return {"kind": kind, "config": keys}


def worker(path: str) -> None:
    """Jobs: "train"; "nan", which breaks the loss on rank 1; "sigterm", which reaches rank 1 alone."""
    train.matmul_rate = lambda device, dtype: 1.0
    jobs, results = json.loads(Path(path).read_text()), []
    generate, iteration = stages.Run.generate, stages.Run.iteration
    first = jobs[0]["config"]
    with contextlib.closing(fsdp.World(first["device"], first.get("shard", 0))) as world:
        for each in jobs:
            exits, whole, kind = [], [], each["kind"]

            def spied(self, step, phase, *rest, exits=exits, whole=whole):
                weights = [block.ffn[0] for block in self.generator.blocks]

                def look(*_):
                    whole.append(not any(isinstance(layer.weight, DTensor) for layer in weights))

                hook = self.generator.register_forward_hook(
                    look
                )  # behind FSDP's, which shards again
                result = generate(self, step, phase, *rest)
                hook.remove()
                look()
                exits.append((phase, step, result[-1], whole.pop(), all(whole)))
                return result

            def disturbed(self, step, kind=kind):
                metrics = iteration(self, step)
                if world.rank == 1 and step == 2 and kind == "nan":
                    metrics["loss"] = metrics["loss"] * torch.nan
                if world.rank == 1 and step == 0 and kind == "sigterm":
                    os.kill(os.getpid(), signal.SIGTERM)
                return metrics

            stages.Run.generate, stages.Run.iteration = spied, disturbed
            keys = {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in each["config"].items()
            }
            try:
                world.stopping = False
                train.main(train.Config(**keys), world)
                results.append({"returned": True, "exits": exits})
            except FloatingPointError as error:
                results.append({"error": str(error)})
        Path(f"{path}.{world.rank}").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def two(data, place, tmp_path_factory):
    """Two launches of two processes; the second goes on with what the first left."""
    folder = tmp_path_factory.mktemp("two")
    common = {"micro_batch": 1, "beta1": 0.5, "device": place}
    jobs = [
        job("train", values(data, stage, folder / stage, steps=STEPS[stage], **common))
        for stage in STAGES
    ]
    jobs.append(job("nan", values(data, "ar", folder / "nan", **common)))
    half = common | {"dtype": "bfloat16", "steps": 2, "offload": True}
    jobs.append(job("train", values(data, "ar", folder / "half", **half)))
    jobs.append(job("sigterm", values(data, "dmd", folder / "sigterm", **common)))
    results = torchrun(2, folder, jobs)
    for name in ("again", "alone"):  # as if stopped after two iterations
        shutil.copytree(
            folder / "dmd",
            folder / name,
            ignore=shutil.ignore_patterns("step-0000004", "*.safetensors"),
        )
    more = [
        job("train", values(data, "dmd", folder / name, **common)) for name in ("again", "sigterm")
    ]
    return folder, results, torchrun(2, folder, more)


@pytest.fixture(scope="module")
def one(data, place, tmp_path_factory):
    """The same runs in this process."""
    folder, common = tmp_path_factory.mktemp("one"), {"beta1": 0.5, "device": place}
    return folder, {
        s: finish(config(data, s, folder / s, steps=STEPS[s], **common)) for s in STAGES
    }


def equal(place: str, a: Path, b: Path) -> bool:
    """The same bits, or on GPUs, whose sums have no fixed order, the same but for rounding."""
    return (
        same(load_file(a), load_file(b))
        if place == "cpu"
        else apart(load_file(a), load_file(b)) < 1e-2
    )


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_are_one(two, one, stage):
    weights = load_file(two[0] / stage / f"{stage}.safetensors")
    distance = apart(weights, one[1][stage])
    assert distance < 1e-2
    rows = zip(read_metrics(two[0] / stage), read_metrics(one[0] / stage), strict=True)
    for a, b in rows:
        assert without_std(a) == pytest.approx(without_std(b), rel=1e-4, abs=1e-5)


def test_exit_levels_are_the_same_on_all_ranks(two):
    first, second = (ranks[STAGES.index("dmd")]["exits"] for ranks in two[1])
    assert first == second
    assert len(first) == 2 * (2 + 4)  # two micro-batches; two generator phases, four of the critic
    assert len({tuple(row) for row in first}) == 6, "micro-batches agree"


def test_weights_stay_gathered_in_rollouts(two):
    """After every forward of a rollout they are whole, after the rollout they are not."""
    seen = [row[3:] for row in two[1][0][STAGES.index("dmd")]["exits"]]
    assert seen == [[False, True]] * 12


def test_two_processes_go_on_as_if_not_stopped(two, place):
    folder, _, results = two
    assert [ranks[0]["returned"] for ranks in results] == [True, True]
    assert [row[1] for row in results[0][0]["exits"]] == [2, 2, 2, 2, 3, 3]
    straight, again = folder / "dmd", folder / "again"
    assert equal(place, again / "dmd.safetensors", straight / "dmd.safetensors")
    state = checkpoint_state(straight / "step-0000004")
    assert {name.split(".")[1] for name in state} == {"master", "exp_avg", "exp_avg_sq", "ema"}
    rows, expected = read_metrics(again), read_metrics(straight)
    assert rows[:2] == expected[:2]
    if place == "cpu":
        assert same(checkpoint_state(again / "step-0000004"), state)
        assert rows == expected
    for a, b in zip(rows, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_one_process_resumes_what_two_saved(data, place, two):
    folder = two[0] / "alone"
    cfg, world = config(data, "dmd", folder, beta1=0.5, device=place), fsdp.World(place)
    run = stages.Run(cfg, world)
    saved = checkpoint_state(folder / "step-0000002")
    assert fsdp.load(world, folder / "step-0000002", run.optimizers)["step"] == 2
    state = {
        f"{who}.{k}": v.cpu()
        for who, optimizer in run.optimizers.items()
        for k, v in optimizer.state().items()
    }
    assert same(state, saved)
    assert torch.equal(
        run.generator.head.head.weight.cpu(), saved["generator.master.head.head.weight"]
    )
    distance = apart(finish(cfg), load_file(two[0] / "dmd/dmd.safetensors"))
    assert distance < 1e-2
    assert len(read_metrics(folder)) == 4


def test_one_process_joins_the_halves_that_two_saved(data, two):
    """bfloat16: the checkpoint's masters are float32, of more bits than the weights, and come back
    bit for bit.
    """
    run = stages.Run(config(data, "ar", "unused", beta1=0.5, dtype="bfloat16"), fsdp.World("cpu"))
    saved = checkpoint_state(two[0] / "half/step-0000002")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    fsdp.load(run.world, two[0] / "half/step-0000002", run.optimizers)
    state = run.optimizers["generator"].state()
    assert same({f"generator.{name}": value for name, value in state.items()}, saved)
    for name, parameter in run.generator.named_parameters():
        master = saved[f"generator.master.{name}"]
        assert torch.equal(
            parameter.detach().view(torch.int16).int(), (master.view(torch.int32) + 0x8000) >> 16
        )
    assert any((master.bfloat16() != master).any() for master in saved.values())
    exported = load_file(two[0] / "half/ar.safetensors")
    assert all(
        torch.equal(exported[name], saved[f"generator.ema.{name}"].bfloat16()) for name in exported
    )


def test_nan_names_the_rank(two):
    errors = [ranks[len(STAGES)]["error"] for ranks in two[1]]
    assert all("step 2, rank" in error and "step-0000002" in error for error in errors)
    assert "rank 0: not finite here: nothing" in errors[0]
    assert "rank 1: not finite here: loss;" in errors[1]
    assert names(two[0] / "nan") == ["step-0000002"]


def test_sigterm_of_one_process_stops_both(two, place):
    folder, first, second = two
    assert [ranks[-1]["returned"] for ranks in (*first, *second)] == [True] * 4
    assert {row[1] for row in first[0][-1]["exits"]} == {0}
    assert {row[1] for row in second[0][-1]["exits"]} == {1, 2, 3}
    assert equal(place, folder / "sigterm/dmd.safetensors", folder / "dmd/dmd.safetensors")


@pytest.mark.slow
def test_hybrid_sharding_is_one_process(data, tmp_path):
    """2 x 2: each pair shares a copy of the weights."""
    expected = finish(config(data, "dmd", tmp_path / "one", beta1=0.5))
    keys = values(data, "dmd", tmp_path / "four", micro_batch=1, beta1=0.5, shard=2)
    assert [ranks[0]["returned"] for ranks in torchrun(4, tmp_path, [job("train", keys)])] == [
        True
    ] * 4
    distance = apart(load_file(tmp_path / "four/dmd.safetensors"), expected)
    assert distance < 1e-2


if __name__ == "__main__":
    worker(sys.argv[1])
