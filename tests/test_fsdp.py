"""Several processes against one.

As a script it is a process of torchrun's: it does the jobs of a JSON file one after the other.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from training import (
    ENVIRONMENT,
    apart,
    checkpoint_state,
    config,
    finish,
    names,
    read_metrics,
    same,
    values,
    without_std,
)

import train
from wan5b import fsdp, stages
from wan5b.extras import budget, checkpoints, checks, log
from wan5b.extras.checks import check_config

STEPS = {"ar": 2, "dmd": 4}  # the other stages below
STAGES = tuple(STEPS)
# dmd with all that the GAN branch and Data-Forcing have.
GAN = {
    "steps": 2,
    "ratio": 1,
    "gan_weight": 0.5,
    "gan_critic_weight": 0.5,
    "gan_r1": 0.01,
    "gan_r2": 0.01,
    "data_forcing": 0.5,
}
# Of rollouts, all but those that need a VAE.
OPTIONS = {"levels_after": [1000, 500], "clean_pass": False, "window": 5}
OPTIONS |= {"sink": 1, "sink_rope": "relative", "steps": 2}
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="not two CUDA devices")
PLACES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, TWO_GPUS])]


@pytest.fixture(scope="module", autouse=True)
def _clean():
    """For all of the module, whose runs are shared."""
    handler = signal.getsignal(signal.SIGTERM)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


def test_world_refuses(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(ValueError, match="6 processes do not divide into groups of 4"):
        fsdp.World("cpu", 4)
    monkeypatch.delenv("WORLD_SIZE")
    world = fsdp.World("cpu")
    world.size = 4
    with pytest.raises(ValueError, match="the global batch 6 does not divide over 4 processes"):
        check_config(train.Config("ar", "x", "x", latents="x", batch=6), world)


# ------------------------------------------------------------------------- in torchrun's processes


def job(kind: str, keys: dict, of_rank_1: dict | None = None) -> dict:
    """kind: "train"; "nan", which breaks the loss on rank 1; "sigterm", which reaches rank 1 alone.

    keys: of train.Config. of_rank_1: keys that are others there.
    """
    return {"kind": kind, "config": keys, "of_rank_1": of_rank_1 or {}}


def torchrun(processes: int, folder: Path, jobs: list[dict]) -> list[list]:
    """Do the jobs in new processes -> for every process the results of all jobs.

    What they print is added to the folder's "printed".
    """
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += [f"--nproc_per_node={processes}", __file__, str(path)]
    environment = os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    pipes = {"capture_output": True, "text": True}
    done = subprocess.run(launch, env=environment, timeout=300, **pipes)
    with (folder / "printed").open("a") as printed:
        printed.write(done.stdout)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"jobs.json.{rank}").read_text()) for rank in range(processes)]


class Rollouts:
    """Notes of all rollouts, in the places of stages.micro_batches and stages.roll_out."""

    def __init__(self):
        self.notes = []  # (phase, step, exit level, whole behind it, whole behind each forward)
        self.now = None  # the phase and the step
        self.inner = (stages.micro_batches, stages.roll_out)

    def micro_batches(self, run, phase, step, moved):
        self.now = (phase, step)
        yield from self.inner[0](run, phase, step, moved)

    def roll_out(self, run, batch):
        layers = [block.ffn[0] for block in run.generator.blocks]
        whole = []

        def look(*_):
            whole.append(not any(isinstance(layer.weight, DTensor) for layer in layers))

        hook = run.generator.register_forward_hook(look)  # behind FSDP's, which shards again
        rolled = self.inner[1](run, batch)
        hook.remove()
        look()
        self.notes.append((*self.now, rolled.exit_step, whole.pop(), all(whole)))
        return rolled


def worker(path: str) -> None:
    """Do all jobs of a file; leave the results beside it."""
    budget.matmul_rate = lambda device, dtype: 1.0
    checks.SHOWN_WITHIN = 1
    jobs = json.loads(Path(path).read_text())
    inner = train.iteration
    rollouts = Rollouts()
    stages.micro_batches = rollouts.micro_batches
    stages.roll_out = rollouts.roll_out

    def do(kind, keys, of_rank_1, world):
        def disturbed(run, step):
            metrics = inner(run, step)
            if world.rank == 1 and step == 2 and kind == "nan":
                metrics["loss"] = metrics["loss"] * torch.nan
            if world.rank == 1 and step == 0 and kind == "sigterm":
                os.kill(os.getpid(), signal.SIGTERM)
            return metrics

        train.iteration = disturbed
        rollouts.notes = []
        world.stopping = False
        if world.rank == 1:
            keys = keys | of_rank_1
        elif of_rank_1:
            time.sleep(0.2)  # the last to come to the lock
        try:
            train.main(train.Config(**keys), world)
        except (FloatingPointError, ValueError) as error:
            return {"error": str(error)}
        return {"returned": True, "exits": rollouts.notes}

    first = jobs[0]["config"]
    with contextlib.closing(fsdp.World(first["device"], first.get("shard", 0))) as world:
        results = [do(*each.values(), world) for each in jobs]
        if world.device.type == "cuda":
            # The allocator reads its settings at its first use, so they have come in time.
            assert all(segment["is_expandable"] for segment in torch.cuda.memory_snapshot())
        Path(f"{path}.{world.rank}").write_text(json.dumps(results))


# ----------------------------------------------------------------------------------- two processes


@pytest.fixture(scope="module", params=PLACES)
def place(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def two(data, place, tmp_path_factory):
    """Two launches of two processes; the second goes on with what the first left.

    The folder of all runs, and both launches' results.
    """
    folder = tmp_path_factory.mktemp("two")
    common = {"micro_batch": 1, "beta1": 0.5, "device": place}
    jobs = []
    for stage, steps in STEPS.items():
        jobs.append(job("train", values(data, stage, folder / stage, steps=steps, **common)))
    jobs.append(job("nan", values(data, "ar", folder / "nan", **common)))
    half = common | {"dtype": "bfloat16", "steps": 2, "offload": True}
    jobs.append(job("train", values(data, "ar", folder / "half", **half)))
    jobs.append(job("sigterm", values(data, "dmd", folder / "sigterm", **common)))
    results = torchrun(2, folder, jobs)

    ignored = shutil.ignore_patterns("step-0000004", "*.safetensors")
    for name in ("again", "alone"):  # as if stopped after two iterations
        shutil.copytree(folder / "dmd", folder / name, ignore=ignored)
    more = []
    for name in ("again", "sigterm", "again"):  # which is finished then
        more.append(job("train", values(data, "dmd", folder / name, **common)))
    return folder, results, torchrun(2, folder, more)


@pytest.fixture(scope="module")
def one(data, place, tmp_path_factory):
    """The same runs in this process: their folder, and what they export."""
    folder = tmp_path_factory.mktemp("one")
    common = {"beta1": 0.5, "device": place}
    exports = {}
    for stage, steps in STEPS.items():
        exports[stage] = finish(config(data, stage, folder / stage, steps=steps, **common))
    return folder, exports


def equal(place: str, a: Path, b: Path) -> bool:
    """The same bits, or on GPUs, whose sums have no fixed order, the same but for rounding."""
    if place == "cpu":
        return same(load_file(a), load_file(b))
    return apart(load_file(a), load_file(b)) < 1e-2


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_are_one(two, one, stage):
    weights = load_file(two[0] / stage / f"{stage}.safetensors")
    assert apart(weights, one[1][stage]) < 1e-2
    rows = zip(read_metrics(two[0] / stage), read_metrics(one[0] / stage), strict=True)
    for a, b in rows:
        assert without_std(a) == pytest.approx(without_std(b), rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_two_processes_are_one_in_other_stages(data, place, tmp_path):
    """The GAN branch, whose classifier is sharded, trained and saved with the critic; exits, levels
    and the end of each rollout, a sink that is turned for each chunk.
    """
    given = {
        "ode": ("ode", {"steps": 2}),
        "sid": ("sid", {"steps": 2}),
        "gan": ("dmd", GAN),
        "rollouts": ("dmd", OPTIONS),
    }
    common = {"beta1": 0.5, "device": place}
    jobs = []
    for name, (stage, keys) in given.items():
        finish(config(data, stage, tmp_path / "one" / name, **keys, **common))
        out = tmp_path / "two" / name
        jobs.append(job("train", values(data, stage, out, micro_batch=1, **keys, **common)))
    first, second = torchrun(2, tmp_path, jobs)
    assert first[-1]["exits"] == second[-1]["exits"]

    for name in given:
        one, two = (tmp_path / folder / name for folder in ("one", "two"))
        for a, b in zip(read_metrics(one), read_metrics(two), strict=True):
            assert without_std(a) == pytest.approx(without_std(b), rel=1e-3, abs=1e-5)
        states = [checkpoint_state(run / "step-0000002") for run in (one, two)]
        networks = ["generator.master"]
        if name != "ode":
            networks.append("critic.master")
        if name == "gan":
            networks.append("critic.master.classifier")
        for network in networks:
            parts = [{n: x for n, x in state.items() if n.startswith(network)} for state in states]
            assert parts[0]
            assert apart(*parts) < 1e-2


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
    straight = folder / "dmd"
    again = folder / "again"
    assert equal(place, again / "dmd.safetensors", straight / "dmd.safetensors")
    state = checkpoint_state(straight / "step-0000004")
    assert {name.split(".")[1] for name in state} == {"master", "exp_avg", "exp_avg_sq", "ema"}
    rows = read_metrics(again)
    expected = read_metrics(straight)
    assert rows[:2] == expected[:2]
    if place == "cpu":
        assert same(checkpoint_state(again / "step-0000004"), state)
        assert rows == expected
    for a, b in zip(rows, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_one_process_resumes_what_two_saved(data, place, two):
    folder = two[0] / "alone"
    cfg = config(data, "dmd", folder, beta1=0.5, device=place)
    world = fsdp.World(place)
    run = train.build(cfg, world)
    saved = checkpoint_state(folder / "step-0000002")
    assert checkpoints.load(world, folder / "step-0000002", run.optimizers)["step"] == 2
    state = {}
    for who, optimizer in run.optimizers.items():
        for name, value in optimizer.state().items():
            state[f"{who}.{name}"] = value.cpu()
    assert same(state, saved)
    weight = run.generator.head.head.weight.cpu()
    assert torch.equal(weight, saved["generator.master.head.head.weight"])
    assert apart(finish(cfg), load_file(two[0] / "dmd/dmd.safetensors")) < 1e-2
    assert len(read_metrics(folder)) == 4


def test_one_process_joins_the_halves_that_two_saved(data, two):
    """bfloat16: the checkpoint's masters are float32, of more bits than the weights, and come back
    bit for bit.
    """
    run = train.build(config(data, "ar", beta1=0.5, dtype="bfloat16"), fsdp.World("cpu"))
    saved = checkpoint_state(two[0] / "half/step-0000002")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    checkpoints.load(run.world, two[0] / "half/step-0000002", run.optimizers)
    state = run.optimizers["generator"].state()
    assert same({f"generator.{name}": value for name, value in state.items()}, saved)
    for name, parameter in run.generator.named_parameters():
        master = saved[f"generator.master.{name}"]
        upper = (master.view(torch.int32) + 0x8000) >> 16
        assert torch.equal(parameter.detach().view(torch.int16).int(), upper)
    assert any((master.bfloat16() != master).any() for master in saved.values())
    for name, exported in load_file(two[0] / "half/ar.safetensors").items():
        assert torch.equal(exported, saved[f"generator.ema.{name}"].bfloat16())


def test_nan_names_the_rank(two):
    errors = [ranks[len(STAGES)]["error"] for ranks in two[1]]
    assert all("step 2, rank" in error and "step-0000002" in error for error in errors)
    assert "rank 0: not finite here: nothing" in errors[0]
    assert "rank 1: not finite here: loss;" in errors[1]
    assert names(two[0] / "nan") == ["step-0000002"]


def test_sigterm_of_one_process_stops_both(two, place):
    folder, first, second = two
    assert [ranks[-1]["returned"] for ranks in (*first, *second)] == [True] * 4
    printed = (folder / "printed").read_text()
    assert printed.count("stopped by SIGTERM in step 1") == 1
    assert printed.count("again/dmd.safetensors is there: this run is finished") == 1
    assert {row[1] for row in first[0][-1]["exits"]} == {0}
    assert {row[1] for row in second[0][1]["exits"]} == {1, 2, 3}
    assert equal(place, folder / "sigterm/dmd.safetensors", folder / "dmd/dmd.safetensors")


class AThread:
    """In the place of a World: one of two threads, which exchange as processes do."""

    given = [None, None]
    both = threading.Barrier(2, timeout=20)

    def __init__(self, rank: int):
        self.rank = rank

    def exchange(self, value):
        self.given[self.rank] = value
        self.both.wait()
        values = list(self.given)
        self.both.wait()
        return values


def said_by_both(first: train.Config, second: train.Config) -> list[str]:
    """What check_alike says in two processes, of which the first has the lock of its folder."""

    def check(rank: int, cfg: train.Config) -> str:
        try:
            checks.check_alike(cfg, checks.held_by(cfg), AThread(rank))
        except ValueError as error:
            return str(error)
        return ""

    with log.locked(Path(first.out)), ThreadPoolExecutor(2) as threads:
        return list(threads.map(check, (0, 1), (first, second)))


def of_different_runs(data, folder: Path) -> dict[str, dict]:
    """What is said -> what process 1 has, as on a machine with its own config, files or disks."""
    (folder / "local").mkdir()
    (folder / "local/lock").write_text("17 on the machine of process 0 in an earlier run")
    return {
        "has another lr than process 0 (0.1, not 0.0001): start all": {"lr": 0.1},
        "has another steps than process 0 (2, not 1): start all": {"steps": 2},
        "has other weights than process 0, or": {"weights": str(data / "teacher.safetensors")},
        "has other latents than process 0, or none:": {"latents": str(folder / "nothing")},
        "does not see process 0's folder out (": {"out": str(folder / "local")},
    }


def test_processes_of_different_runs_are_told_apart(data, tmp_path, monkeypatch):
    """What only lies elsewhere is no other."""
    monkeypatch.setattr(checks, "SHOWN_WITHIN", 0.3)
    keys = values(data, "ar", tmp_path / "run", steps=1)
    for text, changes in of_different_runs(data, tmp_path).items():
        for said in said_by_both(train.Config(**keys), train.Config(**keys | changes)):
            assert said.startswith(f"process 1 {text}")
    moved = str(shutil.copy(data / "generator.safetensors", tmp_path / "moved.safetensors"))
    assert said_by_both(train.Config(**keys), train.Config(**keys | {"weights": moved})) == ["", ""]

    # A machine whose code is newer, or older.
    extra = [("extra", int, 1)]
    later = dataclasses.make_dataclass("Later", extra, bases=(train.Config,), frozen=True)
    versions = (train.Config(**keys), later(**keys))
    for first, second in (versions, versions[::-1]):
        for said in said_by_both(first, second):
            assert said.startswith("process 1 has another extra than process 0 (")


@pytest.mark.slow
def test_processes_of_different_runs_do_not_train_together(data, tmp_path):
    keys = values(data, "ar", tmp_path / "run", micro_batch=1, steps=1)
    apart = of_different_runs(data, tmp_path)
    jobs = [job("train", keys, changes) for changes in apart.values()]
    jobs.append(job("train", keys))
    for *refused, trained in torchrun(2, tmp_path, jobs):
        for text, result in zip(apart, refused, strict=True):
            assert result["error"].startswith(f"process 1 {text}")
        assert trained["returned"]
    assert names(tmp_path / "run") == ["step-0000001"]


def test_files_that_show_late_are_waited_for(tmp_path):
    """As on a network file system, where another machine has written them."""
    lock = tmp_path / "lock"
    lock.write_text("of an earlier run")
    late = threading.Timer(0.5, lock.write_text, ["of this one"])
    late.start()
    assert checks._comes_to_hold(lock, "of this one")
    late.join()


def test_all_go_on_from_the_checkpoint_of_process_0(trained, data, monkeypatch):
    """Another machine may not see the newest one yet, or still see one that is gone."""
    cfg = config(data, "dmd", trained / "dmd", steps=2, ema=0.5)
    world = fsdp.World("cpu")
    for first in ("step-0000002", ""):
        monkeypatch.setattr(world, "exchange", lambda value, first=first: [first, value])
        monkeypatch.setattr(checks, "complete", lambda out, first=first: [] if first else [out])
        path = checks.newest(cfg, checks.held_by(cfg), world)
        assert path == (trained / "dmd" / first if first else None)


def test_two_copies_are_one(data, place, one, tmp_path):
    """Each process has all weights; their gradients are averaged."""
    keys = {"steps": STEPS["ar"], "micro_batch": 1, "shard": 1, "beta1": 0.5, "device": place}
    torchrun(2, tmp_path, [job("train", values(data, "ar", tmp_path / "ar", **keys))])
    assert apart(load_file(tmp_path / "ar/ar.safetensors"), one[1]["ar"]) < 1e-2
    rows = zip(read_metrics(tmp_path / "ar"), read_metrics(one[0] / "ar"), strict=True)
    for a, b in rows:
        assert without_std(a) == pytest.approx(without_std(b), rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_hybrid_sharding_is_one_process(data, tmp_path):
    """2 x 2: each pair shares a copy of the weights. All four go on from the middle, and so does
    one process.
    """
    common = {"batch": 8, "beta1": 0.5}
    expected = finish(config(data, "dmd", tmp_path / "one", **common))
    keys = values(data, "dmd", tmp_path / "four", micro_batch=1, shard=2, **common)
    torchrun(4, tmp_path, [job("train", keys)])
    straight = load_file(tmp_path / "four/dmd.safetensors")
    assert apart(straight, expected) < 1e-2

    ignored = shutil.ignore_patterns("step-0000004", "*.safetensors")
    for name in ("again", "alone"):
        shutil.copytree(tmp_path / "four", tmp_path / name, ignore=ignored)
    torchrun(4, tmp_path, [job("train", keys | {"out": str(tmp_path / "again")})])
    assert same(load_file(tmp_path / "again/dmd.safetensors"), straight)
    alone = finish(config(data, "dmd", tmp_path / "alone", **common))
    assert apart(alone, straight) < 1e-2


@pytest.mark.slow
def test_compiled_processes_are_one(data, tmp_path):
    """Weights that FSDP gathers and frees, gradients that it reduces: compiled, attention kept and
    split.
    """
    options = {"compile": True, "keep_attention": True, "split_attention": True}
    changes = {"ar": {"steps": 2}}
    changes["dmd"] = changes["sid"] = {"steps": 2, "ratio": 1}
    jobs = []
    for stage, own in changes.items():
        keys = values(data, stage, tmp_path / stage, micro_batch=1, **own, **options)
        jobs.append(job("train", keys))
    torchrun(2, tmp_path, jobs)
    for stage, own in changes.items():
        one = finish(config(data, stage, tmp_path / f"{stage}-one", **own))
        assert apart(load_file(tmp_path / stage / f"{stage}.safetensors"), one) < 1e-2


if __name__ == "__main__":
    worker(sys.argv[1])
