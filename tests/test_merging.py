"""Rollouts over merged weights: what they are to the bit, what stays as it was, copies that go.

As a script it is a process of torchrun's, which rolls out and leaves what it made.
"""

import contextlib
import dataclasses
import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from common import compiling, rel
from safetensors.torch import load_file, save_file
from test_adapters import lora_run
from test_adapters_runs import lora_config
from test_budget import BIG, FusedNorm
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from training import DIT, ENVIRONMENT, finish, first_batch, make_run, run_phase, same

import train
from wan5b import fsdp, fuse, stages
from wan5b.dit import WanDiT, rope_table
from wan5b.extras import adapters, budget, previews
from wan5b.extras.merging import copied_bytes, layers, merge_rollouts
from wan5b.kvcache import KVCache

pytestmark = pytest.mark.usefixtures("quick_and_clean")


def roll_out(run: stages.Run) -> stages.Rolled:
    return stages.roll_out(run, first_batch(run, "critic", step=2))


def copies(run: stages.Run) -> list[torch.Tensor]:
    found = [layer.copy for layer in layers(run.generator)]
    return [copy for copy in found if copy is not None]


def exported(run: stages.Run, tmp_path: Path, **changes) -> stages.Run:
    """A run without adapters whose generator has what this one would export."""
    plain = make_run(run.data_folder, run.cfg.stage, dtype=run.cfg.dtype, **changes)
    _, value = adapters.merged(run, tmp_path / "x.safetensors", {})
    plain.generator.load_state_dict({name: value(name) for name in plain.generator.state_dict()})
    return plain


def made(data: Path, stage: str, **changes) -> stages.Run:
    run = lora_run(data, stage, **changes)
    run.data_folder = data
    return run


@torch.no_grad()
def move(run: stages.Run) -> None:
    for weight in adapters.adapters(run.generator).values():
        weight.mul_(1.1)


# ------------------------------------------------------------------------------------ what they are

LORA_TARGETS = [adapters.TARGETS, ("self_attn.q", "ffn.2")]


@pytest.mark.parametrize("targets", LORA_TARGETS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rollouts_are_those_of_the_export(data, tmp_path, dtype, targets):
    """To the bit; and of the adapters as they are by then. Without merging they are near."""
    run = made(data, "dmd", ema=0.0, dtype=dtype, lora_targets=targets)
    for _ in range(2):
        x0 = roll_out(run).x0
        assert torch.equal(x0, roll_out(exported(run, tmp_path)).x0)
        assert copies(run) == []
        apart = lora_run(data, "dmd", dtype=dtype, lora_targets=targets, lora_merge=False)
        apart.generator.load_state_dict(run.generator.state_dict())
        other = roll_out(apart).x0
        assert rel(x0, other) < (1e-4 if dtype == "float32" else 0.1)
        assert not torch.equal(x0, other), "it is another way to compute them"
        move(run)


def test_long_rollouts_and_those_behind_real_frames(data, tmp_path):
    for changes in ({"levels_after": (1000, 500), "clean_pass": False}, {"rollout": "data"}):
        run = made(data, "sid", ema=0.0, **changes)
        plain = exported(run, tmp_path, **changes)
        assert torch.equal(roll_out(run).x0, roll_out(plain).x0)
        assert copies(run) == []


@pytest.mark.parametrize("stage", ["ar", "dmd"])
def test_sample_videos_are_those_of_the_export(data, tmp_path, monkeypatch, stage):
    """Of the average, as it is exported. Copies are gone before decoding."""
    run = made(data, stage, ema_start=0, lr=1e-2)
    for step in range(2):
        stages.iteration(run, step)
    plain = exported(run, tmp_path, ema=0.0)
    videos = []

    def write(vae, latents, path, fps):
        videos.append(torch.cat(latents, 2))
        assert copies(run) == []

    monkeypatch.setattr(previews, "write", write)
    for each in (run, plain):
        object.__setattr__(each.cfg, "sample_prompts", ("prompt 1",))
        previews.sample_videos(each, None, tmp_path, 1)
    assert torch.equal(*videos)


@pytest.mark.parametrize("stage", ["ar", "ode"])
def test_sample_videos_know_no_sink_before_dmd(data, tmp_path, monkeypatch, stage):
    """It has no effect there, and an export says nothing of it: with a window or without."""
    told = []

    def generate(*_, **how):
        told.append(how)
        return [torch.zeros(1, 48, 3, 4, 4)]

    monkeypatch.setattr(previews, "write", lambda *_, **__: None)
    monkeypatch.setattr(previews, "generate", generate)
    for changes in ({"window": 4}, {}):
        for sink in ({}, {"sink": 1, "sink_rope": "relative"}):
            run = made(data, stage, sample_prompts=("prompt 1",), **changes, **sink)
            previews.sample_videos(run, None, tmp_path, 1)
        assert told.pop() == told.pop()


def test_copies_are_made_once_a_rollout(data, monkeypatch):
    count = []
    inner = adapters.LoraLinear.merged

    def counted(layer):
        count.append(layer)
        return inner(layer)

    monkeypatch.setattr(adapters.LoraLinear, "merged", counted)
    run = made(data, "dmd")
    roll_out(run)
    assert len(count) == 10 * DIT.num_layers
    assert {id(layer) for layer in count} == {id(layer) for layer in layers(run.generator)}


def test_copies_go_when_a_rollout_fails(data):
    run = made(data, "dmd")
    seen = []

    def fail(*_):
        seen.extend(copies(run))
        raise RuntimeError("out of memory")

    hook = run.generator.blocks[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        roll_out(run)
    assert len(seen) == 10 * DIT.num_layers
    assert copies(run) == []
    hook.remove()
    assert torch.equal(roll_out(run).x0, roll_out(made(data, "dmd")).x0)


# ----------------------------------------------------------------------------- what stays as it was


@pytest.mark.parametrize("stage", ["dmd", "sid"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_what_they_were(data, monkeypatch, stage, dtype):
    """To the bit, of all phases, given the same rollouts and what they left in the cache."""
    run = made(data, stage, dtype=dtype)
    apart = lora_run(data, stage, dtype=dtype, lora_merge=False)
    inner = stages.roll_out

    def rolled(asked, batch):
        made = inner(run, batch)
        asked.cache = run.cache
        return made

    monkeypatch.setattr(stages, "roll_out", rolled)
    for phase in stages.PHASES[stage]:
        for each in (run, apart):
            run_phase(each, phase)
        grads = [each.optimizers[phase.moves].grads for each in (run, apart)]
        assert same(*grads)
        assert sum(grad.abs().sum() for grad in grads[0].values()) > 0


def test_other_forwards_run_with_their_adapters(data):
    """Those with grad inside of a rollout, those without grad outside, and other networks."""
    run = made(data, "dmd")
    apart = lora_run(data, "dmd", lora_merge=False)
    batch = first_batch(run, "critic")
    x = batch.draws(torch.randn, *run.shape(run.cfg.frames))
    with torch.no_grad():
        expected = apart.generator(x, 0.5, batch.context)
        critic = apart.critic(x, 0.5, batch.context)
        assert torch.equal(run.generator(x, 0.5, batch.context), expected)
        with run.world.gathered(run.critic):
            assert torch.equal(run.critic(x, 0.5, batch.context), critic)
    with run.world.gathered(run.generator):
        with torch.no_grad():
            v = run.generator(x, 0.5, batch.context)
            assert rel(v, expected) < 1e-5
            assert not torch.equal(v, expected)
            assert torch.equal(run.critic(x, 0.5, batch.context), critic)
        assert len(copies(run)) == 10 * DIT.num_layers
        v = run.generator(x, 0.5, batch.context)
        assert torch.equal(v, expected)
        v.mean().backward()
    assert len(run.optimizers["generator"].grads) == 2 * 10 * DIT.num_layers


def test_a_run_goes_on_with_it_or_without(data, tmp_path):
    changes = {"lora_weights": "", "save_every": 1, "ratio": 1}
    finish(lora_config(data, "dmd", tmp_path, steps=1, **changes))
    (tmp_path / "dmd.safetensors").unlink()
    adapters_left = tmp_path / "dmd-lora"
    for file in adapters_left.iterdir():
        file.unlink()
    finish(lora_config(data, "dmd", tmp_path, steps=2, lora_merge=False, **changes))


# ----------------------------------------------------------------------------------- what they cost


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("targets", LORA_TARGETS)
def test_the_budget_tells_their_bytes(data, dtype, targets):
    run = made(data, "dmd", dtype=dtype, lora_targets=targets)
    with run.world.gathered(run.generator), torch.no_grad():
        batch = first_batch(run, "critic")
        x = batch.draws(torch.randn, *run.shape(run.cfg.frames))
        run.generator(x, 0.5, batch.context)
        held = sum(copy.nbytes for copy in copies(run))
    largest = max(layer.weight.numel() for layer in layers(run.generator))
    assert copied_bytes(run.cfg, DIT) == held + 12 * largest
    apart = lora_run(data, "dmd", dtype=dtype, lora_targets=targets, lora_merge=False)
    assert copied_bytes(apart.cfg, DIT) == 0


def test_a_rollout_takes_no_more(monkeypatch):
    """Beside the cache, on tensors without memory: a forward behind 18 frames that makes copies, of
    blocks as wide as the 5B's.
    """
    monkeypatch.setattr(torch.nn.RMSNorm, "forward", lambda self, x: FusedNorm.apply(x))
    dit = dataclasses.replace(BIG, num_layers=2)
    cfg = SimpleNamespace(lora=128, lora_alpha=0.0, lora_merge=True, dtype="bfloat16")
    cfg.lora_targets = adapters.TARGETS
    rope_table.cache_clear()
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        model = WanDiT(dit).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        adapters.attach(model, cfg.lora, 1.0, cfg.lora_targets)
        for name, p in list(model.named_parameters()):  # the tracker takes no frozen ones
            owner, _, own = name.rpartition(".")
            delattr(model.get_submodule(owner), own)
            model.get_submodule(owner).register_buffer(own, p.detach())
        world = SimpleNamespace(gathered=lambda model: contextlib.nullcontext())
        merge_rollouts(world, model)
        cache = KVCache(dit, 1, 21, 880, dtype=torch.bfloat16)
        for _ in range(6):
            cache.append(3)
            cache.commit(3)
        x = torch.randn(1, 48, 3, 44, 80)
        context = torch.zeros(1, 512, 4096, dtype=torch.bfloat16)
        held = [*model.buffers(), cache.memory, cache.text, x, context]
        tracker = MemTracker()
        tracker.track_external(model, cache.memory, cache.text, x, context)
        with tracker, world.gathered(model), torch.no_grad():
            model(x, 0.5, context, cache=cache)
    rope_table.cache_clear()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    peak -= sum(tensor.nbytes for tensor in held)
    assert 0.9 * copied_bytes(cfg, dit) < peak < copied_bytes(cfg, dit)


def test_a_budget_that_copies_break_says_so(data, monkeypatch):
    """Without processes that share activations a small backward leaves no room for them."""
    cfg = lora_run(data, "dmd").cfg
    monkeypatch.setattr(budget, "copied_bytes", lambda cfg, sizes: 1e9 * cfg.lora_merge)
    apart = dataclasses.replace(cfg, lora_merge=False)
    world = fsdp.World("cpu")
    plain = budget.expected(apart, world, DIT, DIT)
    parts = budget.expected(cfg, world, DIT, DIT)
    assert parts["device"].pop("merged weights") == 1e9 - plain["device"]["activations"]
    assert parts == plain
    free = {"device": sum(plain["device"].values())}
    with pytest.raises(ValueError, match="what helps: .*lora_merge = false, more processes"):
        budget.afford(cfg, world, budget.expected(cfg, world, DIT, DIT), free)
    budget.afford(apart, world, plain, free)


def test_flop_of_rollouts_are_those_of_plain_layers(data):
    """A merged forward counts no adapters, one on top of the base does."""
    counted = []
    for merge in (True, False):
        run = lora_run(data, "dmd", lora_merge=merge)
        count = budget.FlopCount()
        count.watch(run.generator)
        roll_out(run)
        counted.append(count.done)
    plain = make_run(data, "dmd")
    count = budget.FlopCount()
    count.watch(plain.generator)
    roll_out(plain)
    assert counted[0] == count.done < counted[1]


@pytest.mark.slow
def test_compiled(data):
    """Copies are inputs of what is compiled: made anew, they compile nothing anew; nor do they stay
    in memory.
    """
    run = made(data, "dmd", dtype="bfloat16")
    expected = roll_out(run).x0
    left = []

    def note(*_):
        left.extend(weakref.ref(copy) for copy in copies(run))

    run.generator.register_forward_hook(note)
    with compiling():
        torch._dynamo.reset()
        fuse.enable()
        assert rel(roll_out(run).x0, expected) < 0.1
        gc.collect()
        assert len(left) >= 10 * DIT.num_layers
        assert not any(copy() is not None for copy in left)
        for phase in run.phases:
            run_phase(run, phase)
        graphs = counters["stats"]["unique_graphs"]
        assert graphs > 0
        move(run)
        roll_out(run)
        for phase in run.phases:
            run_phase(run, phase)
        assert counters["stats"]["unique_graphs"] == graphs


# ----------------------------------------------------------------------------------- two processes


@pytest.mark.slow
def test_two_processes_are_one(data, tmp_path):
    """Sharded base and adapters: copies are whole, gone behind the rollout, the rollout to the bit
    that of one process.
    """
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch += [__file__, str(data), str(tmp_path)]
    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, env=environment, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    one = made(data, "dmd", micro_batch=1)
    shares = []
    for batch in stages.micro_batches(one, "critic", 2, moved=False):
        shares.append(stages.roll_out(one, batch).x0)
    for rank in range(2):
        said = json.loads((tmp_path / f"{rank}.json").read_text())
        assert said == {"during": 10 * DIT.num_layers, "after": 0}
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert torch.equal(found["x0"], torch.cat(shares[2 * rank : 2 * rank + 2]))


def process(data: Path, out: Path) -> None:
    """Two rollouts, and how many whole copies there are in them and behind them."""
    cfg = lora_config(data, "dmd", "unused", micro_batch=1, ratio=1)
    with contextlib.closing(fsdp.World("cpu")) as world:
        run = train.build(cfg, world)
        for seed, network in enumerate((run.generator, run.critic)):
            stir_shards(network, seed)
        counted = set()

        def count(*_):
            whole = [copy for copy in copies(run) if type(copy) is torch.Tensor]
            counted.add(len(whole))

        run.generator.register_forward_hook(count)
        made = []
        for batch in stages.micro_batches(run, "critic", 2, moved=False):
            made.append(stages.roll_out(run, batch).x0)
        save_file({"x0": torch.cat(made)}, out / f"{world.rank}.safetensors")
        (during,) = counted
        said = {"during": during, "after": len(copies(run))}
        (out / f"{world.rank}.json").write_text(json.dumps(said))


@torch.no_grad()
def stir_shards(model, seed: int) -> None:
    """As `stir` does it to a network that is whole."""
    draws = torch.Generator().manual_seed(seed)
    for name, parameter in adapters.adapters(model).items():
        if "lora_B" in name:
            whole = torch.empty(parameter.shape).normal_(0, 0.1, generator=draws)
            fsdp.copy_part(parameter, whole)


if __name__ == "__main__":
    process(Path(sys.argv[1]), Path(sys.argv[2]))
