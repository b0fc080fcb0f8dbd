"""Training: the stages, what carries grad, what is counted, what stops a run and how it goes on."""

import dataclasses
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from common import ON_GPU, compiling, rel
from release import VAE, random_weights
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

import train
from wan5b import attention, fsdp, optim, stages
from wan5b.data import write_shard
from wan5b.distill import rollout
from wan5b.dit import PRESETS, DiTConfig, WanDiT, rope_table
from wan5b.extras import curves
from wan5b.extras.formats import load_dit, read_metadata
from wan5b.extras.offload import HostStorage
from wan5b.flow import ar_loss_weight, few_step_sigmas
from wan5b.kvcache import KVCache
from wan5b.vae22 import VAE22
from wan5b.weights import save_dit

ROOT = Path(__file__).parent.parent
STAGES = ("teacher", "ar", "ode", "dmd", "sid")
DIT = DiTConfig(32, 64, 2, 2, text_dim=16, text_len=8, freq_dim=16)
PROMPTS = [f"prompt {i}" for i in range(8)]
SIZES = (48, 6, 4, 4)  # channels, frames, height, width
TIMINGS = ("seconds", "tokens_per_second", "mfu", "gib")
PATHS = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
ENVIRONMENT = {"PYTHONPATH": ":".join(PATHS), "OMP_WAIT_POLICY": "passive"}


def make_data(folder: Path) -> Path:
    """Stores of all kinds and weights of a generator and a teacher, smaller than tiny."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=g)

    lengths = torch.tensor([3, 5] * 5)
    texts = {"rows": randn(40, DIT.text_dim).bfloat16(), "lengths": lengths}
    write_shard(folder / "text/00000.safetensors", texts, [*PROMPTS, "neg", ""], negative="neg")
    write_shard(folder / "latents/00000.safetensors", {"latent": randn(8, *SIZES)}, PROMPTS)
    sigmas = few_step_sigmas()
    write_shard(
        folder / "ode/00000.safetensors", {"x": randn(8, 5, *SIZES)}, PROMPTS, sigmas=sigmas
    )
    for seed, name in enumerate(("generator", "teacher")):
        save_dit(WanDiT(DIT).init_weights(g.manual_seed(seed)), folder / f"{name}.safetensors", {})
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _quick_and_clean(monkeypatch):
    """A World takes SIGTERM for itself; the speed of this machine does not matter here."""
    monkeypatch.setattr(train, "matmul_rate", lambda device, dtype: 1.0)
    monkeypatch.setattr(train, "curves", lambda folders: None)  # half a second each
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are tiny
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


def values(data: Path, stage: str, out="unused", /, **changes) -> dict:
    """The keys of a small run."""
    given = {
        "stage": stage,
        "out": str(out),
        "text": str(data / "text"),
        "weights": str(data / "generator.safetensors"),
    }
    if stage in ("teacher", "ar") or changes.get("prefix") or changes.get("rollout") == "data":
        given["latents"] = str(data / "latents")
    if stage == "ode":
        given["trajectories"] = str(data / "ode")
    if stage in ("dmd", "sid"):
        given["teacher"] = str(data / "teacher.safetensors")
    given |= {
        "negative": "neg",
        "frames": 6,
        "height": 4,
        "width": 4,
        "batch": 4,
        "micro_batch": 2,
        "steps": 4,
    }
    given |= {
        "save_every": 2,
        "lr": 1e-4,
        "critic_lr": 1e-4,
        "ema_start": 1,
        "ratio": 2,
        "device": "cpu",
    }
    return given | {"dtype": "float32", "keep": 9} | changes


def config(data: Path, stage: str, out="unused", **changes) -> train.Config:
    return train.Config(**values(data, stage, out, **changes))


def make_run(data: Path, stage: str, **changes) -> stages.Run:
    return stages.Run(config(data, stage, **changes), fsdp.World("cpu"))


def write_toml(path: Path, keys: dict) -> Path:
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items()))
    return path


def finish(cfg: train.Config) -> dict[str, torch.Tensor]:
    """Train to the end in this process; the exported tensors."""
    train.main(cfg, fsdp.World(cfg.device))
    return load_file(Path(cfg.out) / f"{cfg.stage}.safetensors")


def read_metrics(out: Path, timings=False) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if timings or k not in TIMINGS} for row in rows]


def without_std(row: dict) -> dict:
    """The metrics that are means over samples."""
    return {key: value for key, value in row.items() if "std" not in key}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def furthest(a: dict, b: dict) -> float:
    """Largest relative error of a tensor."""
    assert a.keys() == b.keys()
    return max(rel(a[key], b[key]) for key in a if b[key].norm() > 0)


def apart(a: dict, b: dict, lr=1e-4) -> float:
    """Distance of weights, in units of one step of Adam, which is +-lr for every weight: of a bias near 0, rounding
    decides the sign, so no tensor by itself can be compared."""
    assert a.keys() == b.keys()
    squares = sum((a[key] - b[key]).double().square().sum() for key in a)
    return (squares / sum(value.numel() for value in a.values())).sqrt().item() / lr


# -------------------------------------------------------------------------------- a checkpoint in the place of weights


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Run folders of dmd, with an average, and of a teacher, without; the last checkpoints name the networks' sizes."""
    folder = tmp_path_factory.mktemp("trained")
    for stage, ema in (("dmd", 0.5), ("teacher", 0.0)):
        finish(config(data, stage, folder / stage, steps=2, ema=ema))
        (folder / stage / "step-0000002/config.json").write_text(
            json.dumps(dataclasses.asdict(DIT))
        )
    return folder


@pytest.mark.parametrize("stage", ["dmd", "teacher"])
def test_a_checkpoint_is_read_like_its_export(trained, stage):
    step, export = trained / stage / "step-0000002", trained / stage / f"{stage}.safetensors"
    model = load_dit(step, channels=48)
    assert model.cfg == load_dit(export).cfg == DIT
    assert same(model.state_dict(), load_file(export))
    assert same(
        load_dit(str(step), dtype=torch.bfloat16).state_dict(),
        load_dit(export, "cpu", torch.bfloat16).state_dict(),
    )
    assert read_metadata(step) == read_metadata(export)
    assert read_metadata(step)["levels"] == [1000, 750, 500, 250]


def test_training_goes_on_from_a_checkpoint(data, trained, tmp_path):
    def stage(out, source, teacher):
        return finish(
            config(data, "dmd", tmp_path / out, weights=str(source), teacher=str(teacher), steps=1)
        )

    export = stage("a", trained / "dmd/dmd.safetensors", trained / "teacher/teacher.safetensors")
    assert same(stage("b", trained / "dmd/step-0000002", trained / "teacher/step-0000002"), export)


@pytest.mark.usefixtures("fake_group")
def test_every_process_reads_a_checkpoint_by_itself(trained):
    """As the second of two, with collectives that do nothing."""
    assert same(
        load_dit(trained / "dmd/step-0000002").state_dict(),
        load_file(trained / "dmd/dmd.safetensors"),
    )


@pytest.fixture
def fake_group():
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("file", "keep", "says"),
    [
        ("facts.json", None, "facts.json: no such file"),
        ("facts.json", 20, "not JSON"),
        ("__0_0.distcp", None, "No such file"),
        ("__0_0.distcp", 3000, "incomplete"),
        ("__0_0.distcp", 0, "incomplete"),
        (".metadata", 100, "incomplete"),
        (".metadata", 0, "incomplete"),
        (".metadata", None, "holds no weights"),
    ],
)
def test_damaged_checkpoints(trained, tmp_path, file, keep, says):
    step = tmp_path / "step-0000002"
    shutil.copytree(trained / "dmd/step-0000002", step)
    content = (step / file).read_bytes()
    (step / file).unlink()
    if keep is not None:
        (step / file).write_bytes(content[:keep])
    with pytest.raises(ValueError, match=says) as error:
        load_dit(step)
    assert str(step) in str(error.value)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------------- phases


@pytest.mark.parametrize("stage", STAGES)
def test_accumulation_equals_a_larger_micro_batch(data, tmp_path, stage):
    two = finish(config(data, stage, tmp_path / "two", steps=2))
    one = finish(config(data, stage, tmp_path / "one", steps=2, micro_batch=1))
    distance = apart(one, two)
    assert distance < 1e-2
    for a, b in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), strict=True):
        assert without_std(a) == pytest.approx(without_std(b), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("stage", "changes"), [("teacher", {}), ("ar", {}), ("ar", {"bell": False, "window": 3})]
)
def test_flow_loss_by_hand(data, stage, changes):
    """What the network sees is a clip at a level per chunk (or one for all), and how its answer is counted."""
    run, seen = make_run(data, stage, dropout=0.5, micro_batch=4, **changes), []
    run.generator.register_forward_hook(lambda *hook: seen.append(hook[1:]), with_kwargs=True)
    loss = run.data_phase(0)["loss"].item()
    ((x, sigma, context), options, v) = seen[0]
    assert options.get("chunks") == ([3, 3] if stage == "ar" else None)
    assert options.get("window") == changes.get("window")
    chosen = [
        [i for i in range(8) if torch.allclose(row, run.context([PROMPTS[i]])[0])]
        for row in context
    ]
    _, items, _ = next(iter(run.micro_batches(0, "flow")))
    assert all(found in ([], [item]) for found, item in zip(chosen, items, strict=True)), (
        "a caption of another clip"
    )
    assert [] in chosen, "no text was dropped"
    x0 = run.clips(items)
    assert "clean" not in options or torch.equal(options["clean"], x0)
    chunks = sigma.split(3, 1)
    assert all((chunk == chunk[:, :1]).all() for chunk in chunks)
    assert torch.equal(*chunks) == (stage == "teacher")
    expected = 0.0
    for i, frame in ((i, frame) for i in range(4) for frame in range(6)):
        level = sigma[i, frame].item()
        target = (x[i, :, frame] - x0[i, :, frame]) / level  # noise - x0
        error = (v[i, :, frame] - target).square().mean().item()
        expected += error * (ar_loss_weight(level).item() if run.cfg.bell else 1.0) / 24
    assert loss == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("forcing", ["teacher", "diffusion"])
def test_ode_loss_by_hand(data, tmp_path, forcing, first):
    """Chunks at levels of a trajectory, its end the target, counted where the level is not 0, per sample."""
    frames = 6 + first
    x = torch.randn(8, 5, 48, frames, 4, 4, generator=torch.Generator().manual_seed(0))
    write_shard(tmp_path / "0.safetensors", {"x": x}, PROMPTS, sigmas=few_step_sigmas())
    changes = {"frames": frames, "prefix": first, "trajectories": str(tmp_path), "latents": ""}
    run, seen = make_run(data, "ode", forcing=forcing, micro_batch=4, window=3, **changes), []
    run.generator.register_forward_hook(lambda *hook: seen.append(hook[1:]), with_kwargs=True)
    for step in range(3):
        seen.clear()
        loss = run.data_phase(step)["loss"].item()
        ((x, sigma, _), options, v) = seen[0]
        _, items, _ = next(iter(run.micro_batches(step, "ode")))
        assert (options["chunks"], options["window"]) == ([1] * first + [3, 3], 3)
        assert (sigma[:, :first] == 0).all()
        expected = 0.0
        for i, item in enumerate(items):
            path, errors = run.store[item]["x"], []
            assert ("clean" in options) == (forcing == "teacher")
            assert "clean" not in options or torch.equal(options["clean"][i], path[-1])
            for frame in range(frames):
                level = sigma[i, frame].item()
                index = min(range(5), key=lambda k: abs(run.sigmas[k] - level))
                assert (
                    frame < first or sigma[i, frame] == sigma[i, first + (frame - first) // 3 * 3]
                )
                assert torch.equal(x[i, :, frame], path[index, :, frame])
                if level > 0:
                    clean = x[i, :, frame] - level * v[i, :, frame]
                    errors.append((clean - path[-1, :, frame]).square().mean().item())
            expected += sum(errors) / max(len(errors), 1) / 4
        assert loss == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("forcing", "lowest"), [("teacher", 3), ("diffusion", 4)])
def test_ode_draws_levels_that_teach(data, monkeypatch, forcing, lowest):
    """All alike often; level 0 only where it plays the clean context, for beside a clean half it has no loss."""
    run, drawn = make_run(data, "ode", forcing=forcing, micro_batch=4), []

    def spy(x, sigma, context, **options):
        drawn.extend(
            min(range(5), key=lambda k: abs(run.sigmas[k] - level))
            for level in sigma[:, ::3].flatten()
        )
        return torch.zeros_like(x, requires_grad=True)

    run.generator = type("Spy", (), {"cfg": DIT, "__call__": staticmethod(spy)})()
    for step in range(200):
        for batch in run.micro_batches(step, "ode"):
            run.ode_loss(*batch)
    counts = [drawn.count(level) for level in range(lowest + 1)]
    assert sum(counts) == len(drawn) == 200 * 4 * 2
    mean = len(drawn) / (lowest + 1)
    assert all(abs(count - mean) < 4 * mean**0.5 for count in counts), counts


def test_counts_and_order(data, monkeypatch):
    run = make_run(data, "dmd", ratio=5, steps=12, ema_start=5, ema=0.5)
    who = {id(optimizer): name for name, optimizer in run.optimizers.items()}
    generator, calls, inner = run.optimizers["generator"], [], optim.AdamW.step
    ema = {name: state["ema"] for name, state in generator.state_of.items()}
    average = {name: value.clone() for name, value in ema.items()}

    def step(self, scale, clip, ema_decay=0.0):
        norm = inner(self, scale, clip, ema_decay)
        calls.append(who[id(self)])
        if self is generator:
            for name, value in average.items():
                decay = 0.5 if calls.count("critic") >= 5 else 0.0
                average[name] = decay * value + (1 - decay) * self.master(name)
        return norm

    monkeypatch.setattr(optim.AdamW, "step", step)
    for i in range(12):
        run.iteration(i)
    assert calls == [
        "critic" if i else "generator" for i in [0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1]
    ]
    assert (generator.steps, run.optimizers["critic"].steps) == (3, 12)
    assert all("ema" not in state for state in run.optimizers["critic"].state_of.values())
    expected, moved = (
        furthest(ema, average),
        furthest(ema, {name: generator.master(name) for name in ema}),
    )
    assert expected < 1e-6 < moved


def test_exit_level_is_uniform_and_one_for_all(data, monkeypatch):
    run, seen = make_run(data, "dmd", micro_batch=1), []

    def fake(generator, noise, context, sigmas, chunks, cache, *, exit_step, **options):
        seen.append(exit_step)
        yield from noise.split(chunks, 2)

    monkeypatch.setattr(stages, "rollout", fake)
    levels = {}
    for phase in ("generator", "critic"):
        for step in range(300):
            seen.clear()
            for draws, items, context in run.micro_batches(step, phase):
                run.generate(step, phase, draws, items, context)
            assert len(seen) == 4
            assert len(set(seen)) == 1
            levels[phase, step] = seen[0]
    for phase in ("generator", "critic"):
        counts = [sum(levels[phase, step] == level for step in range(300)) for level in range(4)]
        assert min(counts) > 75 - 4 * 7.5, counts  # four standard deviations
        assert sum(counts) == 300
    assert any(levels["generator", step] != levels["critic", step] for step in range(9)), (
        "each phase draws its own"
    )


def a_rollout(run: stages.Run, step: int):
    """What the generator phase rolls out first, and its parts."""
    draws, items, context = next(iter(run.micro_batches(step, "generator")))
    first, x0, trace, exit_step = run.generate(step, "generator", draws, items, context)
    return draws, context, x0, trace, exit_step


def rollout_with_grad(run: stages.Run, step: int) -> list[torch.Tensor]:
    """The same rollout in one graph, as algorithm 1 of Self Forcing has it."""
    draws, items, context = next(iter(run.micro_batches(step, "generator")))
    *_, trace, exit_step = a_rollout(run, step)
    chunks, given = [x.shape[2] for x in trace], run.cache.written - sum(x.shape[2] for x in trace)
    run.cache.reset()
    noise = draws(torch.randn, *run.shape(sum(chunks)))
    common = {
        "exit_step": exit_step,
        "renoise": lambda b, s, like: draws(torch.randn, *like.shape[1:]),
    }
    common["prefix"] = run.clips(items)[:, :, :given] if given else None
    made = rollout(run.generator, noise, context, run.sigmas, chunks, run.cache, **common)
    return [chunk for _, chunk in zip(chunks, made, strict=False)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize(
    "changes", [{}, {"prefix": 1}, {"rollout": "data"}], ids=["text", "first", "data"]
)
def test_replay_is_the_rollout_and_its_gradient(data, monkeypatch, checkpointing, window, changes):
    frames, seen = 9 + changes.get("prefix", 0), set()
    monkeypatch.setattr(stages.Run, "check", lambda *_: None)  # the stores are for 6 frames
    run = make_run(
        data, "dmd", checkpointing=checkpointing, window=window, frames=frames, **changes
    )
    clips = torch.randn(8, 48, frames, 4, 4, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(run, "clips", lambda items: clips[items])
    optimizer = run.optimizers["generator"]
    for step in range(8):
        *_, context, x0, trace, exit_step = a_rollout(run, step)
        case = exit_step, run.cache.written - x0.shape[2]
        if case in seen:
            continue
        seen.add(case)
        w = torch.randn(x0.shape, generator=torch.Generator().manual_seed(step))
        memory, frames = (
            run.cache.memory[..., : run.cache.frames * 4, :, :].clone(),
            run.cache.frames,
        )
        replayed = stages.replay(run.generator, context, run.sigmas[exit_step], trace, run.cache)
        error = rel(replayed, x0)
        assert error < 1e-5
        replayed.backward(w)
        assert run.cache.frames == frames
        assert torch.equal(run.cache.memory[..., : frames * 4, :, :], memory), (
            "committed keys are read-only"
        )
        by_replay = dict(optimizer.grads)
        optimizer.grads.clear()

        whole = rollout_with_grad(run, step)
        assert torch.equal(torch.cat(whole, 2), x0)
        torch.cat(whole, 2).backward(w)
        assert by_replay.keys() == run.optimizers["generator"].parameters.keys()
        error = furthest(by_replay, optimizer.grads)
        assert error < 1e-4
        optimizer.grads.clear()
    assert len({exit_step for exit_step, _ in seen}) >= 3
    assert {given for _, given in seen} == {"prefix": {1}, "rollout": {0, 3, 6}}.get(
        "".join(changes), {0}
    )


def test_no_gradient_crosses_blocks(data):
    run = make_run(data, "dmd", checkpointing=False)
    first, second = rollout_with_grad(run, 0)
    assert not run.cache.memory.requires_grad
    (grad,) = torch.autograd.grad(second.sum(), first, allow_unused=True)
    assert first.requires_grad
    assert grad is None


def test_only_exit_levels_carry_grad(data):
    run, seen = make_run(data, "dmd", checkpointing=False, micro_batch=4), []
    run.generator.register_forward_pre_hook(
        lambda m, args: seen.append((torch.is_grad_enabled(), args[1]))
    )
    run.generator_phase(0)
    exit_step = a_rollout(run, 0)[-1]
    assert [sigma for grad, sigma in seen if grad] == [run.sigmas[exit_step]]  # all chunks at once
    seen.clear()
    run.critic_phase(0)
    assert not any(grad for grad, _ in seen)


@pytest.mark.parametrize("stage", ["dmd", "sid"])
def test_gradient_by_hand(data, monkeypatch, stage):
    """What reaches the generator is d loss / d x0, chained through the exit levels of one rollout with grad."""
    run, caught = make_run(data, stage, micro_batch=4, guidance=2.0, checkpointing=False), {}
    monkeypatch.setattr(
        run, "update", lambda who, step: caught.update(run.optimizers[who].grads) or torch.zeros(())
    )
    run.generator_phase(1)
    run.optimizers["generator"].grads.clear()

    draws, context, x0, _, _ = a_rollout(run, 1)  # leaves the draws where the phase goes on
    negative = run.context(["neg"] * 4)
    x0.requires_grad_()
    noise = draws(torch.randn, *x0.shape[1:])
    u = draws(torch.rand, 1)
    sigma = (5 * u / (1 + 4 * u)).clamp(0.02, 0.98)[:, :, None, None, None]  # [B, 1, 1, 1, 1]
    xs = (1 - sigma) * x0 + sigma * noise

    def clean(model, text):
        return xs - sigma * model(xs, sigma[:, 0, 0, 0, 0], text)

    fake, real, unconditional = (
        clean(run.critic, context),
        clean(run.teacher, context),
        clean(run.teacher, negative),
    )
    real = real + 2 * (real - unconditional)
    scale = (x0 - real).abs().mean((1, 2, 3, 4), keepdim=True).detach()
    if stage == "dmd":
        grad = (fake - real).detach() / scale / x0.numel()
    else:
        (grad,) = torch.autograd.grad(((real - fake) * (fake - x0) / scale).mean(), x0)
    torch.cat(rollout_with_grad(run, 1), 2).backward(grad)
    error = furthest(caught, run.optimizers["generator"].grads)
    assert error < 1e-4


@pytest.mark.parametrize("stage", STAGES)
def test_every_parameter_learns_and_the_teacher_does_not(data, stage):
    run = make_run(data, stage)
    before = {name: value.clone() for name, value in run.generator.state_dict().items()}
    frozen = {k: v.clone() for k, v in run.teacher.state_dict().items()} if run.distilling else {}
    critic = {k: v.clone() for k, v in run.critic.state_dict().items()} if run.distilling else {}
    for step in range(3):
        run.iteration(step)
    assert all(not torch.equal(before[k], v) for k, v in run.generator.state_dict().items())
    if run.distilling:
        assert same(frozen, run.teacher.state_dict())
        assert all(p.grad is None and not p.requires_grad for p in run.teacher.parameters())
        assert all(not torch.equal(critic[k], v) for k, v in run.critic.state_dict().items())
        assert same(frozen, critic), "the critic starts as the teacher"


def test_a_parameter_without_gradient_is_found(data):
    run = make_run(data, "ar")
    run.optimizers["generator"].parameters["forgotten"] = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(AssertionError, match="forgotten"):
        run.iteration(0)


@pytest.mark.parametrize("rollout", ["self", "data"])
def test_context(data, monkeypatch, rollout):
    """Whose first chunk the second one attends to: the clip's with rollout = "data", else the generator's own.

    With "data" a step generates one chunk; the steps are gone through until it is the second.
    """

    def second_chunk(clip=0.0, own=0.0):
        run = make_run(data, "dmd", rollout=rollout, latents=str(data / "latents"))
        clips, draws = run.clips, stages.Draws.__call__

        def changed_clips(items):
            x = clips(items)
            x[:, :, :3] += clip
            return x

        def changed_noise(self, draw, *shape):
            x = draws(self, draw, *shape)
            if len(shape) > 1 and shape[1] == 6:  # of the rollout; re-noising is by chunk
                x[:, :, :3] += own
            return x

        with monkeypatch.context() as patch:
            patch.setattr(run, "clips", changed_clips)
            patch.setattr(stages.Draws, "__call__", changed_noise)
            rollouts = (a_rollout(run, step) for step in range(20))
            x0 = next(
                x0 for _, _, x0, _, _ in rollouts if rollout == "self" or run.cache.written == 6
            )
        return x0[:, :, -3:]

    plain, by_clip, by_own = second_chunk(), second_chunk(clip=1.0), second_chunk(own=1.0)
    assert torch.equal(plain, by_clip) == (rollout == "self")
    assert torch.equal(plain, by_own) == (rollout == "data")


FIRST = [(stage, {}) for stage in STAGES] + [
    ("ar", {"forcing": "diffusion"}),
    ("ode", {"forcing": "diffusion"}),
]
FIRST += [("dmd", {"rollout": "data"})]


@pytest.mark.parametrize(("stage", "changes"), FIRST)
def test_a_first_frame_is_clean_and_outside_the_loss(data, monkeypatch, stage, changes):
    def metrics(disturb):
        with monkeypatch.context() as patch:
            patch.setattr(
                stages.Run, "check", lambda self, model, scores: None
            )  # the stores are for 6 frames
            run = make_run(data, stage, prefix=1, frames=7, **changes)
        g = torch.Generator().manual_seed(0)
        clips = torch.randn(8, 48, 7, 4, 4, generator=g)
        paths = torch.randn(8, 5, 48, 7, 4, 4, generator=g)
        paths[:, -1] = clips
        run.store = [
            {"x": path} if stage == "ode" else {"latent": clip}
            for path, clip in zip(paths, clips, strict=True)
        ]
        if stage == "ode":
            run.store = type("Stub", (list,), {"facts": {"sigmas": run.sigmas}})(run.store)
        inner = WanDiT.forward

        def forward(self, x, sigma, context, **options):
            v = inner(self, x, sigma, context, **options)
            cache = options.get("cache")
            if cache is None or cache.frames == 0:
                frame = x[:, :, 0]
                assert all(any(torch.equal(row, clip[:, 0]) for clip in clips) for row in frame), (
                    "not a clip's frame"
                )
                level = sigma if isinstance(sigma, torch.Tensor) else torch.tensor([[sigma]])
                assert (level[:, 0] == 0).all()
                if isinstance(clean := options.get("clean_sigma"), torch.Tensor):
                    assert (clean[:, 0] == 0).all()
                v = torch.cat([v[:, :, :1] + disturb, v[:, :, 1:]], 2)
            return v

        with monkeypatch.context() as patch:
            patch.setattr(WanDiT, "forward", forward)
            return {key: value.item() for key, value in run.iteration(0).items()}

    assert metrics(0.0) == metrics(1000.0)


# ------------------------------------------------------------------------------------------- memory, work, progress


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_budget_s_parts_are_what_is_allocated(data, monkeypatch, stage, dtype):
    run = make_run(data, stage, dtype=dtype, beta1=0.5, window=3)
    networks = [run.generator] + ([run.critic, run.teacher] if run.distilling else [])
    assert run.budget.keys() == {"device"}
    budget = run.budget["device"]
    assert budget["weights"] == sum(p.nbytes for network in networks for p in network.parameters())
    held = [state for optimizer in run.optimizers.values() for state in optimizer.state_of.values()]
    for group in ("exp_avg", "exp_avg_sq", "ema") + ("low",) * (dtype == "bfloat16"):
        assert budget[f"optimizer: {group}"] == sum(
            groups[group].nbytes for groups in held if group in groups
        )
    assert sum(name.startswith("optimizer") for name in budget) == (4 if dtype == "bfloat16" else 3)
    assert budget.get("KV cache", 0) == (
        run.cache.memory.nbytes + run.cache.text.nbytes if run.distilling else 0
    )
    states = [optimizer.state() for optimizer in run.optimizers.values()]
    parameters = {p.data_ptr() for network in networks for p in network.parameters()}
    masters = [
        v
        for state in states
        for k, v in state.items()
        if k.startswith("master") and v.dtype == torch.float32
    ]
    assert budget["masters while saving"] == sum(
        v.nbytes for v in masters if v.data_ptr() not in parameters
    )

    monkeypatch.setattr(optim.AdamW, "step", lambda self, *_: torch.zeros(()))
    run.data_phase(0) if not run.distilling else run.critic_phase(0)
    grads = run.optimizers["critic" if run.distilling else "generator"].grads.values()
    assert budget["gradients"] == sum(grad.nbytes for grad in grads)


def like_a_gpu(
    run: stages.Run, model: DiTConfig, offload: bool, **changes
) -> dict[str, dict[str, float]]:
    """The budget that this run would have on a GPU with other networks."""
    run.cfg = dataclasses.replace(run.cfg, offload=offload, **changes)
    run.device = torch.device("cuda")
    run.storage = partial(HostStorage, run.device, offload)
    run.dtype, run.layout = torch.bfloat16, stages.chunk_sizes(run.cfg.frames)
    run.budget = run.expected(model, model)
    return run.budget


SIZE_5B = {"frames": 21, "height": 44, "width": 80, "micro_batch": 1, "beta1": 0.0}


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
    """In GB; a GPU holds 10 a network, 6 a weight of state, 4 of gradients, 7 of keys; the average is the host's."""
    budget = like_a_gpu(make_run(data, stage), PRESETS["ti2v-5B"], offload, **SIZE_5B)
    assert sum(budget["device"].values()) / 1e9 == pytest.approx(device, rel=0.03)
    assert sum(budget["host"].values()) / 1e9 == pytest.approx(host, rel=0.03)
    assert ("optimizer: exp_avg_sq" in budget["host"]) == offload


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
    """In GiB, of an H200: with one micro-batch a phase, the gradients are whole only when the kept inputs are gone."""
    run = make_run(data, stage, batch=batch, micro_batch=1)
    budget = like_a_gpu(run, PRESETS["ti2v-5B"], offload, **SIZE_5B)["device"]
    assert sum(budget.values()) / 2**30 == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize(("shards", "peak"), [(2, 64.7), (1, 133.2)])
def test_the_budget_of_two_processes_is_the_measured_peak(data, shards, peak):
    """One sample each, on two H200s: sharded, and replicated, where gradients lie twice at the end of a backward."""
    run = make_run(data, "dmd", micro_batch=1)
    run.world.size, run.world.shards = 2, shards
    budget = like_a_gpu(run, PRESETS["ti2v-5B"], False, **SIZE_5B, batch=2)["device"]
    assert sum(budget.values()) / 2**30 == pytest.approx(peak, rel=0.04)


def test_processes_share_what_is_sharded(data):
    run = make_run(data, "dmd", batch=16)
    one = like_a_gpu(run, PRESETS["ti2v-5B"], False, **SIZE_5B)
    run.world.size = run.world.shards = 8
    eight = run.expected(PRESETS["ti2v-5B"], PRESETS["ti2v-5B"])
    whole = {"KV cache", "activations"}
    for place in one:
        for part in one[place].keys() - whole:
            assert eight[place][part] == pytest.approx(one[place][part] / 8)
    weights, activations = one["device"]["weights"] / 3, one["device"]["activations"]
    assert max(weights, activations) <= eight["device"]["activations"] < weights + activations, (
        "a rollout gathers all"
    )


class FusedNorm(torch.autograd.Function):
    """As on a GPU: keeps its input alone. The CPU's norm is made of smaller operations, which keep more."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clone()


@pytest.mark.parametrize(
    ("checkpointing", "graphs", "replayed"),
    [(False, 1, False), (True, 1, False), (True, 3, False), (True, 1, True)],
)
def test_activations_are_what_a_backward_needs(monkeypatch, checkpointing, graphs, replayed):
    """The peak of chunks as wide as the 5B's, at the size it is trained at, on tensors that hold no memory.

    Several graphs: into their common input, as SiD's. replayed: over a cache, seven chunks at once."""
    monkeypatch.setattr(torch.nn.RMSNorm, "forward", lambda self, x: FusedNorm.apply(x))
    dit = dataclasses.replace(PRESETS["ti2v-5B"], num_layers=4)
    rope_table.cache_clear()
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        models = [WanDiT(dit) for _ in range(graphs)]
        torch.set_default_dtype(torch.float32)
        for model in models:
            model.checkpointing = checkpointing
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        context = torch.zeros(1, 512, 4096, dtype=torch.bfloat16)
        x = torch.randn(1, 48, 21, 44, 80, requires_grad=graphs > 1)
        cache = KVCache(dit, 1, 21, 880, dtype=torch.bfloat16)
        cache.frames, cache.written = 18, 21  # as after a rollout
        options = {"chunks": [3] * 7, "cache": cache} if replayed else {}
        tracker = MemTracker()
        tracker.track_external(*models, cache.memory)
        with tracker:
            loss = sum(model(x, 0.5, context, **options).square().mean() for model in models)
            loss.backward(inputs=[x] if graphs > 1 else None)
    rope_table.cache_clear()
    held = sum(p.nbytes for model in models for p in model.parameters()) + cache.memory.nbytes
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] - held
    keys = 63 * 880 if replayed else 0  # 3 + 6 + ... + 21 frames seen, 21 of them one's own
    assert stages.activations(dit, 21 * 880, 2, checkpointing, graphs, keys=keys) == pytest.approx(
        peak, rel=0.1
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_inputs_of_blocks_go_as_gradients_come(checkpointing):
    """So both are never there at once: when the last gradients come, one chunk's input is left. With real memory."""
    model, inputs, left = WanDiT(dataclasses.replace(DIT, num_layers=6)).init_weights(), [], []
    model.checkpointing = checkpointing
    hooks = [
        b.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
        for b in model.blocks
    ]
    loss = model(torch.randn(1, *SIZES), 0.5, torch.randn(1, 8, 16)).square().mean()
    for hook in hooks:
        hook.remove()  # before chunks are run again
    for block in model.blocks:
        weight = block.ffn[0].weight
        weight.register_post_accumulate_grad_hook(
            lambda _: left.append(sum(x() is not None for x in inputs))
        )
    assert [x() is not None for x in inputs] == [True] * 6
    loss.backward()
    assert left == [6, 5, 4, 3, 2, 1]
    sizes = (PRESETS["ti2v-5B"], 21 * 880, 2, checkpointing)
    assert stages.activations(*sizes, late=2**30) == stages.activations(*sizes) - 2**30


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_run_that_does_not_fit_is_refused_before_it_loads(
    data, tmp_path, monkeypatch, command, micro_batch
):
    need = sum(
        make_run(data, "dmd", micro_batch=micro_batch, checkpointing=False)
        .budget["device"]
        .values()
    )
    changes = {"micro_batch": micro_batch, "checkpointing": False}
    path = write_toml(tmp_path / "a.toml", values(data, "dmd", tmp_path / "out", **changes))
    monkeypatch.setattr(fsdp.World, "free", lambda self: {"device": need - 1, "host": 0})
    line = refused(command, path)
    assert f"{need / 2**30:.2f} GiB are needed on the device" in line
    advice = (
        ["checkpointing = true"]
        + ["a smaller micro_batch"] * (micro_batch > 1)
        + ["more processes"]
    )
    assert line.endswith(f"what helps: {', '.join(advice)}")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(fsdp.World, "free", lambda self: {"device": need, "host": 0})
    assert make_run(data, "dmd", micro_batch=micro_batch, checkpointing=False).generator is not None


def test_advice_on_a_gpu(data, capsys):
    run = make_run(data, "ar", micro_batch=1)
    capsys.readouterr()
    like_a_gpu(run, DIT, False)
    with pytest.raises(
        ValueError,
        match=r"on the device, 0.00 are free; what helps: offload = true, more processes",
    ):
        run.afford({"device": 0, "host": 1e9})
    like_a_gpu(run, DIT, True)
    with pytest.raises(
        ValueError, match="on the device, 0.00 are free; what helps: more processes"
    ):
        run.afford({"device": 0, "host": 1e9})
    with pytest.raises(
        ValueError, match="on the host, 0.00 are free; what helps: .*offload = false"
    ):
        run.afford({"device": 1e9, "host": 0})
    run.afford({"device": 1e9, "host": 1e9})
    printed = capsys.readouterr().out
    assert all(
        f"{part} " in printed for part in ("weights", "gradients", "activations", "in all", "free")
    )


def test_free_memory_is_the_machine_s(monkeypatch):
    world = fsdp.World("cpu")
    free = world.free()
    assert free["device"] == free["host"]
    assert 2**28 < free["host"] < 2**50
    world.local_size = 4
    assert world.free()["host"] == pytest.approx(free["host"] / 4, rel=0.3)
    monkeypatch.setattr(fsdp, "MEMINFO", Path("/no/such"))
    assert world.free()["host"] == float("inf")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", ["teacher", "dmd", "sid"])
def test_flop_are_those_of_pytorch_s_counter(data, tmp_path, monkeypatch, stage, checkpointing):
    """Where attention is made of matrix products, whose backward does not make the scores again. What is outside of the
    chunks, and the text's keys, are 6 to 10% of so small a network; the counter finds it, `flop` leaves it out."""
    dit, extra, inner = (
        DiTConfig(128, 512, 2, 6, text_dim=16, text_len=8, freq_dim=16),
        [],
        stages.forward_flop,
    )
    save_dit(WanDiT(dit).init_weights(), tmp_path / "network.safetensors", {})
    network = str(tmp_path / "network.safetensors")
    run = make_run(data, stage, checkpointing=checkpointing, weights=network, teacher=network)
    monkeypatch.setattr(attention, "_BACKENDS", [torch.nn.attention.SDPBackend.MATH])

    def spy(cfg, x, **options):
        linear, scores = inner(cfg, x, **options)
        extra.append(0.5 * scores * torch.is_grad_enabled())
        return linear, scores

    monkeypatch.setattr(stages, "forward_flop", spy)
    with FlopCounterMode(display=False) as counter:
        run.iteration(0)
    share = (run.flop - sum(extra)) / counter.get_total_flops()
    assert 0.9 < share < 0.94


def test_curves_are_drawn_at_every_save(data, tmp_path, monkeypatch, capsys):
    drawn, inner = [], curves.curves
    monkeypatch.setattr(
        train,
        "curves",
        lambda folders: drawn.append(len(read_metrics(tmp_path / "out"))) or inner(folders),
    )
    finish(config(data, "ar", tmp_path / "out", steps=3))
    assert drawn == [2, 3]
    assert (tmp_path / "out/curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "out").glob("*.partial"))
    assert "peak memory: " in capsys.readouterr().out
    monkeypatch.setattr(curves, "find_spec", lambda name: None)
    monkeypatch.setattr(train, "curves", inner)
    curves.available.cache_clear()
    finish(config(data, "ar", tmp_path / "bare", steps=3))
    curves.available.cache_clear()
    assert capsys.readouterr().out.count("matplotlib is not installed") == 1
    assert drawn == [2, 3]
    assert not (tmp_path / "bare/curves.png").exists()


def test_progress(data, tmp_path):
    finish(config(data, "dmd", tmp_path, steps=2))
    for row in read_metrics(tmp_path, timings=True):
        assert row["tokens_per_second"] == pytest.approx(4 * 6 * 4 / row["seconds"])
        assert row["mfu"] > 0
        assert row.keys() >= {"critic_loss", "critic_norm", "seconds", "gib"}
    assert set(train.SHOWN) == {"loss", "norm", "critic_loss", "critic_norm", *TIMINGS}


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `python train.py ...` in this process -> its exit code and the lines of stderr. No network is built."""

    def run(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
            patch.setattr(stages.Run, "network", forbidden)
            with pytest.raises(SystemExit) as stopped:
                runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        return stopped.value.code, capsys.readouterr().err.splitlines()

    def forbidden(*_):
        raise AssertionError("a network is built")

    return run


def refused(command, *arguments) -> str:
    """The one line that a refusal prints."""
    code, lines = command(*arguments)
    assert code == 2, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("train.py: error: ")
    return lines[0]


BAD = [
    ("ar", {"speed": 1}, "unknown keys ['speed']"),
    ("ar", {"steps": "4"}, "steps must be int, got '4'"),
    ("ar", {"steps": 4.0}, "steps must be int, got 4.0"),
    ("ar", {"bell": 1}, "bell must be bool"),
    ("ar", {"lr": True}, "lr must be float"),
    ("ar", {"stage": 3}, "stage must be str"),
    ("dmd", {"levels": [1000, "750"]}, "levels must be a list of int"),
    ("dmd", {"levels": 1000}, "levels must be a list of int, got 1000"),
    ("dmd", {"levels": [500, 750]}, "must fall"),
    ("dmd", {"sample_prompts": "one"}, "sample_prompts must be a list of str"),
    ("magic", {}, "stage must be one of teacher ar ode dmd sid, got 'magic'"),
    ("ar", {"preset": "huge"}, "preset must be one of"),
    ("ar", {"dtype": "float16"}, "dtype must be one of"),
    ("ar", {"device": "tpu"}, "device must be one of"),
    ("ar", {"forcing": "none"}, "forcing must be one of"),
    ("dmd", {"rollout": "other"}, "rollout must be one of"),
    ("ar", {"prefix": 2}, "prefix must be one of"),
    ("ar", {"batch": 0}, "batch must be at least 1 and below inf, got 0"),
    ("ar", {"save_every": 0}, "save_every must be at least 1"),
    ("ar", {"keep": 0}, "keep must be at least 1"),
    ("dmd", {"ratio": 0}, "ratio must be at least 1"),
    ("ar", {"warmup": -1}, "warmup must be at least 0 and below inf, got -1"),
    ("ar", {"lr": -1.0}, "lr must be at least 0 and below inf, got -1.0"),
    ("ar", {"clip": 0.0}, "clip must be at least 1e-06 and below inf, got 0.0"),
    ("ar", {"shift": 0.0}, "shift must be at least 1e-06 and below inf, got 0.0"),
    ("ar", {"beta2": 1.0}, "beta2 must be at least 0 and below 1, got 1.0"),
    ("ar", {"ema": 1.5}, "ema must be at least 0 and below 1, got 1.5"),
    (
        "ar",
        {"batch": 5},
        "batch 5 is 5 a process, not a multiple of micro_batch 2; micro_batch=1 would do",
    ),
    ("ar", {"frames": 7}, "nearest valid: 6 or 9"),
    ("ar", {"frames": 6, "prefix": 1}, "nearest valid: 4 or 7"),
    ("ar", {"height": 3}, "3x4"),
    ("ar", {"window": 2}, "a chunk of 3 frames does not fit in a window of 2"),
    ("ar", {"latents": ""}, "stage ar needs latents"),
    ("ode", {"trajectories": ""}, "stage ode needs trajectories"),
    ("sid", {"teacher": ""}, "stage sid needs teacher"),
    ("dmd", {"rollout": "data", "latents": ""}, "name latents"),
    ("dmd", {"prefix": 1, "frames": 7, "latents": ""}, "name latents"),
    ("ar", {"text": "/no/such"}, "/no/such is no folder"),
    ("ar", {"latents": "/no/such"}, "/no/such is no folder"),
    ("ode", {"trajectories": "/no/such"}, "/no/such is no folder"),
    ("ar", {"weights": "/no/such.safetensors"}, "/no/such.safetensors"),
    ("dmd", {"teacher": "/no/such.safetensors"}, "/no/such.safetensors"),
    ("ar", {"negative": "unheard of"}, "unheard of"),
    ("ar", {"sample_prompts": ["unheard of"]}, "name vae"),
    ("ar", {"vae": "/no/such"}, "/no/such: no such file or folder"),
    ("ar", {"height": 6}, "this run needs latent (48, 6, 6, 4)"),
    ("ar", {"frames": 9}, "this run needs latent (48, 9, 4, 4)"),
    ("ode", {"width": 6}, "this run needs x (5, 48, 6, 4, 6)"),
    ("ode", {"levels": [1000, 500]}, "this run needs x (3, 48, 6, 4, 4)"),
    ("ode", {"shift": 3.0}, "change levels and shift"),
    ("dmd", {"prefix": 1, "frames": 7}, "this run needs latent (48, 7, 4, 4)"),
]


@pytest.mark.parametrize(("stage", "changes", "message"), BAD)
def test_bad_configs(data, tmp_path, command, stage, changes, message):
    line = refused(
        command, write_toml(tmp_path / "a.toml", values(data, stage, tmp_path / "out", **changes))
    )
    assert message in line
    assert not (tmp_path / "out").exists()


def test_bad_command_lines(data, tmp_path, command):
    good = write_toml(tmp_path / "good.toml", values(data, "ar", tmp_path / "out"))
    assert "usage: train.py CONFIG.toml" in refused(command)
    assert "nothing.toml" in refused(command, tmp_path / "nothing.toml")
    assert str(tmp_path) in refused(command, tmp_path)
    assert "key=value, got 'steps'" in refused(command, good, "steps")
    assert "steps must be int" in refused(command, good, "steps=1.5")
    assert "unknown keys ['a.b']" in refused(command, good, "a.b=1")
    assert "unknown keys ['latent']" in refused(command, good, "latent=data/latents")
    assert "lr must be at least 0 and below inf, got nan" in refused(command, good, "lr=nan")
    assert "cannot read" in refused(command, good, "steps=[")
    (tmp_path / "bad.toml").write_text("stage = ar\n")
    assert "line 1" in refused(command, tmp_path / "bad.toml")
    (tmp_path / "latin.toml").write_bytes('stage = "é"\n'.encode("latin-1"))
    assert "utf-8" in refused(command, tmp_path / "latin.toml")
    assert "stage ar needs out" in refused(
        command, write_toml(tmp_path / "few.toml", {"stage": "ar", "text": "x"})
    )


def test_overrides(data, tmp_path):
    path = write_toml(tmp_path / "a.toml", values(data, "ar"))
    cfg = train.parse(
        [str(path), "lr=1", "stage=dmd", "levels=[1000, 500]", "negative=a = b", "bell=false"]
    )
    assert (cfg.lr, cfg.stage, cfg.levels, cfg.negative, cfg.bell) == (
        1.0,
        "dmd",
        (1000, 500),
        "a = b",
        False,
    )
    assert type(cfg.lr) is float


def save_network(path: Path, **changes) -> Path:
    save_dit(WanDiT(DiTConfig(**vars(DIT) | changes)), path, {})
    return path


def test_networks_and_data_that_do_not_fit(data, tmp_path, command):
    def line(stage, **changes):
        return refused(
            command,
            write_toml(tmp_path / "a.toml", values(data, stage, tmp_path / "out", **changes)),
        )

    sixteen = save_network(tmp_path / "sixteen.safetensors", in_dim=16, out_dim=16)
    for stage in ("dmd", "sid"):
        text = line(stage, teacher=str(sixteen))
        assert "16 latent channels where 48 are needed" in text
        assert "mix" in text
    assert "this run needs latent (16, 6, 4, 4)" in line("ar", weights=str(sixteen))
    wide = save_network(tmp_path / "wide.safetensors", text_dim=24)
    assert "embeddings of width 16 and up to 5 tokens, the network takes (24, 8)" in line(
        "ar", weights=str(wide)
    )
    assert "different texts" in line("dmd", teacher=str(wide))
    short = save_network(tmp_path / "short.safetensors", text_len=4)
    assert "up to 5 tokens, the network takes (16, 4)" in line("ode", weights=str(short))
    write_shard(tmp_path / "empty/0.safetensors", {"latent": torch.zeros(0, *SIZES)}, [])
    assert "nothing to train on" in line("ar", latents=str(tmp_path / "empty"))
    assert "this run needs x" in line("ode", trajectories=str(data / "latents"))
    assert "no text embeddings" in line("ar", text=str(data / "latents"))
    write_shard(
        tmp_path / "other/0.safetensors", {"latent": torch.zeros(1, *SIZES)}, ["unheard of"]
    )
    assert "prepare.py text" in line("ar", latents=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="unheard of"):
        make_run(data, "ar", sample_prompts=("unheard of",))


def test_networks_of_another_stage(data, trained, tmp_path, command):
    """Of a checkpoint or of an export; a release, or a file without a record, may start any stage."""

    def line(stage, **changes):
        return refused(
            command,
            write_toml(tmp_path / "a.toml", values(data, stage, tmp_path / "out", **changes)),
        )

    teacher, causal = trained / "teacher/step-0000002", trained / "dmd/dmd.safetensors"
    for stage in ("dmd", "sid"):
        assert f"{teacher} is of stage teacher; {stage} takes" in line(stage, weights=str(teacher))
        assert (
            f"{causal} is of stage dmd; {stage} takes a release there, or one of ('teacher',)"
            in line(stage, teacher=str(causal))
        )
    for stage in ("teacher", "ar", "ode"):
        assert f"{causal} is of stage dmd; {stage} takes" in line(stage, weights=str(causal))
    for stage in ("teacher", "ar", "ode"):
        make_run(data, stage, weights=str(teacher))


def test_no_negative_prompt_is_trained_on(data, tmp_path):
    """Neither the config's nor the one that the embeddings were made with."""
    rows, lengths = torch.randn(6, 16, dtype=torch.bfloat16), torch.tensor([2, 1, 1, 2])
    write_shard(
        tmp_path / "0.safetensors",
        {"rows": rows, "lengths": lengths},
        ["old", "", "a", "neg"],
        negative="old",
    )
    assert make_run(data, "dmd", text=str(tmp_path), negative="neg").prompts == ["a"]


def test_only_the_stage_s_own_data_counts(data):
    """Captions come with the clips that are trained on, whatever else the config names."""
    run = make_run(data, "ar", trajectories="/no/such")
    assert run.prompts == PROMPTS
    assert torch.equal(run.clips([3])[0], run.store[3]["latent"])


# ----------------------------------------------------------------------------------------- stopping and going on


def checkpoint_state(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole."""
    import torch.distributed.checkpoint as dcp

    stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
    }
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("step-*"))


def python(code: str, *arguments, **options) -> subprocess.Popen:
    """A new process with as many threads as this one, so that sums come out alike."""
    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, *(["-c", code] if code else []), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


KILLED_IN_A_SAVE = """
import os, signal, sys, train
from wan5b import fsdp
inner = fsdp.dcp.save
def save(state, checkpoint_id, **options):
    if "step-0000004" in str(checkpoint_id):
        state = dict(list(state.items())[: len(state) // 2])
        inner(state, checkpoint_id=checkpoint_id, **options)
        os.kill(os.getpid(), signal.SIGKILL)
    inner(state, checkpoint_id=checkpoint_id, **options)
fsdp.dcp.save = save
train.main(train.parse(sys.argv[1:]), fsdp.World("cpu"))
"""


def test_killed_in_a_save_and_resumed_in_a_new_process(data, tmp_path):
    """4 iterations at once equal 2, a save, kill -9 in the next save, and a new process: bit for bit."""
    path, out = (
        write_toml(tmp_path / "a.toml", values(data, "dmd", tmp_path / "out")),
        tmp_path / "out",
    )
    killed = python(KILLED_IN_A_SAVE, path)
    straight = finish(config(data, "dmd", tmp_path / "straight"))
    killed.communicate(timeout=100)
    assert killed.returncode == -signal.SIGKILL
    assert names(out) == ["step-0000002", "step-0000004.partial"]
    assert len(read_metrics(out)) == 4
    resumed = python("", ROOT / "train.py", path)
    _, errors = resumed.communicate(timeout=100)
    assert resumed.returncode == 0, errors
    assert names(out) == ["step-0000002", "step-0000004"]
    assert same(load_file(out / "dmd.safetensors"), straight)
    state = checkpoint_state(out / "step-0000004")
    assert same(state, checkpoint_state(tmp_path / "straight/step-0000004"))
    assert {name.rsplit(".", 1)[0].split(".blocks")[0] for name in state if "blocks.0.modulation" in name} == {
        "generator.master", "generator.exp_avg_sq", "generator.ema",
        "critic.master", "critic.exp_avg_sq",
    }  # fmt: skip
    assert read_metrics(out) == read_metrics(tmp_path / "straight")


def test_sigterm_saves_and_the_same_command_goes_on(data, tmp_path):
    out = tmp_path / "out"
    path = write_toml(
        tmp_path / "a.toml", values(data, "ar", out, steps=100000, save_every=100000, decay=False)
    )
    running = python("", ROOT / "train.py", path)
    deadline = time.time() + 100
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert running.poll() is None, running.communicate()
        assert time.time() < deadline
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    printed, errors = running.communicate(timeout=60)
    assert running.returncode == 0, errors
    assert "stopped by SIGTERM" in printed
    done = len(read_metrics(out))
    assert names(out) == [f"step-{done:07d}"]
    finish(config(data, "ar", out, steps=done + 2, save_every=100000))
    assert [row["step"] for row in read_metrics(out)] == list(range(done + 2))


@pytest.mark.parametrize(
    ("step", "phase", "saved"), [(0, "generator", 0), (0, "critic", 1), (1, "critic", 1)]
)
def test_sigterm_within_an_iteration(data, tmp_path, monkeypatch, capfd, step, phase, saved):
    """It ends after the micro-batch at work, if no network has moved; the step begins anew, and all comes out alike."""
    cfg = config(data, "dmd", tmp_path / "out", micro_batch=1, save_every=3)
    generate, world, calls = stages.Run.generate, fsdp.World("cpu"), []

    def interrupted(self, *args):
        calls.append(args[:2])
        world.stopping = calls[-1] == (step, phase)
        return generate(self, *args)

    monkeypatch.setattr(stages.Run, "generate", interrupted)
    train.main(cfg, world)
    assert f"stopped by SIGTERM in step {saved}" in capfd.readouterr().out
    assert calls.count((step, phase)) == (
        4 if (step, phase) == (0, "critic") else 1
    )  # after the generator's step
    assert names(tmp_path / "out") == ["step-0000001"] * saved
    assert len(read_metrics(tmp_path / "out")) == saved
    monkeypatch.undo()
    resumed = finish(cfg)
    assert same(resumed, finish(config(data, "dmd", tmp_path / "straight", micro_batch=1)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_from_an_earlier_checkpoint(data, tmp_path, dtype):
    out = tmp_path / "out"
    cfg = config(data, "ar", out, beta1=0.9, warmup=3, decay=True, dtype=dtype)
    first = finish(cfg)
    rows, state = read_metrics(out), checkpoint_state(out / "step-0000004")
    assert "generator.exp_avg.blocks.0.modulation" in state
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    record = json.loads((out / "config.json").read_text())
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT
    ).stdout.strip()
    assert record["commit"] == head
    assert record["processes"] == 1
    assert train.Config(**record["config"] | {"levels": cfg.levels, "sample_prompts": ()}) == cfg

    with pytest.raises(ValueError, match="is finished; choose another out"):
        finish(cfg)
    (out / "ar.safetensors").unlink()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"loss": 1.0, "st')  # a full disk tears a line
    assert same(finish(cfg), first), "all iterations done: only the export is left"
    assert read_metrics(out) == rows
    (out / "ar.safetensors").unlink()
    shutil.rmtree(out / "step-0000004")
    assert same(finish(cfg), first)
    assert read_metrics(out) == rows
    assert same(checkpoint_state(out / "step-0000004"), state)


def test_a_changed_config_does_not_resume(data, tmp_path, command, capsys):
    out = tmp_path / "out"
    finish(config(data, "ar", out, steps=2))
    capsys.readouterr()
    (out / "ar.safetensors").unlink()
    changes = {
        "lr": 3e-4,
        "seed": 1,
        "keep": 1,
        "steps": 9,
        "sample_every": 7,
        "micro_batch": 1,
        "offload": True,
    }
    line = refused(command, write_toml(tmp_path / "a.toml", values(data, "ar", out, **changes)))
    assert "step-0000002 was made with another lr, seed; choose another out" in line
    assert "another stage" in refused(
        command, write_toml(tmp_path / "a.toml", values(data, "dmd", out))
    )
    longer = write_toml(tmp_path / "a.toml", values(data, "ar", out, decay=True, steps=9))
    assert "with another steps, decay; choose" in refused(command, longer)


def test_a_failed_save_keeps_the_last_one(data, tmp_path, monkeypatch):
    """A disk that fills up: an error, and the checkpoint before is as good as it was."""
    from torch.distributed.checkpoint import filesystem

    out, inner, written = tmp_path / "out", filesystem._write_item, []
    straight = finish(config(data, "dmd", tmp_path / "straight"))

    def write_item(*arguments, **options):
        written.append(1)
        if len(written) > 1.5 * items:
            raise OSError(28, "No space left on device")
        return inner(*arguments, **options)

    items = len(checkpoint_state(tmp_path / "straight/step-0000004"))
    with monkeypatch.context() as patch:
        patch.setattr(filesystem, "_write_item", write_item)
        with pytest.raises(BaseException, match="No space left") as error:
            train.main(config(data, "dmd", out, keep=1), fsdp.World("cpu"))
    assert not isinstance(error.value, SystemExit | ValueError), "these end without a traceback"
    assert len(written) > items
    assert names(out) == ["step-0000002", "step-0000004.partial"]
    assert same(finish(config(data, "dmd", out, keep=1)), straight)
    assert names(out) == ["step-0000004"]


def test_keep(data, tmp_path):
    finish(config(data, "ar", tmp_path, steps=5, save_every=1, keep=2, batch=2))
    assert names(tmp_path) == ["step-0000004", "step-0000005"]


@pytest.mark.parametrize("stage", ["ar", "dmd"])
def test_nan_stops_the_run(data, tmp_path, monkeypatch, stage):
    inner = stages.Run.iteration

    def iteration(self, step):
        if step == 3:
            with torch.no_grad():
                next(iter(self.generator.parameters())).view(-1)[0] = torch.nan
        return inner(self, step)

    monkeypatch.setattr(stages.Run, "iteration", iteration)
    with pytest.raises(
        FloatingPointError, match=r"step 3, rank 0: not finite here: .*loss.*step-0000002"
    ):
        train.main(config(data, stage, tmp_path), fsdp.World("cpu"))
    assert names(tmp_path) == ["step-0000002"]
    assert len(read_metrics(tmp_path)) == 3
    assert not (tmp_path / f"{stage}.safetensors").exists()
    assert all(
        value.isfinite().all() for value in checkpoint_state(tmp_path / "step-0000002").values()
    )


# ------------------------------------------------------------------------------------------------- sample videos


SLOWLY = [("teacher", 1), ("ar", 0), ("ar", 1), ("ode", 1), ("dmd", 0)]
SAMPLED = [("teacher", 0), ("dmd", 1)] + [
    pytest.param(*case, marks=pytest.mark.slow) for case in SLOWLY
]


@pytest.mark.parametrize(("stage", "first"), SAMPLED)
def test_sample_videos_change_nothing(data, tmp_path, monkeypatch, stage, first):
    import imageio.v3 as iio

    torch.save(random_weights(VAE22(VAE), 1).state_dict(), tmp_path / "Wan2.2_VAE.pth")
    monkeypatch.setattr(
        train, "sampling_sigmas", lambda n, shift: [1.0, 0.9, 0.0]
    )  # quicker than 24
    changes = {"steps": 3, "batch": 2, "height": 2, "width": 2, "ratio": 1}
    write_shard(
        tmp_path / "clips/0.safetensors",
        {"latent": torch.randn(2, 48, 3 + first, 2, 2)},
        PROMPTS[:2],
    )
    paths = torch.randn(2, 5, 48, 3 + first, 2, 2)
    write_shard(tmp_path / "ode/0.safetensors", {"x": paths}, PROMPTS[:2], sigmas=few_step_sigmas())
    changes |= {"latents": str(tmp_path / "clips"), "trajectories": str(tmp_path / "ode")}
    changes |= {"frames": 3 + first, "prefix": first}
    plain = finish(config(data, stage, tmp_path / "plain", **changes))
    changes |= {"vae": str(tmp_path), "sample_prompts": (PROMPTS[1], PROMPTS[0]), "sample_every": 2}
    assert same(finish(config(data, stage, tmp_path / "out", **changes)), plain)
    assert read_metrics(tmp_path / "out") == read_metrics(tmp_path / "plain")
    files = sorted(path.name for path in (tmp_path / "out/samples").iterdir())
    assert files == ["step-0000002-0.mp4", "step-0000002-1.mp4"]
    video = iio.imread(tmp_path / "out/samples/step-0000002-0.mp4", plugin="pyav")
    assert video.shape == (1 + 4 * (2 + first), 32, 32, 3)


# ------------------------------------------------------------------------------- compiled; in bfloat16; on a GPU too


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["dmd", "sid"])
def test_compiled_rollouts_train_alike(data, tmp_path, stage):
    plain = finish(config(data, stage, tmp_path / "plain"))
    torch._dynamo.reset()  # so what the other stage has compiled does not count
    counts = torch._dynamo.utils.counters["stats"]
    before = counts["unique_graphs"]
    with compiling():
        compiled = finish(config(data, stage, tmp_path / "compiled", compile=True))
    assert counts["unique_graphs"] - before >= 3
    distance = apart(compiled, plain)
    assert distance < 1e-2


def run_in_bfloat16(
    data: Path, out: Path, stage: str, device: str, **changes
) -> dict[str, torch.Tensor]:
    """Four steps, or what is left of them; the average's float32 in the last checkpoint."""
    train.main(
        config(data, stage, out, device=device, dtype="bfloat16", **changes), fsdp.World(device)
    )
    return fsdp.read_weights(out / "step-0000004")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("stage", STAGES)
def test_runs_in_bfloat16(data, tmp_path, stage, device):
    """On a GPU the state may lie in host memory, and a run go on from a checkpoint: the same but for rounding."""
    plain = run_in_bfloat16(data, tmp_path / "plain", stage, device)
    assert all(value.isfinite().all() for value in plain.values())
    assert apart(plain, load_file(data / "generator.safetensors")) > 0.5, "nothing learned"
    hosted = run_in_bfloat16(data, tmp_path / "hosted", stage, device, offload=True)
    assert apart(hosted, plain) < 0.5
    (tmp_path / "hosted" / f"{stage}.safetensors").unlink()
    shutil.rmtree(tmp_path / "hosted/step-0000004")
    assert (
        apart(run_in_bfloat16(data, tmp_path / "hosted", stage, device, offload=True), plain) < 0.5
    )
    assert [row["step"] for row in read_metrics(tmp_path / "hosted")] == [0, 1, 2, 3]
